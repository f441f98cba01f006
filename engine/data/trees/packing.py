"""From trees to rows: `TreeBatch`, the one data structure of the engine.

S row length, L scored positions, N sequences, P comparisons of one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from silva.engine.data.trees.group import ABSENT
from silva.engine.data.trees.tree import Tree


@dataclass(slots=True)
class TreeBatch:
    """One packed row. Token i sees token j iff `j <= i < subtree_end[j]`; padding sees only itself."""

    tokens: Tensor  # (S,) int64
    position: Tensor  # (S,) int32, depth of the token in its own tree: the RoPE position
    subtree_end: Tensor  # (S,) int32, one past the last token of the subtree that hangs under this token
    source: Tensor  # (L,) int32, index of the token whose hidden state predicts a scored token
    target: Tensor  # (L,) int64, the scored token
    span: Tensor  # (L,) int32, rising: the span this position adds to
    span_pointer: Tensor  # (N + 1,) int32, with span_index: the spans whose log-probs sum to each sequence's
    span_index: Tensor  # (span_pointer[-1],) int32
    last: Tensor  # (N,) int32, index of each sequence's last token: where a reward is read
    scored: Tensor  # (N,) int32, scored tokens of each sequence
    comparisons: Tensor  # (P, 2) int32, (chosen, rejected) sequences; -1: that side is absent
    absolute: Tensor  # (P,) bool, whether the comparison also gets the absolute-reward term L_DR
    reference_logprob: Tensor  # (N,) float32 under the reference policy; empty for SFT and reward models
    span_start: Tensor  # (spans + 1,) int32, the first position of each span
    tree_start: Tensor  # (trees + 1, 3) int32, first span, sequence and comparison of each tree

    def to(self, device: torch.device) -> TreeBatch:
        return TreeBatch(*(to_device(getattr(self, f.name), device) for f in fields(self)))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Without waiting: a copy from memory that is not page-locked waits for all that the GPU was given before it."""
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


@dataclass(slots=True)
class Piece:
    """A tree, or the part of one that a global batch holds, with what is compared in it."""

    tree: Tree
    sequence_ids: NDArray[np.int64]  # (N,) the sequences' numbers in the data set
    comparisons: NDArray[np.int32]  # (P, 2) indices into the tree's sequences, -1: absent
    absolute: NDArray[np.bool_]  # (P,)


def pack_row(
    pieces: Sequence[Piece],
    *,
    multiple: int,
    pad_id: int,
    reference_logprob: NDArray[np.float32] | None = None,
) -> TreeBatch:
    """Lay pieces one behind the other and pad the row to a multiple of `multiple` tokens.

    Args:
        pieces: may be empty: the row is then padding alone, with no scored position and no sequence.
        multiple: the row length becomes the next multiple of it, at least one.
        pad_id: the token of the padding.
        reference_logprob: (sequences of the data set,) looked up by `sequence_ids`.
    """
    trees = [piece.tree for piece in pieces]
    length = sum(map(len, trees))
    size = max(1, -(-length // multiple)) * multiple
    padding = np.arange(length, size)

    def joined(parts: list[NDArray], offsets: list[int] | None = None) -> NDArray:
        if offsets is not None:
            parts = [part + offset for part, offset in zip(parts, offsets, strict=True)]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def starts(lengths: list[int]) -> list[int]:
        return [0, *np.cumsum(lengths)[:-1].tolist()] if lengths else []

    token_start = starts([len(t) for t in trees])
    sequence_start = starts([len(t.last) for t in trees])
    spans = [int(t.span[-1]) + 1 if len(t.span) else 0 for t in trees]
    span_start = starts(spans)
    entry_start = starts([len(t.span_index) for t in trees])
    compared = [
        np.where(p.comparisons == ABSENT, ABSENT, p.comparisons + start)
        for p, start in zip(pieces, sequence_start, strict=True)
    ]
    counts = [(u, len(p.tree.last), len(p.comparisons)) for u, p in zip(spans, pieces, strict=True)]
    span = joined([t.span for t in trees], span_start)
    ids = joined([p.sequence_ids for p in pieces])
    reference = np.zeros(0, np.float32) if reference_logprob is None else reference_logprob[ids]

    def int32(array: NDArray) -> Tensor:
        return torch.from_numpy(array.astype(np.int32))

    return TreeBatch(
        tokens=torch.from_numpy(joined([*(t.tokens for t in trees), np.full(len(padding), pad_id)])),
        position=int32(joined([*(t.position for t in trees), np.zeros(len(padding))])),
        subtree_end=int32(np.append(joined([t.subtree_end for t in trees], token_start), padding + 1)),
        source=int32(joined([t.source for t in trees], token_start)),
        target=torch.from_numpy(joined([t.target for t in trees])),
        span=int32(span),
        span_pointer=int32(np.append(0, joined([t.span_pointer[1:] for t in trees], entry_start))),
        span_index=int32(joined([t.span_index for t in trees], span_start)),
        last=int32(joined([t.last for t in trees], token_start)),
        scored=int32(joined([t.scored for t in trees])),
        comparisons=int32(np.concatenate([np.zeros((0, 2)), *compared])),
        absolute=torch.from_numpy(np.concatenate([np.zeros(0, bool), *(p.absolute for p in pieces)])),
        reference_logprob=torch.from_numpy(reference.astype(np.float32)),
        span_start=int32(np.searchsorted(span, np.arange(sum(spans) + 1))),
        tree_start=int32(np.cumsum([(0, 0, 0), *counts], axis=0)),
    )


def pack_rows(
    rows: Sequence[Sequence[Piece]],
    *,
    multiple: int,
    pad_id: int,
    reference_logprob: NDArray[np.float32] | None = None,
) -> list[TreeBatch]:
    """Pack each row with `pack_row`."""
    return [
        pack_row(pieces, multiple=multiple, pad_id=pad_id, reference_logprob=reference_logprob)
        for pieces in rows
    ]
