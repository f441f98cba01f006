"""Block lists against the mask itself, and the kernels' lists against plain torch's."""

import pytest
import torch
from forests import SHAPES, forest, forests, visible
from hypothesis import given, settings
from hypothesis import strategies as st

from silva.kernels import tree_blocks
from silva.kernels.tree_blocks import FULL, SKIPPED, TileShape

SIZES = [TileShape(16, 32), TileShape(32, 16), TileShape(8, 16), TileShape(16, 16, by_key=True)]


def options_of(draw_window, picks, position):
    """What `tree_blocks` takes beside `subtree_end`."""
    options = {}
    if draw_window is not None:
        options |= {"position": position, "window": draw_window}
    if picks is not None:
        options["query_index"] = torch.tensor(
            [pick % len(position) for pick in picks] if len(position) else [], dtype=torch.int32
        )
    return options


def check(end, position, options, device):
    on_device = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in options.items()
    }
    blocks = tree_blocks.tree_blocks(end.to(device), SIZES, **on_device)
    sees = visible(end, position, window=options.get("window"), query_index=options.get("query_index"))
    plain = tree_blocks.blocks_without_lists(
        end, *(options.get(name) for name in ("position", "window", "query_index"))
    )
    for shape in SIZES:
        kind = tree_blocks.classify(plain, shape)
        n_q, n_k = (-(-n // size) for n, size in zip(sees.shape, shape[:2], strict=True))
        assert kind.shape == (n_q, n_k)
        # brute force: a full tile has every pair, a skipped one none
        exists = torch.zeros(n_q * shape.queries, n_k * shape.keys, dtype=torch.bool)
        exists[: sees.shape[0], : sees.shape[1]] = sees
        pairs = exists.view(n_q, shape.queries, n_k, shape.keys).sum((1, 3))
        assert (pairs[kind == FULL] == shape.queries * shape.keys).all()
        assert (pairs[kind == SKIPPED] == 0).all()
        if not options:  # consecutive rows without a window: the test is exact
            assert (pairs[kind != SKIPPED] > 0).all()
            assert (pairs[kind != FULL] < shape.queries * shape.keys).all()
        expected, found = tree_blocks._lists(plain, shape), blocks.lists[shape]
        for row in range(expected.entries.shape[0]):
            assert found.full[row] == expected.full[row]
            assert found.total[row] == (total := expected.total[row])
            assert found.entries[row, :total].tolist() == expected.entries[row, :total].tolist()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("window", [None, 7])
def test_lists_of_plain_shapes(name, window, device):
    end, position = forest(SHAPES[name])
    check(end, position, options_of(window, None, position), device)


@settings(max_examples=25, deadline=None)
@given(
    forests(),
    st.none() | st.integers(1, 50),
    st.none() | st.lists(st.integers(0, 400), max_size=50) | st.integers(0, 5).map(lambda n: range(32 * n)),
)
def test_lists_of_random_forests(row, window, picks):
    end, position = row
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check(end, position, options_of(window, picks, position), device)


def test_lists_longer_than_one_step(device, monkeypatch):
    monkeypatch.setattr(tree_blocks, "STEP", 4)
    end, position = forest([(50, 0), (30, 20), (45, 75), (90, 10), (30, 0)])
    check(end, position, {}, device)


def test_equal_shapes_are_built_once(device):
    end = forest(SHAPES["a star"])[0].to(device)
    shape = TileShape(16, 16)
    assert list(tree_blocks.tree_blocks(end, [shape, shape]).lists) == [shape]


def test_a_window_needs_positions(device):
    with pytest.raises(ValueError, match="position"):
        tree_blocks.tree_blocks(torch.tensor([1], device=device), SIZES, window=3)
