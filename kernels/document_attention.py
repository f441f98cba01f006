"""Computes attention over rows of plain documents by FlashAttention, where a user has it and asks for it.

    S tokens, H query heads, H_kv key heads, D head size

Variable-length FlashAttention is made for rows without branches, and on Hopper its third generation is the fastest
there is. It cannot take rows with a branching tree; `documents` tells the two kinds apart, on the host.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# FlashAttention 3, then 2; the first package that is installed is used
MODULES = ("flash_attn_interface", "flash_attn")


class Documents(NamedTuple):
    """Holds where the documents of a row begin and end.

    Attributes:
        starts: (documents + 1,) int32, the first token of each document; the last entry is S.
        longest: tokens of the longest document.
    """

    starts: Tensor
    longest: int


def documents(subtree_end: Tensor, used: int) -> Documents | None:
    """Find the documents of a row.

    Args:
        subtree_end: (S,) int, on the CPU.
        used: tokens from here on are padding, and become one document together.

    Returns:
        The documents; None if a tree in the row branches.
    """
    end = subtree_end.numpy()[:used].astype(np.int64)
    first = np.flatnonzero(np.append(True, end[1:] != end[:-1])) if used else np.zeros(0, np.int64)
    # a document is a run of tokens with the same end, and the next run begins at that end
    if not np.array_equal(end[first], np.append(first[1:], used)[: len(first)]):
        return None
    size = len(subtree_end)
    starts = np.append(first, [used, size] if used < size else [size])
    return Documents(torch.from_numpy(starts.astype(np.int32)), int(np.diff(starts).max(initial=0)))


def installed() -> str | None:
    """Return the name of the module that is used; None if none is installed."""
    return next((name for name in MODULES if importlib.util.find_spec(name) is not None), None)


def document_attention(
    q: Tensor, k: Tensor, v: Tensor, row: Documents, *, window: int | None = None
) -> Tensor:
    """Compute causal attention within each document: the same numbers as `tree_attention` over the same row.

    Args:
        q: (S, H, D), bfloat16 or float16 on a GPU.
        k: (S, H_kv, D), of the same dtype and device.
        v: (S, H_kv, D), of the same dtype and device.
        row: of `documents`.
        window: a token sees itself and at most `window - 1` tokens before it.

    Returns:
        (S, H, D). Gradients are the same bits every time.

    Raises:
        ImportError: no FlashAttention is installed, or one without a deterministic gradient.
    """
    limits: dict[str, Any] = {"cu_seqlens_q": row.starts, "cu_seqlens_k": row.starts}
    limits |= {"max_seqlen_q": row.longest, "max_seqlen_k": row.longest}
    if window is not None:
        limits["window_size"] = (window - 1, 0)
    out = _function()(q, k, v, **limits, causal=True, deterministic=True)
    # some releases also return the log-sum-exp
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


@functools.cache
def _function() -> Callable[..., Any]:
    name = installed()
    if name is None:
        raise ImportError(f"document_attention: none of {', '.join(MODULES)} is installed")
    found: Callable[..., Any] = importlib.import_module(name).flash_attn_varlen_func
    if "deterministic" not in inspect.signature(found).parameters:
        raise ImportError(f"document_attention: {name} is too old, it has no deterministic gradient")
    return found
