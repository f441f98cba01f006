"""Shares a packed row among context-parallel processes in blocks of tokens, so that all have equal attention work.

What a token costs in attention is the number of its ancestors. The zigzag order of causal sequences (first block with
last) does not balance this on trees, so blocks are dealt by weight: every process gets the same number of tokens,
which decides the cost of all other layers, and nearly the same number of (token, ancestor) pairs.

A row has S tokens, L scored positions and N sequences. R processes have s = S / R tokens each; l and n are the scored
positions and sequences of one process.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from silva.engine.data.trees.packing import TreeBatch, to_device

# tokens of a block, as many as the attention kernels' largest tile has query rows
LARGEST_BLOCK = 128


@dataclass(slots=True)
class RowShare:
    """Holds what one of R processes computes of a row, and how the parts are put together.

    Attributes:
        index: (s,) int32, rising: the process's tokens in the row.
        dealt: (S,) int64, the tokens of all processes' shares, one share after the other.
        place: (S,) int64, where each token of the row is in `dealt`, the inverse of `dealt`.
        source: (l,) int32, sources of the scored positions whose source the process holds, as indices into `index`.
        scored: (l,) int64, the same positions among the row's L.
        last: (n,) int32, last tokens of the sequences whose last token the process holds, as indices into `index`.
        ended: (n,) int64, the same sequences among the row's N.
    """

    index: Tensor
    dealt: Tensor
    place: Tensor
    source: Tensor
    scored: Tensor
    last: Tensor
    ended: Tensor

    def to(self, device: torch.device) -> RowShare:
        """Copy the share to a device, as `to_device` does."""
        return RowShare(*(to_device(getattr(self, f.name), device) for f in fields(self)))


def share_of(row: TreeBatch, rank: int, ranks: int, *, window: int | None = None) -> RowShare:
    """Compute the share of one process; all processes find the same shares for the same row.

    Args:
        row: on the CPU.
        rank: of the process among the context-parallel processes.
        ranks: R, by which the row's length can be divided.
        window: how many tokens a token sees at most, itself included; None for no limit.

    Raises:
        ValueError: the row cannot be split into `ranks` equal parts.
    """
    dealt = deal(row.position.numpy(), ranks, window=window)
    index = dealt[rank]
    whole = dealt.reshape(-1)
    place = np.empty_like(whole)
    place[whole] = np.arange(len(whole))
    own = np.full(len(whole), -1)
    own[index] = np.arange(len(index))

    def held(tokens: Tensor) -> tuple[Tensor, Tensor]:
        where = own[tokens.numpy()]
        chosen = np.flatnonzero(where >= 0)
        return torch.from_numpy(where[chosen].astype(np.int32)), torch.from_numpy(chosen)

    source, scored = held(row.source)
    last, ended = held(row.last)
    return RowShare(
        index=torch.from_numpy(index.astype(np.int32)),
        dealt=torch.from_numpy(whole),
        place=torch.from_numpy(place),
        source=source,
        scored=scored,
        last=last,
        ended=ended,
    )


def deal(position: NDArray[np.int32], ranks: int, *, window: int | None = None) -> NDArray[np.int64]:
    """Deal a row's tokens in blocks: the heaviest first, each to the process that has the least and is not full.

    Args:
        position: (S,) int32, depth of each token, which sees `position + 1` tokens.
        ranks: R, by which S can be divided.
        window: how many tokens a token sees at most, itself included; None for no limit.

    Returns:
        (R, S / R) int64, the tokens of each process, rising.

    Raises:
        ValueError: S is no multiple of `ranks`.
    """
    size = len(position)
    if size % ranks:
        raise ValueError(
            f"a row of {size} tokens cannot be divided among {ranks} context-parallel processes: pad rows to a "
            "multiple of it"
        )
    each = size // ranks
    # the largest power of two that divides a share, up to the largest block
    block = min(LARGEST_BLOCK, each & -each)
    seen = position.astype(np.int64) + 1
    if window is not None:
        seen = np.minimum(seen, window)
    work = seen.reshape(-1, block).sum(1)
    shares: list[list[int]] = [[] for _ in range(ranks)]
    least = [(0, rank) for rank in range(ranks)]
    for number in np.argsort(-work, kind="stable").tolist():
        load, rank = heapq.heappop(least)
        shares[rank].append(number)
        if len(shares[rank]) < each // block:
            heapq.heappush(least, (load + int(work[number]), rank))
    blocks = np.sort(np.array(shares, np.int64), axis=1)
    return (blocks[:, :, None] * block + np.arange(block)).reshape(ranks, each)
