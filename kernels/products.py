"""Multiplies matrices of a narrow dtype into a wide one, or adds their product to it, as cuBLAS does in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Compute out = a @ b, or out += a @ b, accumulated and rounded in `out`'s type.

    Args:
        a: (M, K), of `out`'s dtype or, if that is float32, bfloat16 or float16.
        b: (K, N), of the same dtype as `a`.
        out: (M, N), is written.
        add: whether the product is added to `out`.
    """
    if a.is_meta:
        # nothing is computed, and torch 2.11 cannot say the result's shape of a sum of two types
        add = False
    elif not a.is_cuda:
        if a.dtype != out.dtype:
            # only cuBLAS multiplies narrow types into a wide one
            a, b = a.to(out.dtype), b.to(out.dtype)
        a, b = _without_gaps(a), _without_gaps(b)
    options: dict[str, Any] = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if add:
        torch.addmm(out, a, b, out=out, **options)
    else:
        torch.mm(a, b, out=out, **options)


def _without_gaps(x: Tensor) -> Tensor:
    """Return a matrix of 16 bits without gaps between its rows, as a copy where there are some; others as they are.

    On CPUs with AMX, oneDNN's bfloat16 product also reads the memory between the rows and multiplies it by zero, which
    gives NaN where that memory was never written (torch 2.13).
    """
    rows = x if x.stride(1) == 1 else x.T
    return x if x.dtype.itemsize != 2 or rows.is_contiguous() else x.contiguous()
