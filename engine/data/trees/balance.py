"""Spreads the rows of one global batch over data-parallel ranks so that the slowest is little slower than the mean.

A row is one micro-batch. Ranks work through their rows in parallel and then wait for each other, so the largest sum of
costs on one rank decides. Every function is deterministic, so all ranks make the same plan without communication.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from silva.engine.data.trees.splitting import Part, Size

# balancing ends when the slowest rank's cost exceeds the mean by at most this fraction
TOLERANCE = 0.01
# steps of the bisection of the cost above which trees are cut
PROBES = 6


@dataclass(frozen=True, slots=True)
class CostModel:
    """Computes what a tree costs from its tokens and its visible pairs (of a token and itself or an ancestor of it).

    Attention tiles need no term of their own: a tree's tiles cover its pairs and, along their edges, a number of
    places that grows with its tokens.

    Attributes:
        token: cost of one token.
        pair: cost of one visible pair.
    """

    token: float
    pair: float

    def __call__(self, tokens: int, pairs: int) -> float:
        """Return the cost of a tree that has these numbers of tokens and visible pairs."""
        return self.token * tokens + self.pair * pairs


BY_TOKENS = CostModel(token=1.0, pair=0.0)


def spread(
    parts: Sequence[Part], cost: CostModel, *, ranks: int, row_length: int, multiple: int = 1
) -> list[list[list[Part]]]:
    """Put parts of trees into rows, equally many on every rank, so that the ranks' costs are nearly equal.

    The number of rows is the least that was found to hold the parts; rows that are not needed stay empty. Where whole
    trees leave the costs uneven, trees are cut further: that repeats tokens, but moves work to ranks that would wait.
    The cost up to which a tree stays uncut is bisected, as MULTIFIT does with the size of bins (Coffman, Garey,
    Johnson 1978).

    Args:
        parts: of the global batch.
        cost: of a tree.
        ranks: number of data-parallel ranks.
        row_length: most tokens of a row.
        multiple: the number of rows per rank is a multiple of it.

    Returns:
        The parts of each row of each rank: rank -> row -> parts.

    Raises:
        ValueError: a single unit is longer than a row.
    """

    def cut(limit: float) -> list[Part]:
        def fits(size: Size) -> bool:
            return size[0] <= row_length and cost(*size) <= limit

        found = []
        for part in parts:
            found += [part] if fits((part.tokens, part.pairs)) else part.cut(fits)
        return found

    items = cut(math.inf)
    longest = max((item.tokens for item in items), default=0)
    if longest > row_length:
        raise ValueError(f"a unit of {longest} tokens does not fit a row of {row_length}")
    rows = max(1, -(-sum(item.tokens for item in items) // (ranks * row_length * multiple))) * multiple
    while (plan := _arrange(items, cost, ranks, rows, row_length)) is None:
        rows += multiple
    low, high = sum(plan.loads) / ranks, max(plan.loads)
    for _ in range(PROBES):
        if max(plan.loads) <= (1 + TOLERANCE) * low:
            break
        limit = (low + high) / 2
        other = _arrange(cut(limit), cost, ranks, rows, row_length)
        reached = other is not None and max(other.loads) <= (1 + TOLERANCE) * limit
        low, high = (low, limit) if reached else (limit, high)
        if other is not None and max(other.loads) < max(plan.loads):
            plan = other
    return plan.by_rank()


def _arrange(parts: list[Part], cost: CostModel, ranks: int, rows: int, row_length: int) -> _Table | None:
    """Put the parts into rows and balance the ranks; return None if the rows do not hold all parts."""
    tokens = [part.tokens for part in parts]
    costs = [cost(part.tokens, part.pairs) for part in parts]
    row = _by_cost(tokens, costs, ranks, rows, row_length)
    if row is None:
        row = _by_length(tokens, costs, ranks, rows, row_length)
    if row is None:
        return None
    table = _Table(parts, row, cost, ranks, rows, row_length)
    table.improve()
    return table


def _by_cost(
    tokens: list[int], costs: list[float], ranks: int, rows: int, row_length: int
) -> list[int] | None:
    """Place items by longest processing time first (Graham 1969): the costliest item goes to the least loaded rank.

    Within the rank it goes to the emptiest row, which keeps micro-batches of similar size.

    Args:
        tokens: of each item.
        costs: of each item.
        ranks: number of ranks.
        rows: number of rows per rank.
        row_length: most tokens of a row.

    Returns:
        The row of each item, where row r belongs to rank r // rows; None if there is no room for an item.
    """
    place = [0] * len(tokens)
    room = [[row_length] * rows for _ in range(ranks)]
    # a heap
    loads = [(0.0, rank) for rank in range(ranks)]
    for item in sorted(range(len(costs)), key=lambda k: (-costs[k], k)):
        full = []
        while loads and max(room[loads[0][1]]) < tokens[item]:
            full.append(heapq.heappop(loads))
        if not loads:
            return None
        load, rank = loads[0]
        row = room[rank].index(max(room[rank]))
        place[item] = rank * rows + row
        room[rank][row] -= tokens[item]
        heapq.heapreplace(loads, (load + costs[item], rank))
        for other in full:
            heapq.heappush(loads, other)
    return place


def _by_length(
    tokens: list[int], costs: list[float], ranks: int, rows: int, row_length: int
) -> list[int] | None:
    """Fill rows by first-fit decreasing and assign them to ranks by cost; arguments and result are as in `_by_cost`.

    First-fit decreasing takes at most 11/9 of the fewest rows, plus one (Johnson 1973).
    """
    filled: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(tokens)), key=lambda k: (-tokens[k], k)):
        row = next((r for r, left in enumerate(room) if tokens[item] <= left), len(room))
        if row == len(room):
            if row == ranks * rows:
                return None
            filled.append([])
            room.append(row_length)
        filled[row].append(item)
        room[row] -= tokens[item]
    totals = [sum(costs[item] for item in row) for row in filled]
    place = [0] * len(tokens)
    # a heap of (load, rank, next row of the rank)
    loads = [(0.0, rank, rank * rows) for rank in range(ranks)]
    for members in sorted(range(len(filled)), key=lambda r: (-totals[r], r)):
        load, rank, row = heapq.heappop(loads)
        for item in filled[members]:
            place[item] = row
        if row + 1 < (rank + 1) * rows:
            heapq.heappush(loads, (load + totals[members], rank, row + 1))
    return place


# a way to relieve a rank: numbers of parts of one row, what their rank keeps of them, what it gives away for each
Way = tuple[tuple[int, ...], tuple[Part, ...], tuple[Part, ...]]


class _Table:
    """Holds parts in rows and moves them between ranks; row r belongs to rank r // rows."""

    def __init__(
        self, parts: list[Part], row: list[int], cost: CostModel, ranks: int, rows: int, row_length: int
    ) -> None:
        self.parts, self.cost, self.ranks, self.rows, self.row_length = parts, cost, ranks, rows, row_length
        # the row of each part, and the rank of each row
        self.row = np.array(row, np.int64)
        self.owner = np.repeat(np.arange(ranks), rows)
        self._count()

    def _count(self) -> None:
        self.tokens = np.array([part.tokens for part in self.parts], np.int64)
        self.costs = np.array([self.cost(part.tokens, part.pairs) for part in self.parts], float)
        self.loads = np.bincount(self.owner[self.row], self.costs, self.ranks)

    def improve(self) -> None:
        """Relieve the slowest rank, by exchange or else by cutting, until it is near the mean or nothing helps."""
        while max(self.loads) > (1 + TOLERANCE) * sum(self.loads.tolist()) / self.ranks:
            slowest = int(self.loads.argmax())
            mine = np.flatnonzero(self.owner[self.row] == slowest).tolist()
            alone = [(number,) for number in mine]
            twos = [two for two in itertools.combinations(mine, 2) if self.row[two[0]] == self.row[two[1]]]
            whole: list[Way] = [(gone, (), tuple(self.parts[k] for k in gone)) for gone in alone + twos]
            cut: Iterator[Way] = (
                ((number,), (kept,), (given,))
                for number in mine
                for halves in self.parts[number].halves()
                for kept, given in (halves, halves[::-1])
            )
            if not (self._exchange(slowest, whole) or self._exchange(slowest, list(cut))):
                return
            self._count()

    def by_rank(self) -> list[list[list[Part]]]:
        """Return the parts of each row of each rank."""
        plan: list[list[list[Part]]] = [[[] for _ in range(self.rows)] for _ in range(self.ranks)]
        for part, row in zip(self.parts, self.row.tolist(), strict=True):
            plan[row // self.rows][row % self.rows].append(part)
        return plan

    def _exchange(self, slowest: int, ways: list[Way]) -> bool:
        """Exchange something of the slowest rank for a cheaper part of another rank, or for nothing.

        Of all exchanges, the one is made after which the slower of the two ranks has the least cost.

        Args:
            slowest: the rank.
            ways: what it can give away.

        Returns:
            Whether an exchange was made.
        """
        if not ways:
            return False
        gone = [[self.parts[number] for number in way[0]] for way in ways]
        own, kept, given = (self._sizes(side) for side in (gone, [w[1] for w in ways], [w[2] for w in ways]))
        home = self.row[[way[0][0] for way in ways]]
        room = self.row_length - np.bincount(self.row, self.tokens, len(self.owner))
        # "nothing" is one part without tokens in each row, listed from the emptiest row on
        row = np.append(self.row, np.argsort(-room, kind="stable"))
        tokens, costs = np.zeros(len(row)), np.zeros(len(row))
        tokens[: len(self.parts)], costs[: len(self.parts)] = self.tokens, self.costs

        here = self.loads[slowest] - own[1] + kept[1] + costs
        there = self.loads[self.owner[row]] - costs + given[1]
        peak = np.maximum(here, there)
        fits = (tokens + kept[0] <= room[home, None] + own[0]) & (given[0] <= room[row] + tokens)
        peak[~fits | (self.owner[row] == slowest)] = np.inf
        # rounding must not let two ranks pass the same part back and forth
        if peak.min() >= self.loads[slowest] * (1 - 1e-6):
            return False
        best, other = (int(k) for k in np.unravel_index(peak.argmin(), peak.shape))
        numbers, rest, gifts = ways[best]
        if other < len(self.parts):
            self.row[other] = home[best]
        for number, part in zip(numbers, gifts, strict=True):
            self.parts[number], self.row[number] = part, row[other]
        self.parts += rest
        self.row = np.append(self.row, [home[best]] * len(rest)).astype(np.int64)
        return True

    def _sizes(self, bundles: Sequence[Sequence[Part]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the tokens and the costs of bundles of parts, as two columns (bundles, 1)."""
        tokens = [[float(sum(part.tokens for part in bundle))] for bundle in bundles]
        costs = [[sum(self.cost(part.tokens, part.pairs) for part in bundle)] for bundle in bundles]
        return np.array(tokens), np.array(costs, float)
