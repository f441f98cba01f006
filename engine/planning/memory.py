"""Computes the memory of one rank of each pipeline stage: what is always there, and what the schedule keeps in flight.

A micro-batch is in flight between its forward and its backward pass, while its activations are held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from silva.engine.model.gpt import frees_outputs
from silva.engine.planning.built import Chunk, Job, Stage
from silva.engine.planning.hardware import Assumptions, Gpu
from silva.engine.recipe.schema import Parallel

PARTS = ("parameters", "gradients", "optimizer", "activations", "workspace", "communication", "reserve")


@dataclass(frozen=True)
class Budget:
    """Holds the bytes on one GPU of a stage at its worst moment, by what they are for.

    Attributes:
        parameters: of all chunks of the stage.
        gradients: of all chunks of the stage.
        optimizer: state that lies on the GPU.
        activations: what is held for backward passes.
        workspace: what one micro-batch's pass needs beside the activations, the head's tile of logits included.
        communication: megatron-core's buffers, and what is being received from other stages.
        reserve: what a process takes beside its tensors, and what fragmentation loses; see `Assumptions`.
        in_flight: number of micro-batches whose activations are held.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    workspace: float
    communication: float
    reserve: float
    in_flight: int

    @property
    def total(self) -> float:
        """Return the sum of all parts."""
        return sum(getattr(self, part) for part in PARTS)

    @property
    def dominant(self) -> str:
        """Return the name of the largest part."""
        return max(PARTS, key=lambda part: getattr(self, part))

    def fits(self, gpu: Gpu, assumptions: Assumptions) -> bool:
        """Tell whether the GPU's memory, less the assumed headroom, is enough."""
        return self.total <= gpu.memory * (1 - assumptions.headroom)


def budget(stage: Stage, place: int, job: Job, micro_batches: int, assumptions: Assumptions) -> Budget:
    """Compute the memory of one GPU of a pipeline stage at its worst moment.

    Args:
        stage: what the stage holds and costs.
        place: of the stage in the pipeline.
        job: what the stage belongs to.
        micro_batches: rows that every replica passes through the stage per step.
        assumptions: what a process takes beside its tensors.
    """
    activations, in_flight = held(stage.chunks, place, job.parallel, micro_batches)
    if not frees_outputs(job.parallel):
        activations += in_flight * exchanged_bytes(job)
    workspace = max(max(chunk.forward_peak, chunk.backward_peak) for chunk in stage.chunks)
    communication = stage.buffers
    if job.parallel.pipeline > 1:
        # one tensor is being received in each direction
        communication += 2 * exchanged_bytes(job)
    return Budget(
        parameters=stage.parameters,
        gradients=stage.gradients,
        optimizer=stage.optimizer,
        activations=activations,
        workspace=workspace,
        communication=communication,
        reserve=assumptions.context + assumptions.fragmentation * (activations + workspace),
        in_flight=in_flight,
    )


def exchanged_bytes(job: Job) -> int:
    """Return the bytes that two stages send each other per micro-batch and direction."""
    return job.tokens * job.shape.hidden * job.dtype.itemsize


def held(chunks: Sequence[Chunk], place: int, parallel: Parallel, micro_batches: int) -> tuple[float, int]:
    """Compute what a pipeline stage holds for backward passes at the worst moment of a step.

    Args:
        chunks: of the stage.
        place: of the stage in the pipeline.
        parallel: the layout.
        micro_batches: per replica and step.

    Returns:
        Bytes of activations, and the number of forward passes through a chunk whose backward pass is still to come.
    """
    now, passes, worst = 0.0, 0, (0.0, 0)
    for chunk, forward in schedule(len(chunks), place, parallel.pipeline, micro_batches):
        now += chunks[chunk].saved if forward else -chunks[chunk].saved
        passes += 1 if forward else -1
        worst = max(worst, (now, passes))
    return worst


def schedule(chunks: int, place: int, stages: int, micro_batches: int) -> Iterator[tuple[int, bool]]:
    """Yield the passes of one stage in megatron-core's 1F1B order, interleaved where there are several chunks.

    A stage runs ahead by one forward pass for every later stage (by two when interleaved, and once through all
    chunks but the last); then forward and backward passes alternate.

    Args:
        chunks: number of model chunks of a stage.
        place: of the stage in the pipeline.
        stages: of the pipeline.
        micro_batches: per replica and step.

    Yields:
        The number of the chunk, and whether the pass is a forward pass.
    """
    total = chunks * micro_batches
    ahead = stages - place - 1 if chunks == 1 else 2 * (stages - place - 1) + (chunks - 1) * stages
    ahead = min(ahead, total)

    def chunk(k: int) -> int:
        return k // stages % chunks

    for k in range(ahead):
        yield chunk(k), True
    for k in range(total - ahead):
        yield chunk(k + ahead), True
        yield chunks - 1 - chunk(k), False
    for k in range(total - ahead, total):
        yield chunks - 1 - chunk(k), False
