"""Memory of one rank of each pipeline stage: what is always there, and what the schedule keeps in flight."""

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
    """Bytes on one GPU of a stage at its worst moment."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    workspace: float  # what one micro-batch's pass needs beside them, the head's tile of logits included
    communication: float
    reserve: float
    in_flight: int  # micro-batches whose activations are held

    @property
    def total(self) -> float:
        return sum(getattr(self, part) for part in PARTS)

    @property
    def dominant(self) -> str:
        return max(PARTS, key=lambda part: getattr(self, part))

    def fits(self, gpu: Gpu, assumptions: Assumptions) -> bool:
        return self.total <= gpu.memory * (1 - assumptions.headroom)


def budget(stage: Stage, place: int, job: Job, micro_batches: int, assumptions: Assumptions) -> Budget:
    """Of pipeline stage `place`, when every replica passes `micro_batches` rows through it per step."""
    activations, in_flight = held(stage.chunks, place, job.parallel, micro_batches)
    if not frees_outputs(job.parallel):
        activations += in_flight * exchanged_bytes(job)
    workspace = max(max(chunk.forward_peak, chunk.backward_peak) for chunk in stage.chunks)
    communication = stage.buffers
    if job.parallel.pipeline > 1:  # one tensor being received in each direction
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
    """What two stages hand each other per micro-batch and direction."""
    return job.tokens * job.shape.hidden * job.dtype.itemsize


def held(chunks: Sequence[Chunk], place: int, parallel: Parallel, micro_batches: int) -> tuple[float, int]:
    """(bytes, passes through a chunk) that stage `place` holds for backward passes at the worst moment of a step."""
    now, passes, worst = 0.0, 0, (0.0, 0)
    for chunk, forward in schedule(len(chunks), place, parallel.pipeline, micro_batches):
        now += chunks[chunk].saved if forward else -chunks[chunk].saved
        passes += 1 if forward else -1
        worst = max(worst, (now, passes))
    return worst


def schedule(chunks: int, place: int, stages: int, micro_batches: int) -> Iterator[tuple[int, bool]]:
    """megatron-core's 1F1B order on one stage, interleaved with several chunks: (chunk, whether forward).

    A stage runs ahead by one forward pass for every later stage (by two when interleaved, and once through all
    chunks but the last); then forward and backward passes take turns.
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
