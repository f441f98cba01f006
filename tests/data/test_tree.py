"""The radix merge against definitions that look at one sequence, or one pair of tokens, at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from silva.engine.data.chat import TokenSequence
from silva.engine.data.packing import ABSENT, Piece, first_fit_decreasing, pack_row
from silva.engine.data.tree import merge, merged_size
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
def test_every_sequence_is_a_path_and_every_prefix_stands_once(sequences):
    tree = merge(sequences)
    prefixes = {tuple(s.tokens[:n].tolist()) for s in sequences for n in range(1, len(s.tokens) + 1)}
    assert len(tree) == len(prefixes) == merged_size(sequences)
    for sequence, last in zip(sequences, tree.last, strict=True):
        path = ancestors(tree, last)
        assert tree.tokens[path].tolist() == sequence.tokens.tolist()
        assert tree.position[path].tolist() == list(range(len(path)))
    assert tree.unrolled == sum(len(s.tokens) for s in sequences)


@settings(max_examples=300, deadline=None)
@given(groups(), st.integers(0, 2**31))
def test_spans_sum_to_each_sequences_scored_tokens(sequences, seed):
    tree = merge(sequences)
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


@settings(max_examples=100, deadline=None)
@given(st.lists(groups(), max_size=4), st.integers(1, 8))
def test_a_row_holds_its_trees_unchanged(list_of_sequences, multiple):
    pieces = []
    for sequences in list_of_sequences:
        tree = merge(sequences)
        n = len(sequences)
        comparisons = np.array([[0, n - 1], [ABSENT, 0]], np.int32)
        pieces.append(Piece(tree, np.arange(n), comparisons, np.array([True, False])))
    row = pack_row(pieces, multiple=multiple, pad_id=9)
    length = sum(len(p.tree) for p in pieces)
    assert len(row.tokens) % multiple == 0
    assert len(row.tokens) - length < multiple or length == 0
    assert (row.tokens[length:] == 9).all()
    assert (row.subtree_end[length:] == torch.arange(length, len(row.tokens)) + 1).all()
    start, first = 0, 0
    for piece, sequences in zip(pieces, list_of_sequences, strict=True):
        stop = start + len(piece.tree)
        assert (row.subtree_end[start:stop] <= stop).all()
        assert (row.position[start:stop].numpy() == piece.tree.position).all()
        for k, sequence in enumerate(sequences):
            end = int(row.last[first + k])
            path = (row.subtree_end[: end + 1] > end).nonzero()[:, 0]
            assert row.tokens[path].tolist() == sequence.tokens.tolist()
        start, first = stop, first + len(sequences)
    assert row.comparisons.shape == (2 * len(pieces), 2)
    assert int((row.comparisons == ABSENT).sum()) == len(pieces)
    values = torch.ones(len(row.source), dtype=torch.float64)
    sums = sequence_sums(values, row.span, row.span_pointer, row.span_index)
    assert sums.tolist() == row.scored.tolist()


def test_reference_logprobs_follow_their_sequences():
    tree = merge([TokenSequence(np.array([1, 2], np.int32), np.array([False, True]))])
    none = np.zeros((0, 2), np.int32), np.zeros(0, bool)
    pieces = [Piece(tree, np.array([i]), *none) for i in (3, 0)]
    row = pack_row(pieces, multiple=1, pad_id=0, reference_logprob=np.array([0.5, 1.5, 2.5, 3.5], np.float32))
    assert row.reference_logprob.tolist() == [3.5, 0.5]


@given(st.lists(st.integers(1, 20), max_size=40))
def test_first_fit_decreasing_fills_bins(lengths):
    bins = first_fit_decreasing(lengths, 20)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= 20 for b in bins)
    # Johnson's bound, with the sum of the lengths as the lower bound of the optimum
    assert len(bins) <= 11 / 9 * max(1, len(lengths)) + 1
    assert sum(sum(lengths[i] for i in b) * 2 <= 20 for b in bins) <= 1  # two half-empty bins would be one


def test_an_item_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="21 tokens"):
        first_fit_decreasing([3, 21], 20)
