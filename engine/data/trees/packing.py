"""Packs trees into rows: each row is a `TreeBatch`, the data structure that the whole engine works on.

S is the row length; L scored positions, N sequences and P comparisons are those of one row.
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
    """Holds one packed row, in which token i sees token j if and only if `j <= i < subtree_end[j]`.

    Padding sees only itself.

    Attributes:
        tokens: (S,) int64.
        position: (S,) int32, depth of the token in its own tree, which is the RoPE position.
        subtree_end: (S,) int32, one past the last token of the subtree under this token.
        source: (L,) int32, index of the token whose hidden state predicts a scored token.
        target: (L,) int64, the scored token.
        span: (L,) int32, rising: the span that this position adds to.
        span_pointer: (N + 1,) int32, CSR over sequences into `span_index`.
        span_index: (span_pointer[-1],) int32, the spans whose log-probs sum to that of each sequence.
        last: (N,) int32, index of each sequence's last token, where a reward is read.
        scored: (N,) int32, scored tokens of each sequence.
        comparisons: (P, 2) int32, (chosen, rejected) sequences; -1 where that side is absent.
        absolute: (P,) bool, whether the comparison also gets the absolute-reward term L_DR.
        reference_logprob: (N,) float32, under the reference policy; empty for SFT and reward models.
        span_start: (spans + 1,) int32, the first position of each span.
        tree_start: (trees + 1, 3) int32, first span, sequence and comparison of each tree.
    """

    tokens: Tensor
    position: Tensor
    subtree_end: Tensor
    source: Tensor
    target: Tensor
    span: Tensor
    span_pointer: Tensor
    span_index: Tensor
    last: Tensor
    scored: Tensor
    comparisons: Tensor
    absolute: Tensor
    reference_logprob: Tensor
    span_start: Tensor
    tree_start: Tensor

    def to(self, device: torch.device) -> TreeBatch:
        """Copy the row to a device, as `to_device` does."""
        return TreeBatch(*(to_device(getattr(self, f.name), device) for f in fields(self)))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without waiting for the copy.

    The tensor is page-locked first, because a copy from other memory waits for all earlier work of the GPU.

    Args:
        x: on any device.
        device: where the copy lies.
    """
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


@dataclass(slots=True)
class Piece:
    """Holds a tree, or the part of one that a global batch has, with what is compared in it.

    Attributes:
        tree: the tree.
        sequence_ids: (N,) int64, the sequences' numbers in the data set.
        comparisons: (P, 2) int32, (chosen, rejected) indices of the tree's sequences; -1 where that side is absent.
        absolute: (P,) bool, whether the comparison also gets L_DR.
    """

    tree: Tree
    sequence_ids: NDArray[np.int64]
    comparisons: NDArray[np.int32]
    absolute: NDArray[np.bool_]


def pack_row(
    pieces: Sequence[Piece],
    *,
    multiple: int,
    pad_id: int,
    reference_logprob: NDArray[np.float32] | None = None,
) -> TreeBatch:
    """Put pieces one after the other and pad the row to a multiple of `multiple` tokens.

    Args:
        pieces: may be empty; the row is then only padding, with no scored position and no sequence.
        multiple: the row length is rounded up to a multiple of it, and is never zero.
        pad_id: the token of the padding.
        reference_logprob: (sequences of the data set,) float32, looked up by `sequence_ids`; None leaves the row's
            reference log-probs empty.
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
    """Pack each row with `pack_row`.

    Args:
        rows: pieces of each row.
        multiple: as in `pack_row`.
        pad_id: as in `pack_row`.
        reference_logprob: as in `pack_row`.
    """
    return [
        pack_row(pieces, multiple=multiple, pad_id=pad_id, reference_logprob=reference_logprob)
        for pieces in rows
    ]
