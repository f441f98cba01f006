"""The time model against figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from silva.engine.model.families.shape import ModelShape
from silva.engine.planning.built import Chunk, Job, Stage
from silva.engine.planning.hardware import Assumptions, Gpu
from silva.engine.planning.meter import Cost
from silva.engine.planning.step_time import Load, micro_batches, model_flops, step_time
from silva.engine.recipe.schema import Parallel, Training

SHAPE = ModelShape(
    layers=8, hidden=128, heads=4, kv_heads=2, head_dim=32, ffn=256, vocab=1000, rope_theta=1e4, norm_eps=1e-5,
    tied=False, window=None, architecture="llama", max_position=4096,
)  # fmt: skip
# powers of ten, so that the seconds expected below can be read off
GPU = Gpu("test", flops=1e12, memory=1e9, bandwidth=1e9, nvlink=1e9, network=1e8, host=1e7, per_node=8)
EXACT = Assumptions(products=1, attention=1, attention_backward=1, memory=1, links=1, hidden=1)
LOAD = Load(rows=8, tokens=8000, depth=100, scored=8000)


def job(world: int, **layout: Any) -> Job:
    parallel = Parallel(**layout)
    training = Training(global_batch=8, learning_rate=1e-3)
    return Job(SHAPE, parallel, training, "lm", torch.bfloat16, world, row_length=1000)


def stage(chunks: int = 1) -> Stage:
    forward, backward = Cost(1e12, 1e8, 2e8, 1, 0), Cost(2e12, 2e8, 4e8, 0, 1)
    chunk = Chunk(2, 10_000_000, 1e6, 0, 0, forward, backward)
    return Stage(2e7 * chunks, 4e7 * chunks, 1.2e8 * chunks, 0.0, [chunk] * chunks)


def test_one_gpu():
    found = step_time(job(1), [stage()], LOAD, GPU, EXACT)
    assert found.micro_batches == 8
    assert found.products == pytest.approx(8 * 3)
    assert found.elementwise == pytest.approx(8 * 0.3)
    assert found.tensor_parallel == pytest.approx(8 * 0.6)
    # 4 H D operations per pair of a token and a key it sees, and five products backward for two forward
    assert found.attention == pytest.approx(8 * 3.5 * 4 * 128 * 1000 * 100 / 1e12)
    assert found.bubble == found.pipeline_sends == found.gradients_and_weights == 0
    assert found.optimizer == pytest.approx((40 * 1e7 + 4e7) / 1e9)
    assert found.total == pytest.approx(sum(getattr(found, part) for part in found.PARTS))
    assert found.tokens_per_second == pytest.approx(8000 / found.total)


def test_data_parallel_ranks_share_rows_and_the_optimizer():
    one, two = (step_time(job(n), [stage()], LOAD, GPU, EXACT) for n in (1, 2))
    assert two.products == one.products / 2
    # gradients scattered and weights gathered, half of each by either GPU
    assert two.gradients_and_weights == pytest.approx((4e7 + 2e7) / 2 / 1e9)
    assert two.optimizer == pytest.approx((40 * 1e7 / 2 + 4e7) / 1e9)
    plain = step_time(job(2, distributed_optimizer=False), [stage()], LOAD, GPU, EXACT)
    assert plain.gradients_and_weights == pytest.approx(2 * 4e7 / 2 / 1e9)
    assert step_time(job(2, overlap=True), [stage()], LOAD, GPU, EXACT).gradients_and_weights == 0


def test_an_offloaded_optimizer_travels_in_and_out():
    here = step_time(job(1), [stage()], LOAD, GPU, EXACT)
    away = replace(stage(), host=1e6)
    there = step_time(job(1, offload_optimizer=True), [away], LOAD, GPU, EXACT)
    assert there.optimizer == pytest.approx(here.optimizer + 2 * 1e6 / 1e7)


def test_context_parallel_ranks_share_attention_and_the_optimizer():
    whole = step_time(job(1), [stage()], LOAD, GPU, EXACT)
    two = stage()
    (chunk,) = two.chunks
    two.chunks = [replace(chunk, forward=replace(chunk.forward, context_wire=1e8))]
    found = step_time(job(2, context=2), [two], LOAD, GPU, EXACT)
    assert found.micro_batches == whole.micro_batches
    assert found.attention == whole.attention / 2
    assert found.context_parallel == pytest.approx(8 * 0.1)
    assert found.gradients_and_weights == pytest.approx((4e7 + 2e7) / 2 / 1e9)
    assert found.optimizer == pytest.approx((40 * 1e7 / 2 + 4e7) / 1e9)
    far = step_time(job(16, tensor=8, context=2), [two], LOAD, GPU, EXACT)
    assert far.context_parallel == pytest.approx(8 * 0.1 * 10)


def test_across_nodes_the_network_is_what_counts():
    found = step_time(job(16, tensor=8), [stage()], LOAD, GPU, EXACT)
    assert found.gradients_and_weights == pytest.approx((4e7 + 2e7) / 2 / 1e8)
    # with fewer tensor-parallel ranks, more ranks of a group are on a node and share its adapters
    found = step_time(job(16, tensor=4), [stage()], LOAD, GPU, EXACT)
    assert found.gradients_and_weights == pytest.approx((4e7 + 2e7) * 3 / 4 / 2e8)


def test_the_bubble_shrinks_with_interleaving():
    plain = step_time(job(4, pipeline=4), [stage()] * 4, LOAD, GPU, EXACT)
    each = plain.products / 8 + plain.attention / 8 + plain.elementwise / 8 + plain.tensor_parallel / 8
    assert plain.bubble == pytest.approx(3 * (each + plain.pipeline_sends / 8))
    half = stage()
    (whole,) = half.chunks
    half.chunks = [replace(whole, forward=whole.forward.scaled(0.5), backward=whole.backward.scaled(0.5))] * 2
    interleaved = step_time(job(4, pipeline=4, virtual_pipeline=2), [half] * 4, LOAD, GPU, EXACT)
    assert interleaved.bubble < 0.51 * plain.bubble
    assert interleaved.pipeline_sends == pytest.approx(2 * plain.pipeline_sends)


def test_the_slowest_stage_sets_the_pace():
    slow = stage()
    slow.chunks = [replace(slow.chunks[0], forward=slow.chunks[0].forward.scaled(2))]
    even = step_time(job(2, pipeline=2), [stage()] * 2, LOAD, GPU, EXACT)
    uneven = step_time(job(2, pipeline=2), [stage(), slow], LOAD, GPU, EXACT)
    assert uneven.products == pytest.approx(even.products * 4 / 3)


def test_kto_passes_forward_once_more():
    plain = step_time(job(1), [stage()], LOAD, GPU, EXACT)
    kto = step_time(job(1), [stage()], replace(LOAD, extra_forward=True), GPU, EXACT)
    assert kto.products == pytest.approx(plain.products * 4 / 3)


def test_rows_per_replica():
    assert micro_batches(job(1), 9) == 9
    assert micro_batches(job(4), 9) == 3
    assert micro_batches(job(8, pipeline=2, virtual_pipeline=2), 9) == 4  # 3, to a multiple of the stages
    assert micro_batches(job(64), 9) == 1  # most replicas have nothing to do


def test_operations_a_model_needs():
    """6 per weight and token (2 forward, 4 backward), 12 H D per layer, token and visible key."""
    weights = 8 * 128 * (2 * 128 + 2 * 64 + 3 * 256)
    load = Load(rows=1, tokens=10, depth=5, scored=4)
    reward, policy = (replace(job(1), head=head) for head in ("reward", "lm"))
    assert model_flops(reward, load) == 10 * (6 * weights + 12 * 8 * 128 * 5)
    # the output matrix only where a position is scored
    assert model_flops(policy, load) == 10 * (6 * weights + 12 * 8 * 128 * 5) + 4 * 6 * 128 * 1000
    windowed = replace(reward, shape=replace(SHAPE, window=3))
    assert model_flops(windowed, load) == 10 * (6 * weights + 12 * 8 * 128 * 3)
