"""Cuts a tree that is too long or too costly for one row into parts that repeat as few tokens as possible."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from silva.engine.data.trees.group import TokenGroup

# tokens and visible pairs of a tree
Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Part:
    """Holds some units of one tree that lie in one row; a unit is a sequence, or a comparison with its sequences.

    Sizes and cuts depend on the paths of the units alone; a sequence has mostly one (see `TokenGroup`).

    Attributes:
        group: the tree.
        ids: (N,) int64, numbers of the group's sequences in the data set.
        needs: paths of each unit.
        compared: the comparison of each unit; empty where units are sequences.
        tokens: of the tree of these units.
        pairs: visible pairs of the tree of these units; a pair is a token with itself or an ancestor.
    """

    group: TokenGroup
    ids: NDArray[np.int64]
    needs: list[list[int]]
    compared: list[int]
    tokens: int
    pairs: int

    @classmethod
    def whole(
        cls, group: TokenGroup, ids: NDArray[np.int64], needs: list[list[int]], compared: Sequence[int] = ()
    ) -> Part:
        """Make one part of all given units.

        Args:
            group: the tree.
            ids: (N,) int64, numbers of the group's sequences in the data set.
            needs: paths of each unit.
            compared: the comparison of each unit; empty where units are sequences.
        """
        return cls(group, ids, needs, list(compared), *group.merged_size(_members(needs)))

    @property
    def members(self) -> NDArray[np.int64]:
        """Return the paths of the part, rising."""
        return _members(self.needs)

    @property
    def sequences(self) -> NDArray[np.int64]:
        """Return the sequences of the part, rising."""
        return np.unique(self.group.owner[self.members]).astype(np.int64)

    def cut(self, fits: Callable[[Size], bool]) -> list[Part]:
        """Cut the part into parts that fit and have few tokens in total.

        Units are put in order by the places of their paths, and dynamic programming finds, among all ways to cut
        between neighbours, one with the fewest tokens. Several such orders are tried and the best result is taken,
        because it depends on the data which paths most comparisons share.

        **Bound.** Let U be the number of tokens of the whole, A that of its largest unit, and D the most tokens that
        the units before a place and those behind it share (for single paths: the longest common prefix of two
        neighbours). Under a limit of R tokens, R > A + D, fewer than U D / (R - A - D) tokens are repeated.
        Proof: fill parts one after the other, and begin a new one when the next unit does not fit. A part that is
        followed by another has more than R - A tokens, of which at most D are in earlier parts, so more than
        R - A - D are new. The new tokens of all parts sum to U, so fewer than U / (R - A - D) parts are followed
        by another, and each of these leads to one repetition of at most D tokens. The best cut repeats no more
        than this one.

        Args:
            fits: whether a part may have some size; if it is false for a size, it is false for every larger one.
                A single unit is a part even if it does not fit.
        """
        ways = (self._cut(order, fits) for order in self._orders())
        return min(ways, key=lambda parts: sum(part.tokens for part in parts))

    def halves(self) -> Iterator[tuple[Part, Part]]:
        """Yield the ways to cut the part in two, between neighbours in the orders that `cut` tries."""
        if len(self.needs) < 2:
            return
        for order in self._orders():
            before, behind = list(self._growing(order)), list(self._growing(order[::-1]))[::-1]
            for place in range(1, len(order)):
                yield self._of(order[:place], before[place - 1]), self._of(order[place:], behind[place])

    def _orders(self) -> list[tuple[int, ...]]:
        rules: list[Callable[[int], list[int]]] = [
            lambda unit: sorted(self.needs[unit]),
            lambda unit: sorted(self.needs[unit], reverse=True),
            lambda unit: self.needs[unit],
            lambda unit: self.needs[unit][::-1],
        ]
        orders = (tuple(sorted(range(len(self.needs)), key=rule)) for rule in rules)
        # each order once
        return list(dict.fromkeys(orders))

    def _cut(self, order: Sequence[int], fits: Callable[[Size], bool]) -> list[Part]:
        """Return the parts of neighbouring units that have the fewest tokens in total."""
        count = len(order)
        # from each place on: tokens, parts, end of the first part
        best = [(0, 0, count)] * (count + 1)
        sizes: list[list[Size]] = [[] for _ in order]
        for first in reversed(range(count)):
            ways: list[tuple[int, int, int]] = []
            for last, size in enumerate(self._growing(order[first:]), first + 1):
                if ways and not fits(size):
                    break
                sizes[first].append(size)
                ways.append((size[0] + best[last][0], 1 + best[last][1], last))
            best[first] = min(ways)
        parts, first = [], 0
        while first < count:
            last = best[first][2]
            parts.append(self._of(order[first:last], sizes[first][last - first - 1]))
            first = last
        return parts

    def _of(self, units: Sequence[int], size: Size) -> Part:
        needs = [self.needs[unit] for unit in sorted(units)]
        compared = [self.compared[unit] for unit in sorted(units)] if self.compared else []
        return Part(self.group, self.ids, needs, compared, *size)

    def _growing(self, units: Iterable[int]) -> Iterator[Size]:
        """Yield the sizes of the trees of the first unit, of the first two, and so on."""
        length, shared = self.group.length.tolist(), self.group.shared.tolist()
        held: list[int] = []
        tokens = pairs = 0
        for unit in units:
            for path in self.needs[unit]:
                place = bisect_left(held, path)
                if place < len(held) and held[place] == path:
                    continue
                # the tree already holds what this path shares with its nearest neighbours in the tree
                common = min(shared[held[place - 1] + 1 : path + 1]) if place else 0
                if place < len(held):
                    common = max(common, min(shared[path + 1 : held[place] + 1]))
                held.insert(place, path)
                tokens += length[path] - common
                pairs += (length[path] * (length[path] + 1) - common * (common + 1)) // 2
            yield tokens, pairs


def _members(needs: Iterable[Iterable[int]]) -> NDArray[np.int64]:
    return np.array(sorted({path for need in needs for path in need}), np.int64)
