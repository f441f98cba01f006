"""Front-coded groups: nothing is lost, and subset sizes follow from the shared lengths alone."""

import numpy as np
import pytest

from benchmarks import random_models
from silva.engine.data.trees.group import ABSENT, TokenGroup, TokenSequence, front_code


def sequences(random: np.random.Generator, count: int) -> list[TokenSequence]:
    """Each continues a prefix of an earlier one; some are equal, some prefixes of others."""
    made = random_models.sequences(count, int(random.integers(2**31)))
    return [*made, made[0], TokenSequence(made[-1].tokens[:1], np.zeros(1, bool))]


@pytest.mark.parametrize("seed", range(20))
def test_every_sequence_comes_back(seed):
    random = np.random.default_rng(seed)
    given = sequences(random, int(random.integers(1, 9)))
    # each sequence is compared with the first: the renumbering shows in what the indices lead to
    group = TokenGroup.of(
        given, [(k, 0) for k in range(len(given))] + [(ABSENT, 1)], [True] * (len(given) + 1)
    )
    for number, (chosen, rejected) in enumerate(group.comparisons[:-1]):
        found = group.sequence(int(chosen))
        assert found.tokens.tolist() == given[number].tokens.tolist()
        assert group.sequence(int(rejected)).tokens.tolist() == given[0].tokens.tolist()
    assert group.comparisons[-1, 0] == ABSENT
    scored = sorted((s.tokens.tolist(), s.scored.tolist()) for s in given)
    assert sorted((s.tokens.tolist(), s.scored.tolist()) for s in group.paths()) == scored
    assert group.scored.tolist() == [s.scored.sum() for s in group.paths()]


@pytest.mark.parametrize("seed", range(20))
def test_a_subset_is_the_group_of_its_members(seed):
    random = np.random.default_rng(seed)
    group = TokenGroup.of(sequences(random, 8))
    whole = np.arange(len(group))
    assert group.merged_size(whole)[0] == len(group.tokens)
    for members in [whole, whole[:0], *(np.flatnonzero(random.random(len(group)) < 0.5) for _ in range(20))]:
        expected = [group.sequence(int(k)) for k in members]
        part = group.subset(members)
        for found, sequence in zip(part.paths(), expected, strict=True):
            assert found.tokens.tolist() == sequence.tokens.tolist()
            assert found.scored.tolist() == sequence.scored.tolist()
        # a token of the tree is a distinct prefix, and sees as many tokens as that has
        prefixes = {tuple(s.tokens[: n + 1]) for s in expected for n in range(len(s.tokens))}
        assert group.merged_size(members) == (len(prefixes), sum(map(len, prefixes)))
        assert len(part.tokens) == len(prefixes)


@pytest.mark.parametrize("seed", range(20))
def test_the_order_is_depth_first_and_of_siblings_the_larger_subtree_comes_first(seed):
    given = [s.tokens for s in sequences(np.random.default_rng(seed), 9)]
    order, shared = front_code(given)
    paths = [tuple(given[k]) for k in order]
    for before, after, n in zip(paths, paths[1:], shared[1:], strict=False):
        assert before[:n] == after[:n]
        assert before[n : n + 1] != after[n : n + 1] or n == min(len(before), len(after))
    tree = {path[:n] for path in paths for n in range(1, len(path) + 1)}
    size = {node: sum(other[: len(node)] == node for other in tree) for node in tree}
    first = {}  # the first place at which each node is met
    for place, path in enumerate(paths):
        for n in range(1, len(path) + 1):
            node = path[:n]
            # depth-first: a subtree that was left is not entered again
            assert first.setdefault(node, place) == place or paths[place - 1][:n] == node
    for node in tree:
        siblings = [other for other in tree if other[:-1] == node[:-1] and first[other] > first[node]]
        assert all(size[node] >= size[other] for other in siblings)


def test_no_sequences():
    group = TokenGroup.of([])
    assert len(group) == 0
    assert group.merged_size(np.zeros(0, np.int64)) == (0, 0)
