"""Builds global batches: which comparisons a step holds, how their trees lie in rows, and which rank gets which row.

Everything is a pure function of (data, settings, step, ranks) and gives the same on every rank. So resuming at a step
needs no state but the step's number, and the global count that a step divides by needs no communication. A rank merges
only its own rows.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from silva.engine.data.dataset import DataSet
from silva.engine.data.encoding import Unit
from silva.engine.data.trees.balance import BY_TOKENS, CostModel, spread
from silva.engine.data.trees.group import ABSENT, TokenGroup, TokenSequence
from silva.engine.data.trees.packing import Piece
from silva.engine.data.trees.splitting import Part
from silva.engine.data.trees.tree import merge
from silva.engine.errors import UserError

# number of batches that are built before they are asked for
AHEAD = 2


@dataclass(slots=True)
class GlobalBatch:
    """Holds one rank's rows of one optimizer step, and the counts of all ranks' rows that losses are divided by.

    Counts are those of the step's units, however their trees are cut and spread; `unique` and `tokens` count the rows
    as they are, tokens that cutting repeats included.

    Attributes:
        rows: of this rank; every rank has the same number of rows.
        mismatched: KTO's rows of completion i - 1 under prompt i; empty for other objectives.
        comparisons: of all ranks.
        sides: present sides of the comparisons: two for a pair, one for unpaired feedback.
        sequences: of all ranks.
        mismatched_sequences: of all ranks.
        scored: scored tokens, counted once per sequence.
        unrolled: tokens of all paths of the sequences, each counted alone.
        tokens: (ranks, rows) int64, tokens of each row without padding.
        imbalance: cost of the slowest rank's rows, divided by the mean over ranks.
        waited: seconds between asking for the batch and having it.
    """

    rows: list[list[Piece]]
    mismatched: list[list[Piece]]
    comparisons: int
    sides: int
    sequences: int
    mismatched_sequences: int
    scored: int
    unrolled: int
    tokens: NDArray[np.int64]
    imbalance: float
    waited: float = 0.0

    @property
    def unique(self) -> int:
        """Return the number of tokens of all ranks' trees."""
        return int(self.tokens.sum())

    def capacity(self, multiple: int) -> int:
        """Return the number of tokens of all ranks' rows, padded to a multiple of `multiple` as by `pack_row`."""
        return int((np.maximum(1, -(-self.tokens // multiple)) * multiple).sum())


class BatchLoader:
    """Cuts a data set into global batches of exactly `global_batch` units (the last of an epoch may be smaller).

    A tree that crosses the end of a batch is cut there, between two comparisons. So the batch holds what a batch of
    unrolled comparisons would hold, but the shared tokens of that tree are computed twice.

    Args:
        data: the trees.
        unit: what `global_batch` counts: "sequence" (SFT) or "comparison".
        global_batch: units per step, over all ranks.
        row_length: tokens of the longest row.
        epochs: passes over the data.
        shuffle: whether every epoch has a new order of trees.
        seed: of the order.
        mismatched: whether KTO's mismatched pairs are laid out too.
        rank: this data-parallel rank.
        ranks: number of data-parallel ranks.
        multiple: the number of rows per rank is a multiple of it; interleaved pipelines need a multiple of the number
            of stages.
        cost: what ranks are balanced by; the number of tokens unless given.

    Attributes:
        steps_per_epoch: number of batches of one epoch.
        steps: number of batches of all epochs.

    Raises:
        UserError: mismatched pairs are wanted, but the data hold fewer than two trees.
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
            raise UserError(
                "kto pairs each prompt with the completion of another tree: the data need more than one"
            )

        def epoch_order(epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
            order = data.order(epoch, shuffle=shuffle, seed=seed)
            return order, np.cumsum(data.units(unit)[order])

        # two epochs are kept, because the batches that are built ahead may already be those of the next one
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
        members = [part.sequences for part in parts]
        return GlobalBatch(
            rows=self._merged(plan),
            mismatched=self._merged(self._spread(strangers)) if strangers else [],
            comparisons=sum(len(part.compared) for part in parts),
            sides=sum(int((p.group.comparisons[p.compared] != ABSENT).sum()) for p in parts),
            sequences=sum(map(len, members)),
            mismatched_sequences=sum(len(part.needs) for part in strangers),
            scored=sum(int(p.group.scored[m].sum()) for p, m in zip(parts, members, strict=True)),
            unrolled=sum(int(part.group.length[part.members].sum()) for part in parts),
            tokens=np.array([[sum(part.tokens for part in row) for row in rows] for rows in plan]),
            imbalance=max(loads) * self.ranks / sum(loads),
        )

    def prefetch(self, start: int, stop: int) -> Generator[tuple[int, GlobalBatch], None, None]:
        """Yield the batches of some steps, and build the next ones while the current one is used.

        A caller that may leave the loop closes the generator, which ends the thread that builds them.

        Args:
            start: the first step.
            stop: one past the last step.

        Yields:
            (step, batch).
        """
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
            return Part.whole(group, ids, [group.paths_of(unit) for unit in units])
        pairs = group.comparisons[units.start : units.stop].tolist()
        needs = [[path for side in pair if side != ABSENT for path in group.paths_of(side)] for pair in pairs]
        return Part.whole(group, ids, needs, units)

    def _spread(self, parts: list[Part]) -> list[list[list[Part]]]:
        return spread(parts, self.cost, ranks=self.ranks, row_length=self.row_length, multiple=self.multiple)

    def _merged(self, plan: list[list[list[Part]]]) -> list[list[Piece]]:
        """Merge the trees of this rank's rows."""
        return [[piece(part) for part in row] for row in plan[self.rank]]

    def mismatched_id(self, comparison: int, side: int) -> int:
        """Return the number of a mismatched sequence; these numbers follow those of the data set's own sequences."""
        return self.data.sequences + 2 * comparison + side

    def _mismatched(self, index: int, group: TokenGroup, units: range) -> Part:
        """Join the prompts of tree `index` to the completions of the tree before it in the data set.

        That is what TRL does within a micro-batch. The partner is fixed by the data alone and not by the batch, so the
        reference log-probs can be cached, and no layout, batch size or shuffling changes the estimate of a pair.
        """
        other = self.data.group((index - 1) % len(self.data))
        made: dict[int, TokenSequence] = {}
        for unit in units:
            partner = other.comparisons[unit % len(other.comparisons)]
            for side in (0, 1):
                own = group.comparisons[unit][side]
                # unpaired feedback has one side only: take whichever the partner has
                theirs = partner[side] if partner[side] != ABSENT else partner[1 - side]
                if own != ABSENT:
                    made[self.mismatched_id(group.first_comparison + unit, side)] = _graft(
                        _longest(group, own), _longest(other, theirs), self.row_length
                    )
        # `TokenGroup.of` reorders sequences: one comparison per sequence, its other side absent, tells the new places
        merged = TokenGroup.of(
            list(made.values()), [(k, ABSENT) for k in range(len(made))], [False] * len(made)
        )
        ids = np.empty(len(made), np.int64)
        ids[merged.comparisons[:, 0]] = list(made)
        return Part.whole(merged, ids, [[k] for k in range(len(made))])


def piece(part: Part) -> Piece:
    """Merge a part of a tree into one tree, with the comparisons of the part."""
    group, sequences = part.group, part.sequences
    pairs = group.comparisons[part.compared]
    return Piece(
        tree=merge(group.subset(part.members)),
        sequence_ids=part.ids[sequences],
        comparisons=np.where(pairs == ABSENT, ABSENT, np.searchsorted(sequences, pairs)).astype(np.int32),
        absolute=group.absolute[part.compared],
    )


def _longest(group: TokenGroup, sequence: int) -> TokenSequence:
    """Return the longest path of a sequence: where it has several, that of its last answer."""
    return group.path(max(group.paths_of(sequence), key=group.length.__getitem__))


def _graft(prompt: TokenSequence, completion: TokenSequence, limit: int) -> TokenSequence:
    """Join the prompt of one sequence to the completion of another, which is cut so that both fit `limit` tokens.

    A completion is everything from the first scored token on.
    """
    stem = int(prompt.scored.argmax())
    branch = int(completion.scored.argmax())
    tokens = np.concatenate([prompt.tokens[:stem], completion.tokens[branch:]])[:limit]
    scored = np.concatenate([np.zeros(stem, bool), completion.scored[branch:]])[:limit]
    return TokenSequence(tokens, scored)
