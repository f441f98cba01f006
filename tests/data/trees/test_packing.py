"""Packed rows: every tree lies in its row as it was, and padding sees only itself."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import random_models
from silva.engine.data.trees.group import ABSENT, TokenGroup, TokenSequence
from silva.engine.data.trees.packing import Piece, pack_row
from silva.engine.data.trees.tree import merge
from silva.kernels.reference import sequence_sums


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2**31), max_size=4), st.integers(1, 8))
def test_a_row_holds_its_trees_unchanged(seeds, multiple):
    groups = [TokenGroup.of(random_models.sequences(seed % 7 + 1, seed)) for seed in seeds]
    list_of_sequences = [group.paths() for group in groups]
    pieces = []
    for group, sequences in zip(groups, list_of_sequences, strict=True):
        tree = merge(group)
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
    tree = merge(TokenGroup.of([TokenSequence(np.array([1, 2], np.int32), np.array([False, True]))]))
    none = np.zeros((0, 2), np.int32), np.zeros(0, bool)
    pieces = [Piece(tree, np.array([i]), *none) for i in (3, 0)]
    row = pack_row(pieces, multiple=1, pad_id=0, reference_logprob=np.array([0.5, 1.5, 2.5, 3.5], np.float32))
    assert row.reference_logprob.tolist() == [3.5, 0.5]
