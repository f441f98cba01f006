"""Computes the seconds of one optimizer step from what the built modules cost and a hardware table.

The pipeline's figures, 1F1B and its bubble, are those of arXiv 2104.04473. Collectives are rings, in which each GPU
sends (n - 1) / n of the whole per gather or scatter.
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

# Bytes per parameter. AdamW over float32 main weights reads gradient, weight and both moments and writes the last
# three; the norm and clipping read the gradient twice and write it once.
OPTIMIZER_BYTES = 40


@dataclass(frozen=True)
class StepTime:
    """Holds the seconds of one step on the slowest stage, by what they are spent on; they add up to `total`.

    Attributes:
        products: seconds of matrix products.
        attention: seconds of the attention kernels.
        elementwise: seconds of operations that only move bytes.
        tensor_parallel: seconds of the tensor-parallel processes' collectives.
        context_parallel: seconds of the context-parallel processes' collectives.
        pipeline_sends: seconds of sending tensors between stages.
        bubble: seconds in which the pipeline fills and empties.
        gradients_and_weights: seconds of reducing gradients and gathering weights over data-parallel ranks, as far as
            no computation hides them.
        optimizer: seconds of the optimizer, transfers of offloaded state included.
        rows: of the global batch.
        micro_batches: per replica.
        tokens: unique ones of all rows.
        PARTS: names of the parts that add up to `total`.
    """

    products: float
    attention: float
    elementwise: float
    tensor_parallel: float
    context_parallel: float
    pipeline_sends: float
    bubble: float
    gradients_and_weights: float
    optimizer: float
    rows: int
    micro_batches: int
    tokens: float

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
        """Return the seconds of the whole step."""
        return sum(getattr(self, part) for part in self.PARTS)

    @property
    def tokens_per_second(self) -> float:
        """Return the unique tokens per second."""
        return self.tokens / self.total


@dataclass(frozen=True)
class Load:
    """Holds what a step passes through the layout.

    Attributes:
        rows: of the global batch.
        tokens: unique ones of all rows.
        depth: keys a token sees on average, without a window.
        scored: scored positions of all rows.
        extra_forward: whether the step includes KTO's forward-only pass over as many rows.
    """

    rows: int
    tokens: float
    depth: float
    scored: float
    extra_forward: bool = False


def replicas(job: Job) -> int:
    """Return the data-parallel size."""
    layout = job.parallel
    return job.world // (layout.tensor * layout.pipeline * layout.context)


def copies(job: Job) -> int:
    """Count the processes that hold the same slice of the model and sum its gradients.

    They are those of data and of context parallelism.
    """
    return replicas(job) * job.parallel.context


def micro_batches(job: Job, rows: int) -> int:
    """Count the rows per replica; interleaved pipelines take a multiple of the number of stages.

    Empty rows that fill up the number are cheap to compute, but a chunk's next round begins when the first row has
    passed all stages, so they cost what full rows would.
    """
    multiple = job.parallel.rows_multiple
    return math.ceil(rows / (replicas(job) * multiple)) * multiple


def step_time(job: Job, stages: Sequence[Stage], load: Load, gpu: Gpu, assumptions: Assumptions) -> StepTime:
    """Compute the time of a step; all replicas are taken to have equal work.

    Args:
        job: what the stages belong to.
        stages: in pipeline order.
        load: what a step passes through them.
        gpu: the hardware.
        assumptions: the shares of its peaks that are reached.
    """
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
    """Compute the seconds of (products, attention, elementwise, tensor-, context-parallel), forward and backward."""
    shape, tensor = job.shape, job.parallel.tensor
    pairs = job.row_length * seen_keys(job, load)
    area = 4 * shape.heads * shape.head_dim * pairs / (tensor * job.parallel.context)
    link, context_link = (
        gpu.nvlink if size <= gpu.per_node else gpu.network
        for size in (tensor, tensor * job.parallel.context)
    )

    def seconds(cost: Cost) -> list[float]:
        attention = cost.attention / assumptions.attention
        # the backward pass has five products, the forward pass two
        attention += 2.5 * cost.attention_backward / assumptions.attention_backward
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
    """Compute the seconds of reducing gradients and gathering weights that no computation hides.

    Args:
        job: what the stage belongs to.
        stage: the one with the most parameters.
        passes: seconds of one micro-batch, of `_micro_batch`.
        gpu: the hardware.
        assumptions: the shares of its peaks that are reached.
    """
    size, layout = copies(job), job.parallel
    if size == 1:
        return 0.0
    # the ranks of one group on a node share their network adapters
    together = max(1, gpu.per_node // layout.tensor)
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
    # the gradient buffer is also filled with zeros
    seconds = (OPTIMIZER_BYTES * owned + stage.gradients) / (gpu.bandwidth * assumptions.memory)
    if job.parallel.offload_optimizer:
        # the state comes from the host's memory and goes back to it
        seconds += 2 * stage.host / (gpu.host * assumptions.links)
    return seconds


def model_flops(job: Job, load: Load) -> float:
    """Count the operations that a step needs whatever the layout (`flops.needed`)."""
    pairs = load.tokens * seen_keys(job, load)
    return flops.needed(job.shape, job.head).of(tokens=load.tokens, pairs=pairs, scored=load.scored)


def seen_keys(job: Job, load: Load) -> float:
    """Return the number of keys that a token sees on average, within the attention's window."""
    return min(load.depth, job.shape.window) if job.shape.window else load.depth
