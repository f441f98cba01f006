"""Global batches: exact counts, cut trees, rows of all ranks, mismatched pairs."""

from __future__ import annotations

import time

import numpy as np
import pytest

from benchmarks import ultrainteract
from silva.engine.data.dataset import DataSet
from silva.engine.data.loader import AHEAD, BatchLoader, GlobalBatch
from silva.engine.data.trees.group import ABSENT, TokenGroup, TokenSequence
from silva.engine.data.trees.packing import Piece, pack_row
from silva.engine.errors import UserError
from silva.engine.model import flops
from silva.engine.planning.named_models import NAMED

PROMPT = 10


def group(comparisons: int, random: np.random.Generator, *, paths: bool = False) -> TokenGroup:
    """A prompt of ten tokens, two answers a comparison, and one side missing now and then.

    With `paths`, some sequences have a second path, which goes on behind a part of the first.
    """
    prompt = random.integers(0, 50, PROMPT)
    sequences = []
    for _ in range(2 * comparisons):
        answer = random.integers(0, 50, random.integers(1, 30))
        scored = np.r_[np.zeros(PROMPT, bool), np.ones(len(answer), bool)]
        sequences.append(TokenSequence(np.r_[prompt, answer].astype(np.int32), scored))
    pairs = np.arange(2 * comparisons).reshape(-1, 2)
    pairs[random.random(pairs.shape) < 0.1] = ABSENT
    pairs[(pairs == ABSENT).all(1)] = 0, 1
    owner = list(range(len(sequences)))
    for k in owner[:] if paths else []:
        if random.random() < 0.4:
            stem = sequences[k].tokens[: random.integers(PROMPT, len(sequences[k].tokens) + 1)]
            more = random.integers(0, 50, random.integers(1, 9)).astype(np.int32)
            scored = np.arange(len(stem) + len(more)) >= len(stem)
            sequences.append(TokenSequence(np.r_[stem, more], scored))
            owner.append(k)
    return TokenGroup.of(sequences, pairs, random.random(comparisons) < 0.5, owner=owner)


@pytest.fixture
def data() -> DataSet:
    random = np.random.default_rng(0)
    return DataSet.of(group(int(random.integers(1, 6)), random) for _ in range(40))


@pytest.fixture
def with_paths() -> DataSet:
    random = np.random.default_rng(1)
    return DataSet.of(group(int(random.integers(1, 6)), random, paths=True) for _ in range(40))


def pieces(batches: list[GlobalBatch]) -> list[Piece]:
    return [piece for batch in batches for row in batch.rows for piece in row]


def named(piece: Piece) -> list[tuple[int, int, bool]]:
    """(chosen, rejected, absolute) by number in the data set."""
    ids = np.append(piece.sequence_ids, ABSENT)
    return [(*ids[pair].tolist(), bool(a)) for pair, a in zip(piece.comparisons, piece.absolute, strict=True)]


def of_all_ranks(data: DataSet, step: int, ranks: int, **settings) -> list[GlobalBatch]:
    return [BatchLoader(data, rank=rank, ranks=ranks, **settings)[step] for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("row_length", [70, 128, 1000])
def test_an_epoch_holds_every_comparison_once_in_batches_of_the_asked_size(data, row_length, ranks):
    settings = {"unit": "comparison", "global_batch": 7, "row_length": row_length, "shuffle": True}
    plan = BatchLoader(data, epochs=2, **settings)
    expected = []
    for k in range(len(data)):
        found = data.group(k)
        for pair, absolute in zip(found.comparisons.tolist(), found.absolute.tolist(), strict=True):
            expected.append((*(ABSENT if s == ABSENT else s + found.first_sequence for s in pair), absolute))
    for epoch in range(2):
        seen = []
        for step in range(plan.steps_per_epoch):
            batches = of_all_ranks(data, epoch * plan.steps_per_epoch + step, ranks, epochs=2, **settings)
            units = 7 if step < plan.steps_per_epoch - 1 else data.comparisons - 7 * step
            for batch in batches:
                assert batch.comparisons == units
                assert len(batch.rows) == batch.tokens.shape[1]
            here = [pair for piece in pieces(batches) for pair in named(piece)]
            assert sum((side != ABSENT) for pair in here for side in pair[:2]) == batches[0].sides
            assert max(sum(len(piece.tree) for piece in row) for b in batches for row in b.rows) <= row_length
            seen += here
        assert sorted(seen) == sorted(expected)


def test_every_sequence_of_a_row_is_the_data_sets(data):
    plan = BatchLoader(data, unit="comparison", global_batch=9, row_length=80, shuffle=True)
    owner = np.repeat(np.arange(len(data)), data.units("sequence"))
    for piece in pieces([plan[step] for step in range(5)]):
        for identity, last in zip(piece.sequence_ids, piece.tree.last, strict=True):
            group = data.group(int(owner[identity]))
            expected = group.sequence(int(identity) - group.first_sequence)
            path = [j for j in range(last + 1) if piece.tree.subtree_end[j] > last]
            assert piece.tree.tokens[path].tolist() == expected.tokens.tolist()


@pytest.mark.parametrize("unit", ["comparison", "sequence"])
@pytest.mark.parametrize("row_length", [90, 1000])
def test_sequences_of_several_paths_stay_whole(with_paths, unit, row_length):
    """Every sequence of a row scores, in the row's tree, exactly what its paths score."""
    data = with_paths
    owner = np.repeat(np.arange(len(data)), data.units("sequence"))
    plan = BatchLoader(data, unit=unit, global_batch=9, row_length=row_length, shuffle=True, ranks=2)
    several, seen = 0, []
    for piece in pieces([plan[step] for step in range(len(plan))]):
        tree = piece.tree
        for k, identity in enumerate(piece.sequence_ids.tolist()):
            group = data.group(int(owner[identity]))
            paths = [group.path(p) for p in group.paths_of(identity - group.first_sequence)]
            several += len(paths) > 1
            seen.append(identity)
            spans = tree.span_index[tree.span_pointer[k] : tree.span_pointer[k + 1]].tolist()
            found = sorted(
                (int(tree.position[tree.source[j]]) + 1, int(tree.target[j]))
                for span in spans
                for j in np.flatnonzero(tree.span == span)
            )
            expected = sorted(
                (place, int(p.tokens[place])) for p in paths for place in np.flatnonzero(p.scored).tolist()
            )
            assert found == expected
            assert tree.scored[k] == len(expected)
    assert several > 5
    if unit == "sequence":
        ranks = [
            plan,
            BatchLoader(
                data, unit=unit, global_batch=9, row_length=row_length, shuffle=True, rank=1, ranks=2
            ),
        ]
        every = [
            int(i) for p in ranks for step in range(len(p)) for q in pieces([p[step]]) for i in q.sequence_ids
        ]
        assert sorted(every) == list(range(data.sequences))


def test_sequences_are_units_too(data):
    plan = BatchLoader(data, unit="sequence", global_batch=16, row_length=90, shuffle=True)
    seen = [int(k) for step in range(len(plan)) for p in pieces([plan[step]]) for k in p.sequence_ids]
    assert sorted(seen) == list(range(data.sequences))
    assert [plan[step].sequences for step in range(len(plan) - 1)] == [16] * (len(plan) - 1)


@pytest.mark.parametrize("unit", ["comparison", "sequence"])
def test_counts_do_not_depend_on_ranks_or_rows(data, unit):
    def counts(ranks: int, row_length: int) -> list[tuple]:
        plan = BatchLoader(
            data,
            unit=unit,
            global_batch=23,
            row_length=row_length,
            ranks=ranks,
            mismatched=unit == "comparison",
        )
        return [
            (b.comparisons, b.sides, b.sequences, b.mismatched_sequences, b.scored, b.unrolled)
            for b in (plan[step] for step in range(len(plan)))
        ]

    whole = counts(1, 10_000)
    assert whole == counts(5, 70) == counts(64, 200)
    assert sum(c[2] for c in whole) >= data.sequences * (unit == "sequence")


def test_rows_of_the_batch_are_as_it_says(data):
    multiple = 16
    batches = of_all_ranks(data, 1, 3, unit="comparison", global_batch=40, row_length=200)
    rows = [pack_row(row, multiple=multiple, pad_id=0) for batch in batches for row in batch.rows]
    for rank, batch in enumerate(batches):
        assert [sum(len(p.tree) for p in row) for row in batch.rows] == batch.tokens[rank].tolist()
        assert batch.capacity(multiple) == sum(len(row.tokens) for row in rows)
        assert batch.unique == sum(len(piece.tree) for piece in pieces(batches))
        assert 1 <= batch.imbalance < 1.2


def test_a_batch_is_a_function_of_its_step(data):
    first, second = (
        BatchLoader(data, unit="comparison", global_batch=5, row_length=200, shuffle=True, seed=3)
        for _ in range(2)
    )
    for step in (6, 0, 3):
        a, b = first[step], second[step]
        assert [[p.sequence_ids.tolist() for p in row] for row in a.rows] == [
            [p.sequence_ids.tolist() for p in row] for row in b.rows
        ]


def test_trees_taken_several_times_count_several_times(data):
    copies = np.arange(len(data)) % 3
    mixed = data.with_copies(copies)
    plan = BatchLoader(mixed, unit="comparison", global_batch=8, row_length=100, shuffle=True, epochs=2)
    total = int((data.units("comparison") * copies).sum())
    assert plan.steps_per_epoch == -(-total // 8)
    for epoch in range(2):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        assert sum(plan[step].comparisons for step in steps) == total


def test_batches_are_built_ahead_and_waiting_is_told(data, monkeypatch):
    built = []

    def slow(self: BatchLoader, step: int) -> GlobalBatch:
        time.sleep(0.2)
        built.append(step)
        return original(self, step)

    original = BatchLoader.__getitem__
    monkeypatch.setattr(BatchLoader, "__getitem__", slow)
    plan = BatchLoader(data, unit="comparison", global_batch=4, row_length=200)
    waited = []
    for step, batch in plan.prefetch(2, 7):
        waited.append(batch.waited)
        until = time.monotonic() + 30
        while built[-1] < min(6, step + AHEAD) and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.3)  # one more would be built in this time
        assert built[-1] == min(6, step + AHEAD)
    assert built == list(range(2, 7))
    assert waited[0] > 0.2
    assert max(waited[1:]) < 0.1  # they were there: half the time that building takes


def test_an_error_while_building_reaches_the_step_that_needs_it(data):
    plan = BatchLoader(data, unit="comparison", global_batch=4, row_length=20)
    with pytest.raises(ValueError, match="does not fit a row of 20"):
        list(plan.prefetch(0, 3))


def completions(plan: BatchLoader) -> dict[int, list[int]]:
    """Number -> tokens of every mismatched sequence of an epoch."""
    found = {}
    for step in range(len(plan)):
        batch = plan[step]
        assert batch.mismatched_sequences == batch.sides
        for piece in (piece for row in batch.mismatched for piece in row):
            for identity, last in zip(piece.sequence_ids, piece.tree.last, strict=True):
                path = [j for j in range(last + 1) if piece.tree.subtree_end[j] > last]
                found[int(identity)] = piece.tree.tokens[path].tolist()
    return found


def test_mismatched_pairs_are_the_completions_of_the_tree_before_whatever_the_batch(data):
    settings = {"unit": "comparison", "shuffle": True, "mismatched": True}
    found = completions(BatchLoader(data, global_batch=7, row_length=100, **settings))
    assert found == completions(BatchLoader(data, global_batch=31, row_length=300, **settings))
    expected = {}
    for k in range(len(data)):
        own, other = data.group(k), data.group((k - 1) % len(data))
        for number, pair in enumerate(own.comparisons):
            partner = other.comparisons[number % len(other.comparisons)]
            for side in (0, 1):
                if pair[side] != ABSENT:
                    theirs = partner[side] if partner[side] != ABSENT else partner[1 - side]
                    stem = own.sequence(int(pair[side])).tokens[:PROMPT]
                    rest = other.sequence(int(theirs)).tokens[PROMPT:]
                    identity = data.sequences + 2 * (own.first_comparison + number) + side
                    expected[identity] = [*stem.tolist(), *rest.tolist()]
    assert found == expected


def test_mismatched_rows_are_spread_too(data):
    settings = {"unit": "comparison", "global_batch": 30, "row_length": 100, "mismatched": True}
    batches = of_all_ranks(data, 1, 4, **settings)
    assert len({len(batch.mismatched) for batch in batches}) == 1
    ids = [int(k) for b in batches for row in b.mismatched for piece in row for k in piece.sequence_ids]
    assert len(ids) == len(set(ids)) == batches[0].mismatched_sequences
    assert BatchLoader(data, unit="comparison", global_batch=30, row_length=100)[1].mismatched == []


def test_mismatched_pairs_need_two_prompts(data):
    alone = DataSet.of([data.group(0)])
    with pytest.raises(UserError, match="more than one"):
        BatchLoader(alone, unit="comparison", global_batch=1, row_length=100, mismatched=True)


def test_ranks_are_balanced_by_the_cost_that_is_given():
    data = DataSet.of(ultrainteract.groups(110, seed=5))
    cost = flops.row_cost(NAMED["mistral-7b"], "lm")
    plan = BatchLoader(data, unit="comparison", global_batch=256, row_length=8192, ranks=8, cost=cost)
    assert plan[0].imbalance < 1.03
