"""Global batches: which comparisons a step holds, how their trees lie in rows, which rank gets which row.

Everything is a pure function of (data, settings, step), the same on every rank: resuming at a step needs no
state but its number, and the global count a step divides by needs no communication.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from silva.engine.data.chat import TokenSequence
from silva.engine.data.dataset import DataSet, TokenGroup, Unit
from silva.engine.data.packing import ABSENT, Piece, first_fit_decreasing
from silva.engine.data.tree import merge, merged_size
from silva.engine.errors import UserError


@dataclass(slots=True)
class GlobalBatch:
    """The rows of one optimizer step over all data-parallel ranks, and the counts losses are divided by."""

    rows: list[list[Piece]]
    mismatched: list[list[Piece]]  # KTO: rows of completion i + 1 under prompt i; empty otherwise
    comparisons: int
    sides: int  # present sides of comparisons: two a pair, one for unpaired feedback
    sequences: int
    scored: int  # scored tokens, counted once per sequence
    unrolled: int  # tokens of all sequences, each alone
    unique: int  # tokens of all trees

    @property
    def mismatched_sequences(self) -> int:
        return sum(len(piece.sequence_ids) for row in self.mismatched for piece in row)


def share(rows: list[list[Piece]], rank: int, size: int, *, multiple: int = 1) -> list[list[Piece]]:
    """The rows of one data-parallel rank; every rank gets equally many, empty rows making up the number.

    Rows are dealt longest first, forth and back, so that ranks get near-equal token counts.

    Args:
        multiple: of rows per rank; interleaved pipelines take micro-batches by the number of stages.
    """
    lengths = [sum(len(piece.tree) for piece in row) for row in rows]
    order = sorted(range(len(rows)), key=lambda r: (-lengths[r], r))
    rounds = max(1, -(-len(rows) // (size * multiple))) * multiple
    mine: list[list[Piece]] = []
    for turn in range(rounds):
        place = turn * size + (rank if turn % 2 == 0 else size - 1 - rank)
        mine.append(rows[order[place]] if place < len(rows) else [])
    return mine


class BatchPlan:
    """Cuts a data set into global batches of exactly `global_batch` units (the last of an epoch may be smaller).

    A tree that crosses the end of a batch is cut there between two comparisons: the batch holds what a
    batch of unrolled comparisons would hold, at the price of computing that tree's shared tokens twice.

    Args:
        unit: what `global_batch` counts: "sequence" (SFT) or "comparison".
        epochs: passes over the data.
        shuffle: a new order of trees every epoch, from `seed`.
        row_length: tokens of the longest row.
        mismatched: also lay out KTO's mismatched pairs.

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
    ) -> None:
        self.data, self.unit, self.row_length = data, unit, row_length
        self.global_batch, self.shuffle, self.seed = global_batch, shuffle, seed
        self.mismatched = mismatched
        if mismatched and len(data) < 2:
            raise UserError("kto pairs each prompt with another prompt's completion: give it more than one")
        self._units = np.array(
            [len(g.sequences if unit == "sequence" else g.comparisons) for g in data.groups]
        )
        self.steps_per_epoch = -(-int(self._units.sum()) // global_batch)
        self.steps = self.steps_per_epoch * epochs

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> GlobalBatch:
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.arange(len(self.data))
        if self.shuffle:
            order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.data))
        ends = np.cumsum(self._units[order])
        start, stop = place * self.global_batch, (place + 1) * self.global_batch
        pieces: list[Piece] = []
        strangers: list[Piece] = []
        for k in range(int(np.searchsorted(ends, start, "right")), len(order)):
            begin = int(ends[k] - self._units[order[k]])
            if begin >= stop:
                break
            group = self.data.groups[order[k]]
            units = np.arange(max(start, begin), min(stop, int(ends[k]))) - begin
            pieces += self._pieces(group, units)
            if self.mismatched:
                strangers += self._mismatched_pieces(int(order[k]), units)
        sides = sum(int((piece.comparisons != ABSENT).sum()) for piece in pieces)
        return GlobalBatch(
            rows=self._rows(pieces),
            mismatched=self._rows(strangers),
            comparisons=sum(len(piece.comparisons) for piece in pieces),
            sides=sides,
            sequences=sum(len(piece.sequence_ids) for piece in pieces),
            scored=sum(int(piece.tree.scored.sum()) for piece in pieces),
            unrolled=sum(piece.tree.unrolled for piece in pieces),
            unique=sum(len(piece.tree) for piece in pieces),
        )

    def prefetch(self, start: int, stop: int) -> Iterator[tuple[int, GlobalBatch]]:
        """(step, batch) from `start` to `stop`, the next batch being built while the current one is used."""
        with ThreadPoolExecutor(1) as pool:
            coming: Future[GlobalBatch] | None = None
            for step in range(start, stop):
                batch = coming.result() if coming is not None else self[step]
                coming = pool.submit(self.__getitem__, step + 1) if step + 1 < stop else None
                yield step, batch

    def _rows(self, pieces: list[Piece]) -> list[list[Piece]]:
        bins = first_fit_decreasing([len(piece.tree) for piece in pieces], self.row_length)
        return [[pieces[k] for k in members] for members in bins]

    def _pieces(self, group: TokenGroup, units: NDArray[np.int64]) -> list[Piece]:
        """The chosen units of a group as trees that fit a row: one, unless the merged tree is too long."""
        if self.unit == "sequence":
            needs = [[int(u)] for u in units]
        else:
            needs = [[int(s) for s in group.comparisons[u] if s != ABSENT] for u in units]
        parts: list[list[int]] = [[]]  # places in `units`
        held: set[int] = set()
        if merged_size([group.sequences[s] for need in needs for s in need]) <= self.row_length:
            parts = [list(range(len(units)))]
        else:
            for place, need in enumerate(needs):
                wider = held | set(need)
                if held and merged_size([group.sequences[s] for s in sorted(wider)]) > self.row_length:
                    parts.append([])
                    wider = set(need)
                held = wider
                parts[-1].append(place)
        return [self._piece(group, [needs[p] for p in part], units[part]) for part in parts]

    def _piece(self, group: TokenGroup, needs: list[list[int]], units: NDArray[np.int64]) -> Piece:
        members = sorted({s for need in needs for s in need})
        place = {s: k for k, s in enumerate(members)} | {ABSENT: ABSENT}
        compared = group.comparisons[units] if self.unit == "comparison" else group.comparisons[:0]
        return Piece(
            tree=merge([group.sequences[s] for s in members]),
            sequence_ids=np.array(members, np.int64) + group.first_sequence,
            comparisons=np.array([[place[int(s)] for s in pair] for pair in compared], np.int32).reshape(
                -1, 2
            ),
            absolute=group.absolute[units] if self.unit == "comparison" else group.absolute[:0],
        )

    def mismatched_id(self, comparison: int, side: int) -> int:
        """Number of a mismatched sequence, counted on from the data set's own sequences."""
        return self.data.sequences + 2 * comparison + side

    def _mismatched_pieces(self, index: int, units: NDArray[np.int64]) -> list[Piece]:
        """Each prompt of group `index` under the completion of the next tree in the data set.

        The partner is fixed by the data alone (not by the batch), so the reference log-probs can be cached
        and no layout, batch size or shuffling changes the estimate of a pair.
        """
        group, other = self.data.groups[index], self.data.groups[(index + 1) % len(self.data)]
        made: dict[int, TokenSequence] = {}
        for unit in units:
            partner = other.comparisons[int(unit) % len(other.comparisons)]
            for side in (0, 1):
                own = group.comparisons[unit][side]
                # unpaired feedback has one side only: take whichever the partner has
                theirs = partner[side] if partner[side] != ABSENT else partner[1 - side]
                if own != ABSENT:
                    made[self.mismatched_id(group.first_comparison + int(unit), side)] = _graft(
                        group.sequences[own], other.sequences[theirs], self.row_length
                    )
        pieces, batch = [], dict[int, TokenSequence]()
        for identity, sequence in made.items():
            if batch and merged_size([*batch.values(), sequence]) > self.row_length:
                pieces.append(_uncompared(batch))
                batch = {}
            batch[identity] = sequence
        return [*pieces, _uncompared(batch)]


def _graft(prompt: TokenSequence, completion: TokenSequence, limit: int) -> TokenSequence:
    """The prompt of one sequence with the completion of another, the completion cut to fit `limit` tokens.

    A completion is everything from the first scored token on.
    """
    stem = int(prompt.scored.argmax())
    branch = int(completion.scored.argmax())
    tokens = np.concatenate([prompt.tokens[:stem], completion.tokens[branch:]])[:limit]
    scored = np.concatenate([np.zeros(stem, bool), completion.scored[branch:]])[:limit]
    return TokenSequence(tokens, scored)


def _uncompared(sequences: dict[int, TokenSequence]) -> Piece:
    return Piece(
        tree=merge(list(sequences.values())),
        sequence_ids=np.array(list(sequences), np.int64),
        comparisons=np.zeros((0, 2), np.int32),
        absolute=np.zeros(0, bool),
    )
