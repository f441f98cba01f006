"""A range of a weight's flat elements as boxes of the weight: nothing twice, nothing lost, whatever the shape."""

from __future__ import annotations

import itertools
import math

from silva.engine.parallel import emulation  # noqa: F401  before megatron

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from silva.engine.checkpoint.optimizer_state import boxes, boxes_of


@st.composite
def ranges(draw):
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    start, end = sorted(draw(st.integers(0, math.prod(shape))) for _ in range(2))
    return shape, start, end


@settings(deadline=None)
@given(ranges())
def test_boxes_are_the_range(case):
    shape, start, end = case
    flat = torch.arange(math.prod(shape)).view(shape)
    found = []
    for offset, size in boxes(shape, start, end):
        assert len(offset) == len(size) == len(shape)
        box = flat[tuple(slice(a, a + n) for a, n in zip(offset, size, strict=True))]
        assert box.shape == size
        found += box.flatten().tolist()
    assert found == list(range(start, end))  # in order: a box is a view of the flat values


@settings(deadline=None)
@given(ranges())
def test_there_are_few_boxes(case):
    shape, start, end = case
    assert len(list(boxes(shape, start, end))) <= 2 * len(shape) - 1


def part(
    rows: int, columns: int, *, layer: int = 1, layers: int = 3, rank: int = 1, ranks: int = 2
) -> ShardedTensor:
    """Of one layer's weight in a stack of layers, the rows of one tensor-parallel rank."""
    return ShardedTensor.from_rank_offsets(
        "w",
        torch.empty(rows, columns, device="meta"),
        (0, layer, layers),
        (1, rank, ranks),
        replica_id=(0, 0, 5),
        prepend_axis_num=1,
    )


@pytest.mark.parametrize("swiglu", [False, True], ids=["plain", "gate and up"])
@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 8 * 5), max_size=4))
def test_ranges_of_a_weight_make_up_its_part_of_the_whole(swiglu, cuts):
    """Whatever ranges the processes own: each element is written once, where megatron-core puts the model's own."""
    mine = part(8, 5)
    local = torch.arange(40.0).view(8, 5) + 1
    expected = torch.zeros(3, 16, 5)
    if swiglu:  # the whole is all gates, then all ups
        weight = apply_swiglu_sharded_factory(mine, ((0, 1, 3),))
        expected[1, 4:8], expected[1, 12:16] = local[:4], local[4:]
    else:
        weight = mine
        expected[1, 8:16] = local
    whole = torch.zeros(3, 16, 5)
    edges = [0, *sorted(cuts), 40]
    for start, end in itertools.pairwise(edges):
        values = local.flatten()[start:end].clone()
        for box in boxes_of(weight, "state.w", values, start):
            assert box.key == "state.w"
            assert box.replica_id == (0, 0, 0)
            assert box.global_shape == (3, 16, 5)
            assert (
                box.data.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
            )  # read in place
            target = whole[box.global_slice()]
            assert not target.any(), "written twice"
            target.copy_(box.data)
    assert torch.equal(whole, expected)
