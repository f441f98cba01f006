"""How a row's tokens are dealt to context-parallel processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from forests import forests
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import random_models, ultrainteract
from silva.engine.data.trees.packing import Piece, TreeBatch, pack_row
from silva.engine.data.trees.row_share import LARGEST_BLOCK, deal, share_of
from silva.engine.data.trees.tree import merge


def padded(position: torch.Tensor, multiple: int) -> np.ndarray:
    size = max(1, -(-len(position) // multiple)) * multiple
    return np.pad(position.numpy(), (0, size - len(position)))


@given(
    forests(longest_run=300),
    st.integers(1, 8),
    st.sampled_from([1, 4, 16, 128, 256]),
    st.sampled_from([None, 1, 40]),
)
@settings(max_examples=60, deadline=None)
def test_every_token_is_dealt_once_and_all_get_equally_many(forest, ranks, unit, window):
    position = padded(forest[1], ranks * unit)
    dealt = deal(position, ranks, window=window)
    assert dealt.shape == (ranks, len(position) // ranks)
    assert sorted(dealt.reshape(-1).tolist()) == list(range(len(position)))
    assert (np.diff(dealt, axis=1) > 0).all()
    # whole blocks: as large as the row's length allows, never larger than the kernels' tiles
    block = min(LARGEST_BLOCK, unit)
    runs = dealt.reshape(ranks, -1, block)
    assert (runs[:, :, 0] % block == 0).all()
    assert (np.diff(runs, axis=2) == 1).all()


def test_a_row_that_cannot_be_dealt_evenly_is_refused():
    with pytest.raises(ValueError, match=r"a row of 50 tokens cannot be divided among 4"):
        deal(np.zeros(50, np.int32), 4)


def row_of_trees(size: int, seed: int) -> TreeBatch:
    """UltraInteract-shaped trees, as many as the row takes."""
    pieces: list[Piece] = []
    length = 0
    for group in ultrainteract.groups(64, seed=seed):
        tree = merge(group)
        if length + len(tree) <= size:
            none = np.zeros((0, 2), np.int32), np.zeros(0, bool)
            pieces.append(Piece(tree, np.arange(len(tree.last)), *none))
            length += len(tree)
    return pack_row(pieces, multiple=size, pad_id=0)


def zigzag(position: np.ndarray, ranks: int) -> np.ndarray:
    """What balances one causal sequence: of 2 R equal parts each process takes one from either end."""
    parts = np.arange(len(position)).reshape(2 * ranks, -1)
    return np.array([np.concatenate([parts[rank], parts[-rank - 1]]) for rank in range(ranks)])


def slowest_over_mean(position: np.ndarray, dealt: np.ndarray) -> float:
    work = (position[dealt] + 1).sum(1)
    return float(work.max() / work.mean())


def test_attention_work_is_even_where_zigzag_is_not():
    worst = {"zigzag": 1.0, "dealt": 1.0}
    for seed in range(5):
        for ranks, size in ((2, 8192), (4, 16384), (8, 32768)):
            position = row_of_trees(size, seed).position.numpy()
            worst["zigzag"] = max(worst["zigzag"], slowest_over_mean(position, zigzag(position, ranks)))
            worst["dealt"] = max(worst["dealt"], slowest_over_mean(position, deal(position, ranks)))
    assert worst["dealt"] < 1.02  # a few percent is what data-parallel ranks are allowed
    assert worst["zigzag"] > 1.15
    # one long document, for which zigzag is exact but for the blocks' size
    long = np.arange(32768)
    assert slowest_over_mean(long, deal(long, 8)) < 1.01


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shares_put_together_are_the_row(ranks):
    row = random_models.row([random_models.sequences(6, seed) for seed in range(3)], multiple=4 * ranks)
    shares = [share_of(row, rank, ranks) for rank in range(ranks)]
    for share in shares:
        assert torch.equal(share.dealt, torch.cat([each.index for each in shares]).long())
        # what all processes hold, behind each other, taken in the row's order
        assert torch.equal(row.tokens[share.dealt][share.place], row.tokens)
    for part, whole, where in (("source", row.source, "scored"), ("last", row.last, "ended")):
        found = torch.full_like(whole, -1)
        for share in shares:
            chosen = getattr(share, where)
            assert (found[chosen] == -1).all()  # no position on two processes
            found[chosen] = share.index[getattr(share, part).long()]
        assert torch.equal(found, whole)


def test_a_share_of_padding_alone_has_no_positions():
    row = pack_row([], multiple=64, pad_id=0)
    share = share_of(row, 1, 2)
    assert len(share.index) == 32
    assert len(share.source) == len(share.scored) == len(share.last) == len(share.ended) == 0
