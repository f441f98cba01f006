"""The radix merge against definitions that look at one sequence, or one pair of tokens, at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from silva.engine.data.trees.group import ABSENT, TokenGroup, TokenSequence
from silva.engine.data.trees.tree import merge
from silva.kernels.reference import sequence_sums


@st.composite
def groups(draw):
    """Sequences over three letters, so that prefixes, repeats and whole duplicates are common."""
    sequences = []
    for _ in range(draw(st.integers(1, 7))):
        tokens = draw(st.lists(st.integers(0, 2), min_size=1, max_size=12))
        scored = [False, *draw(st.lists(st.booleans(), min_size=len(tokens) - 1, max_size=len(tokens) - 1))]
        sequences.append(TokenSequence(np.array(tokens, np.int32), np.array(scored)))
    return sequences


def ancestors(tree, index):
    """The path from the root to a token, by the mask's definition alone."""
    return [j for j in range(index + 1) if tree.subtree_end[j] > index]


@settings(max_examples=300, deadline=None)
@given(groups())
def test_every_sequence_is_a_path_and_every_prefix_stands_once(given_sequences):
    group = TokenGroup.of(given_sequences)
    tree, sequences = merge(group), group.paths()
    prefixes = {tuple(s.tokens[:n].tolist()) for s in sequences for n in range(1, len(s.tokens) + 1)}
    assert len(tree) == len(prefixes)
    for sequence, last in zip(sequences, tree.last, strict=True):
        path = ancestors(tree, last)
        assert tree.tokens[path].tolist() == sequence.tokens.tolist()
        assert tree.position[path].tolist() == list(range(len(path)))
    assert tree.unrolled == sum(len(s.tokens) for s in sequences)


@settings(max_examples=300, deadline=None)
@given(groups(), st.integers(0, 2**31))
def test_spans_sum_to_each_sequences_scored_tokens(given_sequences, seed):
    group = TokenGroup.of(given_sequences)
    tree, sequences = merge(group), group.paths()
    value_of_token = np.random.default_rng(seed).standard_normal(len(tree))
    scored_token = {}  # token -> its place among the scored positions
    for place, (source, target) in enumerate(zip(tree.source, tree.target, strict=True)):
        children = [
            t
            for t in range(len(tree))
            if tree.tokens[t] == target
            and tree.position[t] == tree.position[source] + 1
            and source < t < tree.subtree_end[source]
        ]
        assert len(children) == 1  # a scored position is one edge of the tree
        scored_token[children[0]] = place
    values = torch.zeros(len(tree.source), dtype=torch.float64)
    for token, place in scored_token.items():
        values[place] = value_of_token[token]
    arrays = (torch.from_numpy(a) for a in (tree.span, tree.span_pointer, tree.span_index))
    sums = sequence_sums(values, *arrays)
    for k, (sequence, last) in enumerate(zip(sequences, tree.last, strict=True)):
        path = np.array(ancestors(tree, last))
        # 1e-12: sums of at most a few dozen numbers of order one, in another order
        assert float(sums[k]) == pytest.approx(value_of_token[path[sequence.scored]].sum(), abs=1e-12)
        assert tree.scored[k] == sequence.scored.sum()
    assert (np.diff(tree.span) >= 0).all()


@settings(max_examples=200, deadline=None)
@given(groups())
def test_a_span_is_as_long_as_the_same_sequences_run_through_it(given_sequences):
    """No more spans than needed: neighbouring positions of one radix node that the same sequences score are one."""
    group = TokenGroup.of(given_sequences)
    tree, sequences = merge(group), group.paths()
    through = {}  # prefix -> sequences that run through it, and those that score it
    for k, s in enumerate(sequences):
        for n in range(1, len(s.tokens) + 1):
            prefix = tuple(s.tokens[:n].tolist())
            runs, scores = through.setdefault(prefix, (set(), set()))
            runs.add(k)
            scores |= {k} if s.scored[n - 1] else set()
    needed = sum(
        bool(scores) and through.get(prefix[:-1]) != (runs, scores)
        for prefix, (runs, scores) in through.items()
    )
    assert len(set(tree.span.tolist())) == needed
    assert tree.span.tolist() == sorted(tree.span.tolist())
    assert set(tree.span_index.tolist()) == set(range(needed))


@settings(max_examples=200, deadline=None)
@given(groups(), st.integers(0, 2**31))
def test_a_sequence_of_several_paths_has_the_spans_of_all(given_paths, seed):
    random = np.random.default_rng(seed)
    owner = np.unique(random.integers(0, 4, len(given_paths)), return_inverse=True)[1].tolist()
    count = max(owner) + 1
    # a comparison with nothing tells which number each sequence has got
    group = TokenGroup.of(given_paths, [(k, ABSENT) for k in range(count)], [False] * count, owner=owner)
    alone = TokenGroup.of(given_paths)
    tree, single = merge(group), merge(alone)
    assert len(group) == count
    for name in ("tokens", "position", "subtree_end", "source", "target", "span", "unrolled"):
        assert np.array_equal(getattr(tree, name), getattr(single, name)), name
    for given_number, (number, _) in enumerate(group.comparisons.tolist()):
        paths = group.paths_of(number)
        mine = [(p.tokens.tolist(), p.scored.tolist()) for p in map(group.path, paths)]
        wanted = [
            (p.tokens.tolist(), p.scored.tolist())
            for p, k in zip(given_paths, owner, strict=True)
            if k == given_number
        ]
        assert sorted(mine) == sorted(wanted)
        spans = tree.span_index[tree.span_pointer[number] : tree.span_pointer[number + 1]].tolist()
        each = [
            single.span_index[single.span_pointer[k] : single.span_pointer[k + 1]].tolist() for k in paths
        ]
        assert sorted(spans) == sorted(span for part in each for span in part)
        assert tree.scored[number] == group.scored[number] == sum(single.scored[k] for k in paths)
        members = np.array(paths)
        part = group.subset(members)
        assert len(part) == 1
        assert [p.tokens.tolist() for p in part.paths()] == [group.path(k).tokens.tolist() for k in paths]
    if count < len(given_paths):
        several = next(k for k in range(count) if len(group.paths_of(k)) > 1)
        with pytest.raises(ValueError, match="unpack"):
            group.sequence(several)


def test_no_sequences():
    tree = merge(TokenGroup.of([]))
    assert len(tree) == len(tree.source) == len(tree.last) == tree.unrolled == 0
    assert tree.span_pointer.tolist() == [0]
