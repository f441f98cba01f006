"""Measures log-probs and both gradients from hidden states (time, TFLOP/s, memory) beside other implementations.

    python -m benchmarks.bench_linear_logprob               on a GPU: all shapes in bfloat16
    python -m benchmarks.bench_linear_logprob --memory      anywhere: peak bytes against the logits path, measured on
                                                            small shapes and counted on those of 7B and 70B models
    python -m benchmarks.bench_linear_logprob --smoke       tests the benchmark itself on tiny shapes

For L positions, V vocabulary entries and hidden size H, operations are counted as 2 L V H for the forward pass and
6 L V H for forward and backward pass together, also for what computes logits twice. `products` are cuBLAS's own,
with nothing between them. Bytes are those beyond the inputs.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common, kernel_common
from benchmarks.installed import absent
from benchmarks.kernel_common import MEBIBYTE
from silva.engine.planning.built import without_launches
from silva.engine.planning.meter import Meter
from silva.kernels import linear_logprob as ours
from silva.kernels import reference

# (L, V, H)
SHAPES = [
    (8192, 131_072, 4096),
    (8192, 32_000, 4096),
    (16_384, 32_000, 4096),
    (8192, 32_000, 8192),
    (8192, 4000, 8192),
]
# for a CPU, in float32
MEASURED = [(2048, 32_000, 128), (1024, 131_072, 64)]
SMOKE = [(60, 700, 32)]
# positions of one chunk of torch.compile's peer
CHUNK = 1024
Run = Callable[[], Any]


class Problem:
    """Holds one shape's tensors and everything that is run on them.

    Attributes:
        hidden: (L, H), the hidden states.
        weight: (V, H), the output matrix.
        target: (L,) int64.
        grad: (L,) float32, the gradient of the log-probs.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        positions, vocabulary, size = shape
        generator = torch.Generator(device).manual_seed(0) if device.type != "meta" else None
        options: dict[str, Any] = {"device": device, "dtype": dtype, "generator": generator}
        self.hidden = torch.randn(positions, size, **options).requires_grad_()
        self.weight = (torch.randn(vocabulary, size, **options) / size**0.5).requires_grad_()
        self.target = torch.randint(0, vocabulary, (positions,), device=device, generator=generator)
        self.grad = torch.full((positions,), -1.0 / max(1, positions), device=device)

    def backward(self, loss: Tensor, grad: Tensor | None = None) -> list[Tensor]:
        """Return the loss, detached, and its gradients of `hidden` and `weight`."""
        found = torch.autograd.grad(loss, (self.hidden, self.weight), grad)
        return [loss.detach(), *found]

    def forward(self) -> Tensor:
        """Compute the log-probs with Silva's kernels."""
        with torch.no_grad():
            return ours.linear_logprob(self.hidden, self.weight, self.target)

    def both(self) -> list[Tensor]:
        """Compute log-probs and both gradients with Silva's kernels."""
        return self.backward(ours.linear_logprob(self.hidden, self.weight, self.target), self.grad)

    def logits(self) -> list[Tensor]:
        """Compute log-probs and both gradients from plain logits."""
        return self.backward(
            reference.linear_logprob(self.hidden, self.weight, self.target), self.grad.to(self.wide)
        )

    @property
    def wide(self) -> torch.dtype:
        """Return the number type of the log-probs from plain logits: float32 at least."""
        return torch.promote_types(self.hidden.dtype, torch.float32)

    def one_product(self) -> Tensor:
        """Compute the product of the forward pass."""
        with torch.no_grad():
            return self.hidden @ self.weight.T

    def three_products(self) -> None:
        """Compute the three products of the forward and the backward pass."""
        with torch.no_grad():
            slope = self.hidden @ self.weight.T
            slope @ self.weight
            slope.T @ self.hidden

    def compiled(self) -> list[Tensor]:
        """Compute the loss and both gradients with torch.compile over chunks."""
        loss = sum(
            _compiled_chunk()(h, self.weight, t)
            for h, t in zip(self.hidden.split(CHUNK), self.target.split(CHUNK), strict=True)
        )
        return self.backward(loss / self.hidden.shape[0])

    def liger(self) -> list[Tensor]:
        """Compute the loss and both gradients with Liger."""
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return self.backward(LigerFusedLinearCrossEntropyLoss()(self.weight, self.hidden, self.target))

    def cce(self) -> list[Tensor]:
        """Compute the loss and both gradients with CCE."""
        from cut_cross_entropy import linear_cross_entropy

        return self.backward(linear_cross_entropy(self.hidden, self.weight, self.target))


# the module that has to be there, and what is run
PEERS: dict[str, tuple[str, Callable[[Problem], list[Tensor]]]] = {
    "torch.compile, chunks": ("torch", Problem.compiled),
    "Liger": ("liger_kernel", Problem.liger),
    "CCE": ("cut_cross_entropy", Problem.cce),
}


def missing(peer: str, device: torch.device) -> str | None:
    """Return why a peer cannot be measured, or None."""
    return "runs on GPUs only" if device.type != "cuda" else absent(PEERS[peer][0])


def agreement(problem: Problem, peer: str) -> float:
    """Return the largest relative difference, in the norm, between a peer's gradients and Silva's.

    Silva's own gradients are validated by `check`.

    Raises:
        SystemExit: the difference is more than rounding, which is some 2^-8 in bfloat16, two or three times.
    """
    pairs = zip(PEERS[peer][1](problem)[1:], problem.both()[1:], strict=True)
    apart = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)
    if not apart < 2e-2:
        raise SystemExit(f"{peer}: another result than Silva's: {apart:.2g} apart")
    return apart


@functools.cache
def _compiled_chunk() -> Callable[..., Tensor]:
    def chunk(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        # without checkpointing every chunk's logits live until the backward pass
        def loss(h: Tensor, w: Tensor) -> Tensor:
            return torch.nn.functional.cross_entropy((h @ w.T).float(), target, reduction="sum")

        return torch.utils.checkpoint.checkpoint(loss, hidden, weight, use_reentrant=False)

    # otherwise torch compiles code for any shape as soon as it meets a second one
    return torch.compile(chunk, dynamic=False)


def check(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> float:
    """Return the largest error of log-probs and gradients against float64, relative to the largest element.

    Raises:
        SystemExit: the error is more than rounding.
    """
    problem = Problem(shape, dtype, device)
    h, w = (x.detach().double().requires_grad_() for x in (problem.hidden, problem.weight))
    value = reference.linear_logprob(h, w, problem.target)
    truth = torch.autograd.grad((value * problem.grad.double()).sum(), (h, w))
    found = problem.both()
    errors = [
        float((a.double() - b.detach()).abs().max() / b.detach().abs().max())
        for a, b in zip(found, (value, *truth), strict=True)
    ]
    # the log-probs are float32 sums, and the gradients are rounded twice
    if errors[0] > 1e-5 or max(errors) > max(1e-5, 2 * torch.finfo(dtype).eps):
        raise SystemExit(f"wrong results at {shape}: errors {errors}")
    return max(errors)


def time_shape(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    peers: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Measure times and peak bytes of one shape.

    Args:
        shape: (L, V, H).
        dtype: of hidden states and output matrix.
        device: of all tensors.
        repeats: timed runs of each implementation.
        peers: names from `PEERS`; by default all that are installed, each after its check.

    Returns:
        One row for each implementation.
    """
    problem = Problem(shape, dtype, device)
    if peers is None:
        peers = [name for name in PEERS if not missing(name, device)]
        for name in peers:
            agreement(problem, name)
    runs: dict[str, tuple[Run, int]] = {
        "product, forward": (problem.one_product, 1),
        "ours, forward": (problem.forward, 1),
        "products, all three": (problem.three_products, 3),
        "ours": (problem.both, 3),
        "plain logits": (problem.logits, 3),
    }
    runs |= {name: (functools.partial(PEERS[name][1], problem), 3) for name in peers}
    peaks = {name: kernel_common.peak_bytes(run) for name, (run, _) in runs.items()}
    times = kernel_common.milliseconds({name: run for name, (run, _) in runs.items()}, repeats)
    operations = 2 * shape[0] * shape[1] * shape[2]
    return [
        {
            "shape": "x".join(map(str, shape)),
            "what": name,
            "ms": times[name],
            "TFLOP/s": products * operations / times[name] / 1e9,
            "MiB": peaks[name] / MEBIBYTE,
        }
        for name, (_, products) in runs.items()
    ]


# ---------------------------------------------------------------- memory


def counted(shape: tuple[int, int, int], dtype: torch.dtype) -> list[dict[str, Any]]:
    """Count the bytes that live at once on a GPU.

    They are counted from the allocations of the code itself, on tensors without memory.
    """
    rows = []
    for name in ("forward", "both", "logits"):
        problem = Problem(shape, dtype, torch.device("meta"))
        given = (problem.hidden, problem.weight, problem.target, problem.grad)
        with without_launches(Meter()), kernel_common.LiveBytes(*given) as live:
            result = getattr(problem, name)()
        gradients = sum(x.nbytes for x in result[1:]) if isinstance(result, list) else 0
        rows.append({"what": name, "peak": live.peak, "gradients": gradients})
    full = rows[-1]["peak"]
    return [
        {
            "shape": "x".join(map(str, shape)),
            "what": row["what"],
            "MiB": row["peak"] / MEBIBYTE,
            "without gradients": (row["peak"] - row["gradients"]) / MEBIBYTE,
            "logits path / this": (full - rows[-1]["gradients"]) / max(1, row["peak"] - row["gradients"]),
        }
        for row in rows
    ]


def measured(shape: tuple[int, int, int], device: torch.device) -> list[dict[str, Any]]:
    """Measure the peak memory of a real run, in float32."""
    problem = Problem(shape, torch.float32, device)
    peaks = {name: kernel_common.peak_bytes(getattr(problem, name)) for name in ("forward", "both", "logits")}
    gradients = {"forward": 0, "both": problem.hidden.nbytes + problem.weight.nbytes}
    gradients["logits"] = gradients["both"]
    own = {name: peak - gradients[name] for name, peak in peaks.items()}
    return [
        {
            "shape": "x".join(map(str, shape)),
            "what": name,
            "MiB": peaks[name] / MEBIBYTE,
            "without gradients": own[name] / MEBIBYTE,
            "logits path / this": own["logits"] / own[name],
        }
        for name in peaks
    ]


def table(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table."""
    common.show(title, list(rows[0]), [list(row.values()) for row in rows])


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_linear_logprob", description=__doc__)
    parser.add_argument("--memory", action="store_true", help="peak bytes instead of times")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, help="JSON with every figure")
    options = parser.parse_args()
    device = kernel_common.device()
    if device.type == "cpu" and not (options.smoke or options.memory):
        raise SystemExit("no GPU found; on a CPU only --memory and --smoke run")
    torch.set_num_threads(1) if device.type == "cpu" else None
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    figures: dict[str, Any] = {"error": check((252, 507, 123), dtype, device)}
    rows: list[dict[str, Any]] = []
    if options.memory:
        for shape in SMOKE if options.smoke else MEASURED:
            rows += measured(shape, device)
        table(f"measured, {device.type}, float32", rows)
        figures["least_ratio_measured"] = min(
            row["logits path / this"] for row in rows if row["what"] == "both"
        )
        by_count = [row for shape in SHAPES for row in counted(shape, torch.bfloat16)]
        table("counted, GPU, bfloat16", by_count)
        figures["least_ratio_counted"] = min(
            row["logits path / this"] for row in by_count if row["what"] == "both"
        )
        figures["workspace_mib_counted"] = max(
            row["without gradients"] for row in by_count if row["what"] != "logits"
        )
        rows += by_count
    else:
        for shape in SMOKE if options.smoke else SHAPES:
            rows += time_shape(shape, dtype, device, 2 if options.smoke else options.repeats)
        table(f"{device.type}, {str(dtype).removeprefix('torch.')}", rows)
        first = {row["what"]: row["ms"] for row in rows if row["shape"] == rows[0]["shape"]}
        figures["forward_over_product"] = first["product, forward"] / first["ours, forward"]
        figures["both_over_products"] = first["ours"] / first["products, all three"]
    kernel_common.report(figures, rows, options.out)


if __name__ == "__main__":
    main()
