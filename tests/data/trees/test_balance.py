"""Rows that hold everything once; ranks that are near-equal."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import ultrainteract
from silva.engine.data.trees.balance import BY_TOKENS, CostModel, spread
from silva.engine.data.trees.group import TokenGroup, TokenSequence
from silva.engine.data.trees.splitting import Part
from silva.engine.model import flops
from silva.engine.planning.named_models import NAMED

MISTRAL = flops.row_cost(NAMED["mistral-7b"], "lm")


def parts(groups: list[TokenGroup]) -> list[Part]:
    return [
        Part.whole(g, np.arange(len(g)), g.comparisons.tolist(), range(len(g.comparisons))) for g in groups
    ]


def documents(lengths: list[int]) -> list[Part]:
    """Trees of one sequence each."""
    zeros = [TokenSequence(np.zeros(n, np.int32), np.zeros(n, bool)) for n in lengths]
    return [Part.whole(TokenGroup.of([s]), np.arange(1), [[0]]) for s in zeros]


def loads(plan: list[list[list[Part]]], cost: CostModel) -> list[float]:
    return [sum(cost(p.tokens, p.pairs) for row in rows for p in row) for rows in plan]


def batches(size: int, count: int) -> list[list[Part]]:
    """Global batches of `size` comparisons, the tree at the end cut there."""
    found: list[list[Part]] = [[]]
    room = size
    for group in ultrainteract.groups(size * count, seed=1):
        pairs = group.comparisons.tolist()
        while pairs and len(found) <= count:
            found[-1].append(Part.whole(group, np.arange(len(group)), pairs[:room], range(len(pairs[:room]))))
            pairs, room = pairs[room:], room - len(pairs[:room])
            if not room:
                found.append([])
                room = size
    return found[:count]


@pytest.mark.parametrize(("ranks", "multiple"), [(1, 1), (3, 1), (4, 2), (64, 1), (64, 2)])
@pytest.mark.parametrize("row_length", [2200, 4096, 20_000])
def test_every_comparison_lies_in_one_row_that_is_not_too_long(ranks, multiple, row_length):
    drawn = ultrainteract.groups(40, scale=0.5)
    groups = [g for g in drawn if max(g.merged_size(np.sort(pair))[0] for pair in g.comparisons) <= 2200]
    assert len(groups) > 30
    cost = MISTRAL
    plan = spread(parts(groups), cost, ranks=ranks, row_length=row_length, multiple=multiple)
    assert len(plan) == ranks
    [rows] = {len(rows) for rows in plan}
    assert rows % multiple == 0
    everything = [part for rank in plan for row in rank for part in row]
    assert sorted((id(p.group), unit) for p in everything for unit in p.compared) == sorted(
        (id(group), unit) for group in groups for unit in range(len(group.comparisons))
    )
    assert max(sum(p.tokens for p in row) for rank in plan for row in rank) <= row_length


@pytest.mark.parametrize("seed", range(30))
def test_rows_are_few_and_items_as_tight_as_they_come_still_fit(seed):
    random = np.random.default_rng(seed)
    rows = [random.multinomial(90, [0.2] * 5) + 2 for _ in range(12)]  # 12 rows of 100 tokens, exactly full
    lengths = random.permutation(np.concatenate(rows)).tolist()
    for ranks in (1, 2, 4):
        plan = spread(documents(lengths), BY_TOKENS, ranks=ranks, row_length=100)
        # Johnson's bound for first-fit decreasing, 11/9 of the optimum and 1, rounded up to whole ranks
        assert len(plan[0]) <= -(-(11 * 12 / 9 + 1) // ranks)


def test_nothing_to_spread_gives_empty_rows():
    assert spread([], BY_TOKENS, ranks=3, row_length=10, multiple=2) == [[[], []]] * 3


def test_a_unit_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="21 tokens"):
        spread(documents([3, 21]), BY_TOKENS, ranks=1, row_length=20)


def test_the_plan_is_the_same_every_time():
    groups = ultrainteract.groups(40)

    def plan() -> list:
        found = spread(parts(groups), MISTRAL, ranks=16, row_length=8192)
        return [[[(p.members.tolist(), p.tokens) for p in row] for row in rank] for rank in found]

    assert plan() == plan()


# (comparisons, ranks, slowest over the mean of these rows, slowest over the mean of uncut rows); measured on the
# batches of six seeds: at most 1.01, 1.007, see below, 1.01. With two trees a rank one comparison alone is more than
# a rank's share, 1.2 to 1.55 times: nothing can be faster than it.
@pytest.mark.parametrize(
    ("size", "ranks", "imbalance", "makespan"),
    [(64, 8, 1.03, 1.03), (256, 8, 1.02, 1.02), (256, 64, 1.1, 1.22), (512, 64, 1.03, 1.03)],
)
def test_the_slowest_rank_is_near_the_mean(size, ranks, imbalance, makespan):
    cost = MISTRAL
    for batch in batches(size, 2):
        found = loads(spread(batch, cost, ranks=ranks, row_length=8192), cost)
        uncut = sum(cost(part.tokens, part.pairs) for part in batch) / ranks
        largest = max(cost(*part.group.merged_size(np.unique(need))) for part in batch for need in part.needs)
        if largest < uncut:
            assert max(found) * ranks / sum(found) < imbalance
        assert max(found) / uncut < max(makespan, 1.01 * largest / uncut)


def test_where_one_comparison_is_more_than_a_ranks_share_it_alone_is_the_slowest_rank():
    [batch] = batches(64, 1)
    cost = MISTRAL
    largest = max(cost(*part.group.merged_size(np.unique(need))) for part in batch for need in part.needs)
    assert max(loads(spread(batch, cost, ranks=64, row_length=8192), cost)) == pytest.approx(largest)
