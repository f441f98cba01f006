"""Decides where an operation runs: as a Triton kernel, on the GPU or in Triton's interpreter, or as plain torch.

Kernel modules take `jit`, `tl` and `triton` from here, so that they can be imported where there is no Triton.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

try:
    triton: Any = importlib.import_module("triton")
    tl: Any = importlib.import_module("triton.language")
    jit: Any = triton.jit
    INTERPRETED = bool(triton.knobs.runtime.interpret)
except ImportError:
    # Triton is not built for every platform; the torch definitions are then the only ones
    triton = tl = None
    INTERPRETED = False

    def jit(function: Any = None, **options: Any) -> Any:
        """Return the function as it is, in place of `triton.jit`."""
        return function or (lambda decorated: decorated)


# what `forced` says while its block lasts
_forced: bool | None = None


def runs_kernels(x: Tensor) -> bool:
    """Tell whether operations on `x` take the kernels.

    float64 never does, because the kernels are judged by the torch definitions in float64.
    """
    taken = x.is_cuda or INTERPRETED if _forced is None else _forced
    return triton is not None and x.dtype != torch.float64 and taken


@contextlib.contextmanager
def forced(kernels: bool) -> Iterator[None]:
    """Take the kernels' path, or torch's, on every device while the block lasts.

    The planner uses it to count what the code around the kernels allocates without launching any; tests use it too.

    Args:
        kernels: whether the kernels' path is taken.
    """
    global _forced
    before, _forced = _forced, kernels
    try:
        yield
    finally:
        _forced = before
