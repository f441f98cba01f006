"""Seconds of one optimizer step, from what the built modules cost and a hardware table.

Sources of the pipeline's and the optimizer's figures: 1F1B and its bubble, arXiv 2104.04473; rings, each GPU sending
(n - 1) / n of the whole per gather or scatter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from silva.engine.model import flops
from silva.engine.planning.built import Job, Stage
from silva.engine.planning.hardware import Assumptions, Gpu
from silva.engine.planning.memory import exchanged_bytes
from silva.engine.planning.meter import Cost

# AdamW over float32 main weights reads gradient, weight and both moments and writes the last three; the norm and
# clipping read the gradient twice and write it once
OPTIMIZER_BYTES = 40


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, on the slowest stage, by what they are spent on; they add up to `total`."""

    products: float
    attention: float
    elementwise: float
    tensor_parallel: float
    context_parallel: float
    pipeline_sends: float
    bubble: float
    gradients_and_weights: float  # reduced and gathered over data-parallel ranks, where nothing hides it
    optimizer: float
    rows: int  # of the global batch
    micro_batches: int  # per replica
    tokens: float  # unique, of all rows

    PARTS = (
        "products",
        "attention",
        "elementwise",
        "tensor_parallel",
        "context_parallel",
        "pipeline_sends",
        "bubble",
        "gradients_and_weights",
        "optimizer",
    )

    @property
    def total(self) -> float:
        return sum(getattr(self, part) for part in self.PARTS)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.total


@dataclass(frozen=True)
class Load:
    """What a step passes through the layout."""

    rows: int
    tokens: float
    depth: float  # keys a token sees on average, without a window
    scored: float  # scored positions, of all rows
    extra_forward: bool = False  # KTO's forward-only pass over as many rows


def replicas(job: Job) -> int:
    layout = job.parallel
    return job.world // (layout.tensor * layout.pipeline * layout.context)


def copies(job: Job) -> int:
    """Processes that hold the same slice of the model and sum its gradients: data and context parallelism."""
    return replicas(job) * job.parallel.context


def micro_batches(job: Job, rows: int) -> int:
    """Rows per replica; interleaved pipelines take them by the number of stages.

    Empty rows that make up the number are cheap to compute, but a chunk's next round begins when the first row
    has passed all stages: they cost what full ones would.
    """
    multiple = job.parallel.pipeline if job.parallel.virtual_pipeline else 1
    return math.ceil(rows / (replicas(job) * multiple)) * multiple


def step_time(job: Job, stages: Sequence[Stage], load: Load, gpu: Gpu, assumptions: Assumptions) -> StepTime:
    """Stages in pipeline order; all replicas alike."""
    count, layout = micro_batches(job, load.rows), job.parallel
    chunks = layout.virtual_pipeline or 1
    passes = [_micro_batch(job, stage, load, gpu, assumptions) for stage in stages]
    total = [sum(forward) + sum(backward) for forward, backward in passes]
    if load.extra_forward:
        total = [both + sum(forward) for both, (forward, _) in zip(total, passes, strict=True)]
    slowest = max(range(len(stages)), key=total.__getitem__)
    forward, backward = passes[slowest]
    forwards = 2 if load.extra_forward else 1
    products, attention, elementwise, tensor_parallel, context_parallel = (
        count * (forwards * f + b) for f, b in zip(forward, backward, strict=True)
    )
    sends = 0.0
    if layout.pipeline > 1:
        link = gpu.nvlink if job.world <= gpu.per_node else gpu.network
        sends = (forwards + 1) * chunks * exchanged_bytes(job) / (link * assumptions.links)
    largest = max(range(len(stages)), key=lambda place: stages[place].parameters)
    return StepTime(
        products=products,
        attention=attention,
        elementwise=elementwise,
        tensor_parallel=tensor_parallel,
        context_parallel=context_parallel,
        pipeline_sends=count * sends,
        bubble=(layout.pipeline - 1) / chunks * (sum(total) / len(total) + sends),
        gradients_and_weights=_data_parallel(job, stages[largest], passes[largest], gpu, assumptions),
        optimizer=max(_optimizer(job, stage, gpu, assumptions) for stage in stages),
        rows=load.rows,
        micro_batches=count,
        tokens=load.tokens,
    )


def _micro_batch(
    job: Job, stage: Stage, load: Load, gpu: Gpu, assumptions: Assumptions
) -> tuple[list[float], list[float]]:
    """Seconds of (products, attention, elementwise, tensor-, context-parallel), forward and backward."""
    shape, tensor = job.shape, job.parallel.tensor
    pairs = job.row_length * seen_keys(job, load)
    area = 4 * shape.heads * shape.head_dim * pairs / (tensor * job.parallel.context)
    link, context_link = (
        gpu.nvlink if size <= gpu.per_node else gpu.network
        for size in (tensor, tensor * job.parallel.context)
    )

    def seconds(cost: Cost) -> list[float]:
        attention = cost.attention / assumptions.attention
        attention += 2.5 * cost.attention_backward / assumptions.attention_backward  # five products, not two
        return [
            cost.flops / (gpu.flops * assumptions.products),
            area * attention / gpu.flops,
            cost.traffic / (gpu.bandwidth * assumptions.memory),
            cost.wire / (link * assumptions.links),
            cost.context_wire / (context_link * assumptions.links),
        ]

    forward, backward = Cost(), Cost()
    for chunk in stage.chunks:
        forward, backward = forward + chunk.forward, backward + chunk.backward
    return seconds(forward), seconds(backward)


def _data_parallel(
    job: Job, stage: Stage, passes: tuple[list[float], list[float]], gpu: Gpu, assumptions: Assumptions
) -> float:
    """Seconds of reducing gradients and gathering weights that nothing hides; `passes`: of one micro-batch."""
    size, layout = copies(job), job.parallel
    if size == 1:
        return 0.0
    together = max(
        1, gpu.per_node // layout.tensor
    )  # ranks of one group on a node, which share their adapters
    link = gpu.nvlink if size <= together else min(gpu.nvlink, gpu.network * together)
    ring = (size - 1) / size / (link * assumptions.links)
    reduce, gather = ring * stage.gradients, ring * stage.parameters
    if not layout.distributed_optimizer:
        return 2 * reduce
    if not layout.overlap:
        return reduce + gather
    # gradients are reduced in the last backward pass, weights gathered in the first forward pass
    forward, backward = (assumptions.hidden * sum(each) for each in passes)
    return max(0.0, reduce - backward) + max(0.0, gather - forward)


def _optimizer(job: Job, stage: Stage, gpu: Gpu, assumptions: Assumptions) -> float:
    elements = sum(chunk.parameters for chunk in stage.chunks)
    owned = elements / copies(job) if job.parallel.distributed_optimizer else elements
    # and the gradient buffer is filled with zeros
    seconds = (OPTIMIZER_BYTES * owned + stage.gradients) / (gpu.bandwidth * assumptions.memory)
    if job.parallel.offload_optimizer:  # in, then out
        seconds += 2 * stage.host / (gpu.host * assumptions.links)
    return seconds


def model_flops(job: Job, load: Load) -> float:
    """Count the operations that a step needs whatever the layout (`flops.needed`)."""
    pairs = load.tokens * seen_keys(job, load)
    return flops.needed(job.shape, job.head).of(tokens=load.tokens, pairs=pairs, scored=load.scored)


def seen_keys(job: Job, load: Load) -> float:
    """Return the keys a token sees on average, within the attention's window."""
    return min(load.depth, job.shape.window) if job.shape.window else load.depth
