"""Merges the sequences of one group into one depth-first radix tree, in which each shared token occurs once.

A tree has S tokens, N sequences and L scored positions.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from silva.engine.data.trees.group import TokenGroup

Ints = NDArray[np.int32]


@dataclass(slots=True)
class Tree:
    """Holds one merged group; indices are relative to the tree's first token.

    Sequences keep the order of their group; the tokens of equal sequences are stored once, but each of them counts.
    The spans of a sequence are those of all its paths.

    Attributes:
        tokens: (S,) int32.
        position: (S,) int32, depth of the token.
        subtree_end: (S,) int32, one past the last token of the subtree under this token.
        source: (L,) int32, the token whose hidden state predicts the scored token.
        target: (L,) int32, the scored token's id.
        span: (L,) int32, rising; a span is a run of scored tokens that the same sequences run through.
        span_pointer: (N + 1,) int32, CSR over sequences into `span_index`.
        span_index: (span_pointer[-1],) int32, the spans of each sequence.
        last: (N,) int32, index of each sequence's last token, where a reward is read; a sequence of several paths,
            which has no reward, names the end of one of them.
        unrolled: tokens of all paths, each counted alone.
        scored: (N,) int32, scored tokens of each sequence.
    """

    tokens: Ints
    position: Ints
    subtree_end: Ints
    source: Ints
    target: Ints
    span: Ints
    span_pointer: Ints
    span_index: Ints
    last: Ints
    unrolled: int
    scored: Ints

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(slots=True)
class _Path:
    """Holds the current path through the tree as stretches of successive indices.

    A group's tokens already lie depth-first, so following the shared lengths from path to path gives every token's
    subtree and parent, without reading the tokens. Each stretch is opened and closed once, so the work is linear in
    the number of paths.

    Attributes:
        subtree_end: of every token, as in `Tree`; it is filled here.
        depth: at which each stretch begins.
        index: of the first token of each stretch.
        length: tokens on the path.
        borders: indices at which radix nodes begin.
    """

    subtree_end: Ints
    depth: list[int] = field(default_factory=list)
    index: list[int] = field(default_factory=list)
    length: int = 0
    borders: list[int] = field(default_factory=list)

    def at(self, depth: int) -> int:
        """Return the index of the token at a depth of the last stretch."""
        return self.index[-1] + depth - self.depth[-1]

    def leave(self, depth: int, end: int) -> None:
        """Cut the path to `depth` tokens; the subtrees of the tokens that are cut off end at index `end`."""
        while self.depth and self.depth[-1] >= depth:
            first = self.index[-1]
            self.subtree_end[first : self.at(self.length)] = end
            self.length = self.depth.pop()
            self.index.pop()
        # the branching point lies within a stretch
        if self.length > depth:
            first = self.at(depth)
            self.subtree_end[first : self.at(self.length)] = end
            self.borders.append(first)
            self.length = depth

    def extend(self, index: int, length: int) -> None:
        """Continue the path with new tokens from `index` on until it has `length` tokens."""
        self.depth.append(self.length)
        self.index.append(index)
        self.borders.append(index)
        self.length = length

    def ranges(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the tokens at depths [start, stop) as ranges of indices."""
        found = []
        k = bisect_right(self.depth, start) - 1
        while start < stop:
            end = min(stop, self.depth[k + 1]) if k + 1 < len(self.depth) else stop
            first = self.index[k] + start - self.depth[k]
            found.append((first, first + end - start))
            start, k = end, k + 1
        return found


def merge(group: TokenGroup) -> Tree:
    """Merge a group's paths token by token into one radix tree, laid out in the group's depth-first order.

    Two paths share a token if and only if all tokens up to it are equal. Whether a token is scored belongs to the
    path, not to the token: an action can be one sequence's response and part of another's history.
    """
    size = len(group.tokens)
    added = group.length - group.shared
    # index of the first token that each path adds
    begin = np.cumsum(added) - added
    index = np.arange(size, dtype=np.int32)
    parent = index - 1
    path = _Path(np.full(size, size, np.int32))
    last: list[int] = [0] * len(group)
    # of each sequence
    ranges_of: list[list[tuple[int, int]]] = [[] for _ in last]
    pointer, runs = group.run_pointer.tolist(), group.runs.tolist()
    for k, (start, shared, length, owner) in enumerate(
        zip(begin.tolist(), *(x.tolist() for x in (group.shared, group.length, group.owner)), strict=True)
    ):
        path.leave(shared, start)
        if length > shared:
            if path.depth:
                parent[start] = path.at(shared) - 1
            path.extend(start, length)
        last[owner] = path.at(length) - 1
        for run in runs[pointer[k] : pointer[k + 1]]:
            ranges_of[owner] += path.ranges(*run)

    scored_ranges = list(itertools.chain.from_iterable(ranges_of))
    counts = map(len, ranges_of)
    ranges = np.array(scored_ranges, np.int64).reshape(-1, 2)
    scored, starts = np.zeros((2, size + 1), bool)
    for part in scored_ranges:
        scored[slice(*part)] = True
    positions = np.flatnonzero(scored).astype(np.int32)
    starts[path.borders] = True
    starts[ranges] = True
    run = np.cumsum(starts)[positions]
    span = np.cumsum(np.diff(run, prepend=run[:1]) != 0, dtype=np.int32)
    # all tokens of a range are scored, so its spans are neighbours
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
