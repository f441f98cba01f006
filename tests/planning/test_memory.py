"""The pipeline's order on every stage is megatron-core's, and what it holds follows from it."""

from __future__ import annotations

from silva.engine.parallel import groups
from silva.engine.parallel.forked import isolated

import pytest
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table
from torch.testing._internal.distributed.fake_pg import FakeStore

from silva.engine.planning.built import Chunk
from silva.engine.planning.memory import held, schedule
from silva.engine.planning.meter import Cost
from silva.engine.recipe.schema import Parallel


def megatrons(stages: int, chunks: int, micro_batches: int, place: int) -> tuple[int, list[int]]:
    """Forward passes before the first backward pass, and the chunk of every forward pass."""
    from megatron.core import parallel_state

    state = parallel_state.__dict__
    original = state["create_group"]
    state["create_group"] = lambda *args, **options: original(*args, **options | {"backend": "fake"})
    dist.init_process_group("fake", rank=place, world_size=stages, store=FakeStore())
    groups.initialize(Parallel(pipeline=stages, virtual_pipeline=chunks if chunks > 1 else None))
    _, _, ahead, _ = get_pp_rank_microbatches(micro_batches, chunks, stages)
    table = get_schedule_table(micro_batches, chunks, stages)
    return ahead, [chunk for _, chunk in table]


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("rounds", [1, 3])
def test_the_order_is_megatrons(stages, chunks, rounds):
    count = stages * rounds
    for place in range(stages):
        order = [*schedule(chunks, place, stages, count)]
        ahead, chunk_of = isolated(megatrons, stages, chunks, count, place)
        first_backward = next(k for k, (_, forward) in enumerate(order) if not forward)
        # the steady state begins with a forward pass
        assert first_backward == min(ahead + 1, chunks * count)
        assert [chunk for chunk, forward in order if forward] == chunk_of
        assert [chunk for chunk, forward in order if not forward] == [
            chunks - 1 - chunk for chunk in chunk_of
        ]


@pytest.mark.parametrize(
    ("stages", "chunks", "count"), [(1, 1, 5), (3, 1, 2), (4, 1, 9), (4, 2, 8), (2, 4, 6)]
)
def test_no_backward_pass_comes_before_its_forward_pass(stages, chunks, count):
    for place in range(stages):
        alive = [0] * chunks
        for chunk, forward in schedule(chunks, place, stages, count):
            alive[chunk] += 1 if forward else -1
            assert alive[chunk] >= 0
        assert alive == [0] * chunks


def test_earlier_stages_hold_more():
    def chunk(saved: float) -> Chunk:
        return Chunk(1, 0, saved, 0, 0, Cost(), Cost())

    four = Parallel(pipeline=4)
    assert [held([chunk(2.0)], place, four, 9)[0] for place in range(4)] == [8, 6, 4, 2]
    assert held([chunk(2.0)], 0, four, 3) == (6.0, 3)  # never more than there are
    assert held([chunk(2.0)], 0, Parallel(), 9) == (2.0, 1)
    # two chunks on the first of four: 2 * 3 + 4 ahead and one more, five to eight of them of the first chunk
    interleaved = Parallel(pipeline=4, virtual_pipeline=2)
    assert held([chunk(1.0), chunk(1.0)], 0, interleaved, 8) == (11.0, 11)
