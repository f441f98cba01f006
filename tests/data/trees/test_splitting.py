"""Cut trees: complete, within the limit, within the stated bound, and near the best of all set partitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from benchmarks import random_models, ultrainteract
from silva.engine.data.trees.group import TokenGroup
from silva.engine.data.trees.splitting import Part


def whole(group: TokenGroup, needs: list[list[int]]) -> Part:
    return Part.whole(group, np.arange(len(group)), needs, range(len(needs)))


def cut(part: Part, limit: int) -> list[Part]:
    return part.cut(lambda size: size[0] <= limit)


def tokens(group: TokenGroup, needs: list[list[int]]) -> int:
    """Of the merged tree, from the sequences themselves."""
    paths = [tuple(group.sequence(k).tokens) for need in needs for k in need]
    return len({path[:n] for path in paths for n in range(1, len(path) + 1)})


def cases(seed: int, *, pairs: bool, most: int = 7) -> tuple[TokenGroup, list[list[int]]]:
    """A random group and its units."""
    random = np.random.default_rng(seed)
    group = TokenGroup.of(random_models.sequences(int(random.integers(3, 9)), seed))
    if not pairs:
        return group, [[k] for k in range(len(group))][:most]
    return group, [random.permutation(len(group))[:2].tolist() for _ in range(random.integers(1, most))]


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_every_unit_is_in_one_part_and_sizes_are_true(seed, pairs):
    group, needs = cases(seed, pairs=pairs)
    part = whole(group, needs)
    assert part.tokens == tokens(group, needs)
    for limit in (1, part.tokens // 3, part.tokens // 2, part.tokens - 1, part.tokens):
        parts = cut(part, limit)
        assert sorted(unit for p in parts for unit in p.compared) == list(range(len(needs)))
        for p in parts:
            assert p.needs == [needs[unit] for unit in p.compared]
            assert (p.tokens, p.pairs) == group.merged_size(p.members)
            assert p.tokens <= limit or len(p.needs) == 1
    for halves in part.halves():
        assert sorted(unit for p in halves for unit in p.compared) == list(range(len(needs)))
        assert all((p.tokens, p.pairs) == group.merged_size(p.members) for p in halves)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_the_bound_of_the_docstring_holds(seed, pairs):
    group, needs = cases(seed, pairs=pairs, most=12)
    order = sorted(range(len(needs)), key=lambda unit: sorted(needs[unit]))
    whole_size = tokens(group, needs)
    largest = max(tokens(group, [need]) for need in needs)
    in_order = [needs[unit] for unit in order]
    crossing = [
        tokens(group, in_order[:k]) + tokens(group, in_order[k:]) - whole_size for k in range(1, len(needs))
    ]
    most = max(crossing, default=0)
    for limit in range(largest + most + 1, whole_size):
        repeated = sum(p.tokens for p in cut(whole(group, needs), limit)) - whole_size
        assert repeated < max(1, whole_size * most / (limit - largest - most))


def partitions(units: int) -> list[list[list[int]]]:
    """All partitions of a set."""
    found: list[list[list[int]]] = [[]]
    for unit in range(units):
        found = [
            [*blocks[:k], [*blocks[k], unit], *blocks[k + 1 :]]
            for blocks in found
            for k in range(len(blocks))
        ] + [[*blocks, [unit]] for blocks in found]
    return found


def least(group: TokenGroup, needs: list[list[int]], limit: int) -> int:
    """Fewest tokens of all set partitions whose blocks fit."""
    subsets = itertools.chain.from_iterable(
        itertools.combinations(range(len(needs)), n) for n in range(1, len(needs) + 1)
    )
    size = {
        units: group.merged_size(np.unique(np.concatenate([needs[u] for u in units])))[0] for units in subsets
    }
    totals = [[size[tuple(block)] for block in blocks] for blocks in partitions(len(needs))]
    return min(sum(sizes) for sizes in totals if max(sizes) <= limit)


@pytest.mark.parametrize("pairs", [False, True])
def test_on_trees_of_the_papers_shape_hardly_any_partition_is_better(pairs):
    totals, ratios = np.zeros(2, int), []
    for group in ultrainteract.groups(150, seed=3, scale=0.1):
        needs = group.comparisons.tolist() if pairs else [[k] for k in range(len(group))][:8]
        largest = max(tokens(group, [need]) for need in needs)
        part = whole(group, needs)
        for share in (0.9, 0.75, 0.6, 0.5):
            limit = int(share * part.tokens)
            if limit >= largest:
                found, best = sum(p.tokens for p in cut(part, limit)), least(group, needs, limit)
                totals += found, best
                ratios.append(found / best)
    assert len(ratios) > 50
    assert min(ratios) >= 1
    # measured: in sum 1.011 (sequences) and 1.005 (comparisons), at worst 1.26 and 1.10, optimal 97 % and 96 %
    assert totals[0] / totals[1] < 1.02
    assert max(ratios) < 1.3
    assert np.mean(np.array(ratios) == 1) > 0.9


def test_comparisons_are_kept_with_those_they_share_most_with():
    """Each of 3 chosen against each of 20 rejected: parts by chosen would hold every rejected one three times."""
    random = np.random.default_rng(0)
    texts = [random.integers(0, 1000, 50) for _ in range(23)]
    group = TokenGroup.of([random_models.TokenSequence(t.astype(np.int32), t < 500) for t in texts])
    for needs in (
        [[chosen, rejected] for chosen in range(3) for rejected in range(3, 23)],
        [[rejected, chosen] for chosen in range(20, 23) for rejected in range(20)],
    ):
        parts = cut(whole(group, needs), 400)
        # 8 sequences fit: the three and 5 of the twenty
        assert len(parts) == 4
        assert sum(p.tokens for p in parts) == 50 * (20 + 4 * 3)
