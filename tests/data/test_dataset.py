"""What an epoch takes: mixtures by count and weight, and what is held out."""

from __future__ import annotations

import numpy as np
import pytest

from silva.engine.data import dataset
from silva.engine.data.dataset import DataSet, hold_out
from silva.engine.data.trees.group import TokenGroup, TokenSequence, instruction_digest
from silva.engine.errors import UserError
from silva.engine.recipe.schema import Source


def group(number: int, comparisons: int, random: np.random.Generator) -> TokenGroup:
    prompt = random.integers(0, 50, 10)
    sequences = []
    for _ in range(2 * comparisons):
        answer = random.integers(0, 50, random.integers(1, 30))
        scored = np.r_[np.zeros(len(prompt), bool), np.ones(len(answer), bool)]
        sequences.append(TokenSequence(np.r_[prompt, answer].astype(np.int32), scored))
    pairs = np.arange(2 * comparisons).reshape(-1, 2)
    return TokenGroup.of(sequences, pairs, [True] * comparisons, instruction_digest(f"question {number}"))


@pytest.fixture
def groups() -> list[TokenGroup]:
    random = np.random.default_rng(0)
    return [group(k, int(random.integers(1, 6)), random) for k in range(40)]


def share(data: DataSet, seed: int = 0, **wanted: float) -> DataSet:
    return dataset._share(data, Source(path="x", format="preference", **wanted), "comparison", seed)


def taken(data: DataSet) -> int:
    """Comparisons of an epoch."""
    return int(data.units("comparison")[data.order(0, shuffle=True, seed=1)].sum())


def test_trees_come_back_numbered_through(groups):
    data = DataSet.of(groups)
    assert (data.sequences, data.comparisons) == (
        sum(map(len, groups)),
        sum(len(g.comparisons) for g in groups),
    )
    sequences = comparisons = 0
    for k, group in enumerate(groups):
        found = data.group(k)
        assert (found.first_sequence, found.first_comparison) == (sequences, comparisons)
        assert found.sequence(0).tokens.tolist() == group.sequence(0).tokens.tolist()
        assert data.units("sequence")[k] == len(group)
        assert data.tokens[k] == len(group.tokens)
        sequences, comparisons = sequences + len(group), comparisons + len(group.comparisons)


def test_the_fingerprint_covers_every_token_and_the_mixture(groups):
    data = DataSet.of(groups)
    prints = {data.fingerprint, data.with_copies(np.full(len(data), 2)).fingerprint}
    changed = groups[0].paths()
    changed[0].scored[-1] = False
    pairs = groups[0].comparisons
    other = [TokenGroup.of(changed, pairs, groups[0].absolute, groups[0].instruction), *groups[1:]]
    prints |= {DataSet.of(other).fingerprint, DataSet.of(groups[1:]).fingerprint}
    assert len(prints) == 4
    assert DataSet.of(groups).fingerprint == data.fingerprint


@pytest.mark.parametrize(
    "wanted", [{"count": 30}, {"weight": 0.25}, {"weight": 2.5}, {"weight": 3}, {"count": 1}]
)
def test_a_source_gives_the_share_it_is_asked_for(groups, wanted):
    data = DataSet.of(groups)
    expected = wanted.get("count") or wanted["weight"] * data.comparisons
    found = share(data, **wanted)
    # whole trees: at most one tree more than asked for
    assert expected <= taken(found) + 0.5
    assert taken(found) < expected + data.units("comparison").max()
    weight = expected / data.comparisons
    assert set(found.copies) <= {int(np.floor(weight)), int(np.ceil(weight))}


def test_a_draw_depends_on_instructions_and_seed_alone(groups):
    def drawn(data: DataSet, seed: int) -> set[bytes]:
        return {row.tobytes() for row in share(data, seed, count=40).instructions}

    data = DataSet.of(groups)
    assert drawn(data, 0) == drawn(DataSet.of(groups[::-1]), 0)
    assert drawn(data, 0) != drawn(data, 1)
    # a larger count keeps what a smaller one had
    assert drawn(data, 0) <= {row.tobytes() for row in share(data, 0, count=70).instructions}


def test_a_count_beyond_the_source_is_refused(groups):
    data = DataSet.of(groups)
    assert taken(share(data, count=data.comparisons)) == data.comparisons
    with pytest.raises(UserError, match=rf"count is 5000, but it gives {data.comparisons} comparisons"):
        share(data, count=5000)


def test_an_order_is_a_function_of_seed_and_epoch(groups):
    data = DataSet.joined([DataSet.of(groups[:25]), DataSet.of(groups[25:]).with_copies(np.full(15, 2))])
    orders = [data.order(epoch, shuffle=True, seed=5) for epoch in (0, 0, 1)]
    assert orders[0].tolist() == orders[1].tolist() != orders[2].tolist()
    expected = [*range(25), *np.repeat(np.arange(25, 40), 2).tolist()]
    assert sorted(orders[2].tolist()) == expected == data.order(3, shuffle=False, seed=5).tolist()


def test_stages_hold_out_the_same_instructions(groups):
    """Even where one stage keeps only some of the other's trees."""
    data, some = DataSet.of(groups), DataSet.of(groups[::3])

    def names(part: DataSet) -> set[bytes]:
        return {row.tobytes() for row in part.instructions}

    train, held = hold_out(data, 0.3, seed=1)
    few_train, few_held = hold_out(some, 0.3, seed=1)
    assert names(train) | names(held) == names(data)
    assert not names(train) & names(held)
    assert names(few_held) == names(held) & names(some)
    assert names(few_train) == names(train) & names(some)
    assert names(hold_out(data, 0.3, seed=2)[1]) != names(held)


@pytest.mark.parametrize(("fraction", "side"), [(1e-9, "hold out"), (1 - 1e-9, "train on")])
def test_a_split_with_an_empty_side_is_refused(groups, fraction, side):
    with pytest.raises(UserError, match=side):
        hold_out(DataSet.of(groups), fraction, seed=0)
