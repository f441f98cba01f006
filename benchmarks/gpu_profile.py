"""Measures the time of a run by groups of kernels, as torch's profiler sees them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# Groups and the names that they are known by. The names are those of a kernel, of the operation that launched it, and
# of everything that this operation is part of.
GROUPS = {
    "optimizer": r"\boptimizer\b",
    "log-probs": r"LinearLogProb|cross_entropy|nll_loss|log_softmax|LogSoftmax|NllLoss",
    "attention": r"TreeAttention|[aA]ttention|flash|fmha",
    "products": r"aten::(mm|addmm|bmm|linear|matmul|_scaled_mm)\b|gemm|cutlass|nvjet",
    "other": r"^(Memcpy|Memset)|nccl|gloo|c10d|^unlinked",
    "elementwise": r"aten::|_Norm|_Rotary|_SwiGLU|_PreferenceLoss|Backward|kernel",
}


def shares(run: Callable[[], object]) -> tuple[float, dict[str, float]]:
    """Return the seconds that all kernels of a run take, and the share of each group in them.

    On a CPU these are operations instead of kernels.

    Raises:
        SystemExit: the profiler saw none.
    """
    gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * gpu]
    with profile(activities=activities) as recorded:
        run()
        if gpu:
            torch.cuda.synchronize()
    total = dict.fromkeys(GROUPS, 0.0)
    for names, microseconds in parts(recorded.events()):
        total[group_of(names)] += microseconds
    everything = sum(total.values())
    if not everything:
        raise SystemExit("the profiler saw no kernel")
    return everything / 1e6, {name: time / everything for name, time in total.items()}


def parts(events: Sequence[Any]) -> Iterator[tuple[str, float]]:
    """Yield every kernel, or on a CPU every operation without its parts.

    Yields:
        (names from the inside out, one a line; microseconds).
    """
    gpu, linked = torch.cuda.is_available(), 0.0
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        names = [event.name]
        outer = event.cpu_parent
        while outer is not None:
            names.append(outer.name)
            outer = outer.cpu_parent
        if not gpu:
            yield "\n".join(names), event.self_cpu_time_total
        for kernel in event.kernels:
            # an event with the label's name is not a kernel: it is the label's own time span on the GPU
            if kernel.name != event.name:
                linked += kernel.duration
                yield "\n".join([kernel.name, *names]), kernel.duration
    on_gpu = (
        e for e in events if e.device_type != torch.autograd.DeviceType.CPU and not e.is_user_annotation
    )
    rest = sum(event.time_range.elapsed_us() for event in on_gpu) - linked
    if rest > 0:
        yield "unlinked", rest


def group_of(names: str) -> str:
    """Return the group of a kernel or operation with these names."""
    found = (group for group, pattern in GROUPS.items() if re.search(pattern, names, re.MULTILINE))
    return next(found, "other")
