"""Global batches: which comparisons a step holds, how their trees lie in rows, which rank gets which row.

Everything is a pure function of (data, settings, step, ranks), the same on every rank: resuming at a step needs no
state but its number, and the global count a step divides by needs no communication. A rank merges its own rows only.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from silva.engine.data.dataset import DataSet
from silva.engine.data.encoding import Unit
from silva.engine.data.text.chat import TokenSequence
from silva.engine.data.trees.balance import BY_TOKENS, CostModel, spread
from silva.engine.data.trees.group import ABSENT, TokenGroup
from silva.engine.data.trees.packing import Piece
from silva.engine.data.trees.splitting import Part
from silva.engine.data.trees.tree import merge
from silva.engine.errors import UserError

AHEAD = 2  # batches that are built before they are asked for


@dataclass(slots=True)
class GlobalBatch:
    """One rank's rows of one optimizer step, and the counts of all ranks' rows, which losses are divided by.

    Counts are those of the step's units, however their trees are cut and spread; `unique` and `tokens` are of the
    rows as they are.
    """

    rows: list[list[Piece]]  # of this rank, equally many on every rank
    mismatched: list[list[Piece]]  # KTO: rows of completion i + 1 under prompt i; no rows otherwise
    comparisons: int
    sides: int  # present sides of comparisons: two a pair, one for unpaired feedback
    sequences: int
    mismatched_sequences: int
    scored: int  # scored tokens, counted once per sequence
    unrolled: int  # tokens of all sequences, each alone
    tokens: NDArray[np.int64]  # (ranks, rows) of each row, without padding
    imbalance: float  # cost of the slowest rank's rows over the mean
    waited: float = 0.0  # seconds between asking for the batch and having it

    @property
    def unique(self) -> int:
        """Tokens of all ranks' trees."""
        return int(self.tokens.sum())

    def capacity(self, multiple: int) -> int:
        """Tokens of all ranks' rows, padded as `pack_row` does."""
        return int((np.maximum(1, -(-self.tokens // multiple)) * multiple).sum())


class BatchLoader:
    """Cuts a data set into global batches of exactly `global_batch` units (the last of an epoch may be smaller).

    A tree that crosses the end of a batch is cut there between two comparisons: the batch holds what a
    batch of unrolled comparisons would hold, at the price of computing that tree's shared tokens twice.

    Args:
        unit: what `global_batch` counts: "sequence" (SFT) or "comparison".
        row_length: tokens of the longest row.
        epochs: passes over the data.
        shuffle: a new order of trees every epoch, from `seed`.
        mismatched: also lay out KTO's mismatched pairs.
        rank, ranks: this data-parallel rank and how many there are.
        multiple: of rows per rank; interleaved pipelines take micro-batches by the number of stages.
        cost: what ranks are balanced by; tokens alone unless given.

    Raises:
        UserError: mismatched pairs wanted from data with one tree only.
    """

    def __init__(
        self,
        data: DataSet,
        *,
        unit: Unit,
        global_batch: int,
        row_length: int,
        epochs: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        mismatched: bool = False,
        rank: int = 0,
        ranks: int = 1,
        multiple: int = 1,
        cost: CostModel = BY_TOKENS,
    ) -> None:
        self.data, self.unit, self.global_batch, self.row_length = data, unit, global_batch, row_length
        self.mismatched, self.cost = mismatched, cost
        self.rank, self.ranks, self.multiple = rank, ranks, multiple
        if mismatched and len(data) < 2:
            raise UserError("kto pairs each prompt with another prompt's completion: give it more than one")

        def epoch_order(epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            order = data.order(epoch, shuffle=shuffle, seed=seed)
            return order, np.cumsum(data.units(unit)[order])

        # one epoch while it lasts, and the next one as the batches ahead reach into it
        self._epoch = lru_cache(maxsize=2)(epoch_order)
        self.steps_per_epoch = -(-int(self._epoch(0)[1][-1]) // global_batch)
        self.steps = self.steps_per_epoch * epochs

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> GlobalBatch:
        epoch, place = divmod(step, self.steps_per_epoch)
        order, ends = self._epoch(epoch)
        start, stop = place * self.global_batch, min((place + 1) * self.global_batch, int(ends[-1]))
        parts: list[Part] = []
        strangers: list[Part] = []
        first = int(np.searchsorted(ends, start, "right"))
        last = int(np.searchsorted(ends, stop, "left"))
        for k in range(first, last + 1):
            group = self.data.group(int(order[k]))
            begin = int(ends[k]) - self._units(group)
            units = range(max(start, begin) - begin, min(stop, int(ends[k])) - begin)
            parts.append(self._part(group, units))
            if self.mismatched:
                strangers.append(self._mismatched(int(order[k]), group, units))
        plan = self._spread(parts)
        loads = [sum(self.cost(p.tokens, p.pairs) for row in rows for p in row) for rows in plan]
        members = [part.members for part in parts]
        return GlobalBatch(
            rows=self._merged(plan),
            mismatched=self._merged(self._spread(strangers)) if strangers else [],
            comparisons=sum(len(part.compared) for part in parts),
            sides=sum(len(need) for part in parts for need in part.needs if part.compared),
            sequences=sum(map(len, members)),
            mismatched_sequences=sum(len(part.needs) for part in strangers),
            scored=sum(int(p.group.scored[m].sum()) for p, m in zip(parts, members, strict=True)),
            unrolled=sum(int(p.group.length[m].sum()) for p, m in zip(parts, members, strict=True)),
            tokens=np.array([[sum(part.tokens for part in row) for row in rows] for rows in plan]),
            imbalance=max(loads) * self.ranks / sum(loads),
        )

    def prefetch(self, start: int, stop: int) -> Iterator[tuple[int, GlobalBatch]]:
        """(step, batch) from `start` to `stop`, the next ones being built while the current one is used."""
        pool = ThreadPoolExecutor(1)
        coming: deque[Future[GlobalBatch]] = deque()
        try:
            for step in range(start, stop):
                while len(coming) <= AHEAD and step + len(coming) < stop:
                    coming.append(pool.submit(self.__getitem__, step + len(coming)))
                asked = time.perf_counter()
                batch = coming.popleft().result()
                batch.waited = time.perf_counter() - asked
                yield step, batch
        finally:
            pool.shutdown(cancel_futures=True)

    def _units(self, group: TokenGroup) -> int:
        return len(group) if self.unit == "sequence" else len(group.comparisons)

    def _part(self, group: TokenGroup, units: range) -> Part:
        ids = group.first_sequence + np.arange(len(group))
        if self.unit == "sequence":
            return Part.whole(group, ids, [[unit] for unit in units])
        pairs = group.comparisons[units.start : units.stop].tolist()
        return Part.whole(group, ids, [[side for side in pair if side != ABSENT] for pair in pairs], units)

    def _spread(self, parts: list[Part]) -> list[list[list[Part]]]:
        return spread(parts, self.cost, ranks=self.ranks, row_length=self.row_length, multiple=self.multiple)

    def _merged(self, plan: list[list[list[Part]]]) -> list[list[Piece]]:
        """This rank's rows."""
        return [[piece(part) for part in row] for row in plan[self.rank]]

    def mismatched_id(self, comparison: int, side: int) -> int:
        """Number of a mismatched sequence, counted on from the data set's own sequences."""
        return self.data.sequences + 2 * comparison + side

    def _mismatched(self, index: int, group: TokenGroup, units: range) -> Part:
        """Each prompt of tree `index` under the completion of the next tree in the data set.

        The partner is fixed by the data alone (not by the batch), so the reference log-probs can be cached
        and no layout, batch size or shuffling changes the estimate of a pair.
        """
        other = self.data.group((index + 1) % len(self.data))
        made: dict[int, TokenSequence] = {}
        for unit in units:
            partner = other.comparisons[unit % len(other.comparisons)]
            for side in (0, 1):
                own = group.comparisons[unit][side]
                # unpaired feedback has one side only: take whichever the partner has
                theirs = partner[side] if partner[side] != ABSENT else partner[1 - side]
                if own != ABSENT:
                    made[self.mismatched_id(group.first_comparison + unit, side)] = _graft(
                        group.sequence(own), other.sequence(theirs), self.row_length
                    )
        # a comparison with nothing tells each sequence's place in the group's order
        merged = TokenGroup.of(
            list(made.values()), [(k, ABSENT) for k in range(len(made))], [False] * len(made)
        )
        ids = np.empty(len(made), np.int64)
        ids[merged.comparisons[:, 0]] = list(made)
        return Part.whole(merged, ids, [[k] for k in range(len(made))])


def piece(part: Part) -> Piece:
    """Merge a part of a tree."""
    group, members = part.group, part.members
    pairs = group.comparisons[part.compared]
    return Piece(
        tree=merge(group.subset(members)),
        sequence_ids=part.ids[members],
        comparisons=np.where(pairs == ABSENT, ABSENT, np.searchsorted(members, pairs)).astype(np.int32),
        absolute=group.absolute[part.compared],
    )


def _graft(prompt: TokenSequence, completion: TokenSequence, limit: int) -> TokenSequence:
    """The prompt of one sequence with the completion of another, the completion cut to fit `limit` tokens.

    A completion is everything from the first scored token on.
    """
    stem = int(prompt.scored.argmax())
    branch = int(completion.scored.argmax())
    tokens = np.concatenate([prompt.tokens[:stem], completion.tokens[branch:]])[:limit]
    scored = np.concatenate([np.zeros(stem, bool), completion.scored[branch:]])[:limit]
    return TokenSequence(tokens, scored)
