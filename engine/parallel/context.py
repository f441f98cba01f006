"""Context parallelism: a row's tokens dealt to several processes, which gather keys and values for attention.

Each process computes its own tokens, attends from them to the keys and values of the whole row, and adds its own
positions to what the head gives. Losses are then computed by all of them alike; parameter gradients are partial and
summed together with those of data parallelism.

S tokens of the row, s of them here; H_kv key heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from silva.engine.data.trees.row_share import RowShare

# torch 2.13 renamed both and warns of the old names; older ones know only those
_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def whole_row(key: Tensor, value: Tensor, share: RowShare, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Keys and values (s, H_kv, D) of this process -> (S, H_kv, D) of the row, in its order.

    One collective for both, forward (all-gather) and backward (reduce-scatter).
    """
    both: tuple[Tensor, Tensor] = _WholeRow.apply(key, value, share.dealt, share.place, group)
    return both


def every_position(own: Tensor, where: Tensor, size: int, group: ProcessGroup) -> Tensor:
    """Values (l,) of this process's positions `where` (l,) among `size` -> (size,), the same on every process.

    Every process computes the same loss from the result, so each gives its own positions the whole gradient.
    """
    out: Tensor = _EveryPosition.apply(own, where, size, group)
    return out


class _WholeRow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, dealt: Tensor, place: Tensor, group: ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(dealt)
        ctx.group, ctx.own = group, key.shape[0]
        parts = torch.cat([key, value], -1)
        gathered = parts.new_empty(dealt.shape[0], *parts.shape[1:])
        _gather(gathered, parts, group=group)
        row = gathered[place]
        size = key.shape[-1]
        return row[..., :size], row[..., size:]

    @staticmethod
    def backward(ctx: Any, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        (dealt,) = ctx.saved_tensors
        grad = torch.cat([grad_key, grad_value], -1)[dealt]
        own = grad.new_empty(ctx.own, *grad.shape[1:])
        _reduce_scatter(own, grad, group=ctx.group)
        size = grad_key.shape[-1]
        return own[..., :size], own[..., size:], None, None, None


class _EveryPosition(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, where: Tensor, size: int, group: ProcessGroup) -> Tensor:
        ctx.save_for_backward(where)
        out = own.new_zeros(size)
        out[where] = own
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (where,) = ctx.saved_tensors
        return grad[where], None, None, None
