"""Front-coded groups: nothing is lost, and subset sizes follow from the shared lengths alone."""

import numpy as np
import pytest

from silva.engine.data.chat import TokenSequence
from silva.engine.data.group import ABSENT, TokenGroup


def sequences(random: np.random.Generator, count: int) -> list[TokenSequence]:
    """Each continues a prefix of an earlier one; some are equal, some prefixes of others."""
    made: list[TokenSequence] = []
    for _ in range(count):
        tokens = random.integers(0, 40_000, random.integers(1, 12))
        if made:
            stem = made[random.integers(len(made))].tokens
            tokens = np.r_[stem[: random.integers(len(stem) + 1)], tokens[: random.integers(1, 12)]]
        made.append(TokenSequence(tokens.astype(np.int32), random.random(len(tokens)) < 0.5))
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
    assert sorted((s.tokens.tolist(), s.scored.tolist()) for s in group.sequences()) == scored


@pytest.mark.parametrize("seed", range(20))
def test_the_size_of_a_subset_is_its_number_of_distinct_prefixes(seed):
    random = np.random.default_rng(seed)
    group = TokenGroup.of(sequences(random, 8))
    assert group.merged_size(np.arange(len(group))) == len(group.tokens)
    for _ in range(20):
        members = np.flatnonzero(random.random(len(group)) < 0.5)
        prefixes = {
            tuple(group.sequence(int(k)).tokens[: n + 1]) for k in members for n in range(group.length[k])
        }
        assert group.merged_size(members) == len(prefixes)


def test_no_sequences():
    group = TokenGroup.of([])
    assert len(group) == 0
    assert group.merged_size([]) == 0
