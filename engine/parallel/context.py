"""Implements context parallelism: several processes share a row's tokens, and gather keys and values for attention.

Each process computes its own tokens, attends from them to the keys and values of the whole row, and adds its own
positions to what the head gives. All of the processes then compute the same losses; their parameter gradients are
partial, and are summed together with those of data parallelism.

A row has S tokens, of which this process has s. H_kv is the number of key heads, D the head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from silva.engine.data.trees.row_share import RowShare

# torch 2.13 renamed both functions and warns about the old names; older releases know only the old names
_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def whole_row(key: Tensor, value: Tensor, share: RowShare, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Gather the keys and values of the whole row, in the row's order.

    Keys and values are sent in one collective, forward (all-gather) and backward (reduce-scatter).

    Args:
        key: (s, H_kv, D), of this process's tokens.
        value: (s, H_kv, D), of this process's tokens.
        share: which tokens these are.
        group: the context-parallel processes.

    Returns:
        Keys and values, each (S, H_kv, D).
    """
    both: tuple[Tensor, Tensor] = _WholeRow.apply(key, value, share.dealt, share.place, group)
    return both


def every_position(own: Tensor, where: Tensor, size: int, group: ProcessGroup) -> Tensor:
    """Gather the values of all processes' positions.

    The call is collective. Every process computes the same loss from the result, so each gives its own positions the
    whole gradient.

    Args:
        own: (l,) values of this process's positions.
        where: (l,) int64, these positions among `size`.
        size: number of positions of all processes.
        group: the context-parallel processes.

    Returns:
        (size,) values, the same on every process.
    """
    out: Tensor = _EveryPosition.apply(own, where, size, group)
    return out


class _WholeRow(torch.autograd.Function):
    """Computes `whole_row` and its gradient."""

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
    """Computes `every_position` and its gradient."""

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
