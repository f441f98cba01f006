"""Global batches: exact counts, cut trees, fair shares, mismatched pairs, and what is held out."""

import numpy as np
import pytest

from silva.engine.data.chat import TokenSequence
from silva.engine.data.dataset import DataSet, TokenGroup, hold_out
from silva.engine.data.loader import BatchPlan, share
from silva.engine.errors import UserError


def group(number: int, comparisons: int, random: np.random.Generator) -> TokenGroup:
    """A prompt of ten tokens and two answers a comparison."""
    prompt = random.integers(0, 50, 10)
    sequences = []
    for _ in range(2 * comparisons):
        answer = random.integers(0, 50, random.integers(1, 30))
        scored = np.r_[np.zeros(len(prompt), bool), np.ones(len(answer), bool)]
        sequences.append(TokenSequence(np.r_[prompt, answer].astype(np.int32), scored))
    pairs = np.arange(2 * comparisons, dtype=np.int32).reshape(-1, 2)
    return TokenGroup(sequences, pairs, np.ones(comparisons, bool), f"question {number}")


@pytest.fixture
def data() -> DataSet:
    random = np.random.default_rng(0)
    return DataSet(group(k, int(random.integers(1, 6)), random) for k in range(40))


@pytest.mark.parametrize("row_length", [70, 128, 1000])
def test_an_epoch_holds_every_comparison_once_in_batches_of_the_asked_size(data, row_length):
    plan = BatchPlan(data, unit="comparison", global_batch=7, row_length=row_length, shuffle=True, epochs=2)
    for epoch in range(2):
        seen = []
        for step in range(plan.steps_per_epoch):
            batch = plan[epoch * plan.steps_per_epoch + step]
            expected = 7 if step < plan.steps_per_epoch - 1 else data.comparisons - 7 * step
            assert batch.comparisons == expected
            assert batch.sides == 2 * expected
            for row in batch.rows:
                assert sum(len(piece.tree) for piece in row) <= row_length
                for piece in row:
                    seen += [tuple(piece.sequence_ids[pair].tolist()) for pair in piece.comparisons]
        # chosen and rejected are neighbours in this data
        assert sorted(seen) == [(2 * k, 2 * k + 1) for k in range(data.comparisons)]


def test_a_batch_is_a_function_of_its_step(data):
    first, second = (
        BatchPlan(data, unit="comparison", global_batch=5, row_length=200, shuffle=True, seed=3)
        for _ in range(2)
    )
    for step in (6, 0, 3):
        a, b = first[step], second[step]
        assert [[p.sequence_ids.tolist() for p in row] for row in a.rows] == [
            [p.sequence_ids.tolist() for p in row] for row in b.rows
        ]
    assert [step for step, _ in first.prefetch(2, 5)] == [2, 3, 4]


@pytest.mark.parametrize(("size", "multiple"), [(1, 1), (3, 1), (4, 2), (64, 2)])
def test_every_rank_gets_equally_many_rows_and_every_row_has_one_rank(data, size, multiple):
    rows = BatchPlan(data, unit="comparison", global_batch=50, row_length=100)[0].rows
    shares = [share(rows, rank, size, multiple=multiple) for rank in range(size)]
    assert len({len(mine) for mine in shares}) == 1
    assert len(shares[0]) % multiple == 0
    dealt = [id(row) for mine in shares for row in mine if row]
    assert sorted(dealt) == sorted(id(row) for row in rows)


def test_mismatched_pairs_are_the_next_trees_completions_whatever_the_batch(data):
    def grafts(global_batch: int) -> dict[int, list[int]]:
        plan = BatchPlan(
            data, unit="comparison", global_batch=global_batch, row_length=100, shuffle=True, mismatched=True
        )
        found = {}
        for step in range(len(plan)):
            batch = plan[step]
            assert batch.mismatched_sequences == batch.sides
            for piece in (piece for row in batch.mismatched for piece in row):
                for identity, last in zip(piece.sequence_ids, piece.tree.last, strict=True):
                    path = [j for j in range(last + 1) if piece.tree.subtree_end[j] > last]
                    found[int(identity)] = piece.tree.tokens[path].tolist()
        return found

    found = grafts(7)
    assert found == grafts(31)
    assert sorted(found) == list(range(data.sequences, data.sequences + 2 * data.comparisons))
    own, other = data.groups[0], data.groups[1]
    expected = [*own.sequences[0].tokens[:10], *other.sequences[0].tokens[10:]]
    assert found[data.sequences] == [int(token) for token in expected]


def test_mismatched_pairs_need_two_prompts(data):
    alone = DataSet(data.groups[:1])
    with pytest.raises(UserError, match="more than one"):
        BatchPlan(alone, unit="comparison", global_batch=1, row_length=100, mismatched=True)


def test_stages_hold_out_the_same_instructions(data):
    """Even where one stage keeps only some of the other's groups."""
    some = DataSet(data.groups[::3])
    train, held = hold_out(data, 0.3, seed=1)
    few_train, few_held = hold_out(some, 0.3, seed=1)

    def names(part: DataSet) -> set[str]:
        return {g.instruction for g in part.groups}

    assert names(train) | names(held) == names(data)
    assert not names(train) & names(held)
    assert names(few_held) == names(held) & names(some)
    assert names(few_train) == names(train) & names(some)
    assert names(hold_out(data, 0.3, seed=2)[1]) != names(held)


@pytest.mark.parametrize(("fraction", "side"), [(1e-9, "hold out"), (1 - 1e-9, "train on")])
def test_a_split_with_an_empty_side_is_refused(data, fraction, side):
    with pytest.raises(UserError, match=side):
        hold_out(data, fraction, seed=0)
