"""One context-parallel process's share of a packed row: blocks of tokens, dealt so that all have equal attention work.

What a token costs in attention is the number of its ancestors. The zigzag of causal sequences (first with last) does
not even that out on trees, so blocks are dealt by weight: every process gets equally many tokens, which is what all
other layers cost by, and nearly equally many (token, ancestor) pairs.

S tokens of the row, L scored positions, N sequences, R processes; s = S / R.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from silva.engine.data.trees.packing import TreeBatch, to_device

LARGEST_BLOCK = 128  # tokens: as many query rows as the attention kernels' largest tile has


@dataclass(slots=True)
class RowShare:
    """What one of R processes computes of a row, and how the parts are put together."""

    index: Tensor  # (s,) int32, rising: its tokens in the row
    dealt: Tensor  # (S,) int64: the tokens of all processes' shares, one behind the other
    place: Tensor  # (S,) int64: where each token of the row is found there, the inverse of `dealt`
    source: Tensor  # (l,) int32: the scored positions whose source it holds, as indices into `index`
    scored: Tensor  # (l,) int64: the same positions among the row's L
    last: Tensor  # (n,) int32: the sequences whose last token it holds, that token as an index into `index`
    ended: Tensor  # (n,) int64: the same sequences among the row's N

    def to(self, device: torch.device) -> RowShare:
        return RowShare(*(to_device(getattr(self, f.name), device) for f in fields(self)))


def share_of(row: TreeBatch, rank: int, ranks: int, *, window: int | None = None) -> RowShare:
    """The share of process `rank` of `ranks`; the same row gives every process the same dealing.

    Args:
        row: on the CPU, its length a multiple of `ranks`.
        window: of the attention: a token sees at most so many ancestors.

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
    """Deal a row's tokens in blocks: the heaviest first, each to the process that has least and is not full.

    Args:
        position: (S,) depth of each token, so that it sees `position + 1` tokens.
        ranks: R, by which S can be divided.

    Returns:
        (R, S / R) the tokens of each process, rising.

    Raises:
        ValueError: S is no multiple of `ranks`.
    """
    size = len(position)
    if size % ranks:
        raise ValueError(
            f"a row of {size} tokens cannot be dealt to {ranks} context-parallel processes: pack rows to a "
            "multiple of it"
        )
    each = size // ranks
    block = min(LARGEST_BLOCK, each & -each)  # the largest power of two that divides a share
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
