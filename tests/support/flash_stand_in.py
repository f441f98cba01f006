"""FlashAttention's meaning in plain torch, in the place of a package that needs a GPU."""

from __future__ import annotations

import math
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch

from silva.kernels import document_attention

calls: list[int] = []


def flash_attn_varlen_func(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int, max_seqlen_k: int,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), deterministic: bool = False,
) -> torch.Tensor:  # fmt: skip
    """FlashAttention's meaning, in plain torch: neither it nor a GPU is here."""
    assert causal
    assert deterministic
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    calls.append(len(cu_seqlens_q) - 1)
    group, parts = q.shape[1] // k.shape[1], []
    for a, b in zip(cu_seqlens_q.tolist(), cu_seqlens_q[1:].tolist(), strict=False):
        keys, values = (x[a:b].repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q[a:b], keys) / math.sqrt(q.shape[2])
        far = torch.arange(b - a)[:, None] - torch.arange(b - a)
        seen = (far >= 0) & ((far <= window_size[0]) | (window_size[0] < 0))
        parts.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -math.inf).softmax(-1), values))
    return torch.cat(parts)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the module `flash_attn`."""
    module: Any = ModuleType("flash_attn")
    module.__spec__, module.flash_attn_varlen_func = ModuleSpec("flash_attn", None), flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    document_attention._function.cache_clear()
    calls.clear()
