"""Radix merge: the sequences of one group become one depth-first tree in which a shared token stands once.

S tokens of the tree, N sequences, L scored positions.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from silva.engine.data.trees.group import TokenGroup

Ints = NDArray[np.int32]


@dataclass(slots=True)
class Tree:
    """One merged group; indices are relative to the tree's first token.

    Sequences keep the order of their group; equal sequences are stored once and still count each.
    """

    tokens: Ints  # (S,)
    position: Ints  # (S,) depth of the token
    subtree_end: Ints  # (S,) one past the last token of the subtree under this token
    source: Ints  # (L,) the token whose hidden state predicts the scored token
    target: Ints  # (L,) the scored token's id
    span: Ints  # (L,) rising; a span is a run of scored tokens that the same sequences run through
    span_pointer: Ints  # (N + 1,) CSR over sequences
    span_index: Ints  # (span_pointer[-1],)
    last: Ints  # (N,) index of each sequence's last token
    unrolled: int  # tokens of all sequences, each alone
    scored: Ints  # (N,) scored tokens of each sequence

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(slots=True)
class _Path:
    """The current sequence's way through the tree: stretches of neighbouring indices, found without its tokens.

    A group's tokens already lie depth-first, so following the shared lengths from sequence to sequence gives
    every token's subtree and parent. Each stretch is opened and closed once: the work is linear in sequences.
    """

    subtree_end: Ints
    depth: list[int] = field(default_factory=list)  # at which each stretch begins
    index: list[int] = field(default_factory=list)  # of its first token
    length: int = 0  # tokens on the path
    # indices at which a radix node or a run of scoring begins
    borders: list[int] = field(default_factory=list)

    def at(self, depth: int) -> int:
        """Index of the token at a depth of the last stretch."""
        return self.index[-1] + depth - self.depth[-1]

    def leave(self, depth: int, end: int) -> None:
        """Cut the path to `depth` tokens; the subtrees of those behind it end at `end`."""
        while self.depth and self.depth[-1] >= depth:
            first = self.index[-1]
            self.subtree_end[first : self.at(self.length)] = end
            self.length = self.depth.pop()
            self.index.pop()
        if self.length > depth:  # the branching point lies within a stretch
            first = self.at(depth)
            self.subtree_end[first : self.at(self.length)] = end
            self.borders.append(first)
            self.length = depth

    def extend(self, index: int, length: int) -> None:
        """Go on with new tokens from `index` until the path has `length`."""
        self.depth.append(self.length)
        self.index.append(index)
        self.borders.append(index)
        self.length = length

    def ranges(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The tokens at depths [start, stop) as ranges of indices."""
        found = []
        k = bisect_right(self.depth, start) - 1
        while start < stop:
            end = min(stop, self.depth[k + 1]) if k + 1 < len(self.depth) else stop
            first = self.index[k] + start - self.depth[k]
            found.append((first, first + end - start))
            start, k = end, k + 1
        return found


def merge(group: TokenGroup) -> Tree:
    """Merge a group's sequences token by token into one radix tree, laid out in the group's depth-first order.

    Two sequences share a token iff all tokens up to it are equal. Whether a token is scored belongs to the
    sequence, not to the token: an action can be one sequence's response and another's history.
    """
    size = len(group.tokens)
    added = group.length - group.shared
    begin = np.cumsum(added) - added  # index of the first token each sequence adds
    index = np.arange(size, dtype=np.int32)
    parent = index - 1
    path = _Path(np.full(size, size, np.int32))
    last, scored_ranges, counts = [], [], []
    pointer, runs = group.run_pointer.tolist(), group.runs.tolist()
    for k, (start, shared, length) in enumerate(
        zip(begin.tolist(), group.shared.tolist(), group.length.tolist(), strict=True)
    ):
        path.leave(shared, start)
        if length > shared:
            if path.depth:
                parent[start] = path.at(shared) - 1
            path.extend(start, length)
        last.append(path.at(length) - 1)
        own = [part for run in runs[pointer[k] : pointer[k + 1]] for part in path.ranges(*run)]
        scored_ranges += own
        counts.append(len(own))

    ranges = np.array(scored_ranges, np.int64).reshape(-1, 2)
    scored, starts = np.zeros((2, size + 1), bool)
    for part in scored_ranges:
        scored[slice(*part)] = True
    positions = np.flatnonzero(scored).astype(np.int32)
    starts[path.borders] = True
    starts[ranges] = True
    run = np.cumsum(starts)[positions]
    span = np.cumsum(np.diff(run, prepend=run[:1]) != 0, dtype=np.int32)
    # a range is scored throughout, so its spans are neighbours
    first, final = (span[np.searchsorted(positions, edge)] for edge in (ranges[:, 0], ranges[:, 1] - 1))
    spans = final - first + 1
    before = np.cumsum(spans) - spans
    pointers = np.append(0, np.cumsum(spans))[np.cumsum([0, *counts])]
    return Tree(
        tokens=group.tokens,
        position=index - np.repeat(begin - group.shared, added).astype(np.int32),
        subtree_end=path.subtree_end,
        source=parent[positions],
        target=group.tokens[positions],
        span=span,
        span_pointer=pointers.astype(np.int32),
        span_index=(np.arange(spans.sum()) + np.repeat(first - before, spans)).astype(np.int32),
        last=np.array(last, np.int32),
        unrolled=int(group.length.sum()),
        scored=group.scored,
    )
