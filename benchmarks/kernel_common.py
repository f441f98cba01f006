"""Provides what the kernel benchmarks share: device timing, peak memory measured and counted, figures in a file."""

from __future__ import annotations

import json
import multiprocessing
import statistics
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import triton
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import common

# bytes written between two measurements, which are more than any L2 cache holds
FLUSH = 256 << 20
# cycles that the GPU waits, a millisecond; by then all that is measured is queued, its launches included
AHEAD = 2_000_000
MEBIBYTE = 1 << 20


def device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def milliseconds(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median of `repeats` runs of each, which are timed in turns.

    Each is first run once, so that it is compiled. On a GPU the cache is flushed before each timed run, and the times
    are the GPU's own milliseconds; Python's count only where it takes longer than a millisecond.
    """
    if device().type == "cpu":
        for run in runs.values():
            run()
        return {name: 1e3 * statistics.median(s) for name, s in common.in_turns(runs, repeats).items()}
    flush = torch.empty(FLUSH, dtype=torch.int8, device="cuda")
    for run in runs.values():
        run()
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(AHEAD)
            begin.record()
            run()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) for name, pairs in events.items()}


def peak_bytes(run: Callable[[], Any]) -> int:
    """Return the peak bytes of a run beyond what was there before.

    On a GPU they are those of its allocator, else those of the resident set of a child process.
    """
    if device().type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_resident_peak, args=(run, theirs))
    child.start()
    theirs.close()
    found = ours.recv()
    child.join()
    return found


def _resident_peak(run: Callable[[], Any], answer: Connection) -> None:
    # this resets the high-water mark
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    answer.send(_status("VmHWM") - before)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes that live at once of all storages made under it.

    The count is exact, and on the meta device it takes no memory.

    Args:
        *given: tensors that are there before; their views do not count.

    Attributes:
        peak: the most bytes that lived at once.
    """

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.peak = 0
        self._given = {tensor.untyped_storage()._cdata for tensor in given}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        out = function(*arguments, **(options or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._given:
                    self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return out


def environment(**more: object) -> dict[str, object]:
    """Return what `common.environment` returns, with the GPU and Triton's version."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return common.environment(gpu=name, triton=triton.__version__, **more)


def report(
    figures: Mapping[str, object], rows: list[dict[str, Any]], out: Path | None, **more: object
) -> None:
    """Write everything as JSON where `out` says, and print the figures last."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(
            json.dumps({"environment": environment(**more), "rows": rows, "figures": figures}, indent=2)
            + "\n"
        )
    common.finish(figures)
