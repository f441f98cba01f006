"""Builds and steps one rank of a job of any size without a GPU, and measures what it holds and costs.

The real `gpt.build`, `optimizer.wrap` and `optimizer.build` run on the meta device in a simulated process group of any
world size, then one micro-batch goes forward and backward through the real modules. Triton kernels are not launched,
but the code around them runs: what it allocates and saves for the backward pass is counted.

S tokens of a row, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from silva.engine.parallel import groups, optimizer
from silva.engine.parallel.offload import portions

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from silva.engine.data.trees.group import TokenGroup, TokenSequence
from silva.engine.data.trees.packing import Piece, TreeBatch, pack_row
from silva.engine.data.trees.row_share import RowShare, share_of
from silva.engine.data.trees.tree import merge
from silva.engine.errors import UserError
from silva.engine.model import gpt
from silva.engine.model.families.shape import ModelShape
from silva.engine.planning.meter import Cost, Meter
from silva.engine.recipe.schema import Parallel, Training
from silva.kernels import dispatch
from silva.kernels.tree_attention_backward import query_gradient_kernel
from silva.kernels.tree_attention_forward import forward_kernel

# sequences of the row that is stepped; rows are padded to a multiple of this number
SEQUENCES = 16
META = torch.device("meta")


@dataclass(frozen=True)
class Job:
    """Holds everything that decides what a rank holds.

    Attributes:
        shape: of the model.
        parallel: the layout.
        training: the recipe's section.
        head: of the model.
        dtype: of the model.
        world: number of processes.
        row_length: S, a multiple of what rows are padded to.
        scored: share of the tokens that are scored.
    """

    shape: ModelShape
    parallel: Parallel
    training: Training
    head: gpt.Head
    dtype: torch.dtype
    world: int
    row_length: int
    scored: float = 1.0

    @property
    def tokens(self) -> int:
        """Return the number of a row's tokens that one process holds between its layers."""
        layout = self.parallel
        return self.row_length // layout.context // (layout.tensor if layout.sequence_parallel else 1)


@dataclass
class Chunk:
    """Holds what one model chunk of a stage, and one micro-batch through it, take.

    Attributes:
        layers: number of layers.
        parameters: number of elements of all parameters.
        saved: bytes kept from the forward to the backward pass, the input included.
        forward_peak: bytes beyond `saved` at the worst moment of the forward pass.
        backward_peak: bytes beyond `saved` at the worst moment of the backward pass.
        forward: cost of the forward pass.
        backward: cost of the backward pass, recomputation included.
        output: shape of the chunk's output.
        tensors: number of parameter tensors.
        reached: number of parameter tensors whose gradient arrived in its buffer.
    """

    layers: int
    parameters: int
    saved: float
    forward_peak: float
    backward_peak: float
    forward: Cost
    backward: Cost
    output: tuple[int, ...] = ()
    tensors: int = 0
    reached: int = 0


@dataclass
class Stage:
    """Holds what one rank of a pipeline stage allocates for the whole run, in bytes, and its chunks.

    Attributes:
        parameters: of all chunks.
        gradients: of all chunks.
        optimizer: state on the GPU.
        buffers: megatron-core's own, kept for gathering rows.
        chunks: the model chunks of the stage.
        host: optimizer state in host memory.
    """

    parameters: float
    gradients: float
    optimizer: float
    buffers: float
    chunks: list[Chunk] = field(default_factory=list)
    host: float = 0.0


def measure(job: Job, rank: int) -> Stage:
    """Build and step one rank of a job in this process; it is to be called through `isolated`.

    Args:
        job: what the rank belongs to.
        rank: its number among the `job.world` processes.

    Returns:
        What the rank allocates for the whole run, and its chunks with what one micro-batch through each takes.

    Raises:
        UserError: the layout does not fit the model or the world.
    """
    meter = Meter()
    with _rank(job, rank), without_launches(meter):
        if job.parallel.context > 1:
            meter.context_group = groups.context_group().group_name
        chunks, held, host = _build(job)
        stepped = [_step(job, chunk, meter) for chunk in chunks]
        return Stage(
            parameters=_storages(p for c in chunks for p in c.parameters()),
            gradients=_storages(p.main_grad for c in chunks for p in c.parameters()),
            optimizer=held,
            buffers=_pool_bytes(),
            chunks=stepped,
            host=host,
        )


# ---------------------------------------------------------------- a simulated rank


@contextmanager
def _rank(job: Job, rank: int) -> Iterator[None]:
    """Simulate a rank of the job; its new modules are made on the meta device."""
    cuda, before = _any(torch.cuda), torch.cuda.current_device
    cuda.current_device = lambda: META
    try:
        with simulated_world(job.parallel, rank, job.world):
            yield
    finally:
        cuda.current_device = before


@contextmanager
def simulated_world(parallel: Parallel, rank: int, size: int) -> Iterator[None]:
    """Simulate the process groups of a world in which only this process exists.

    Collectives do nothing and leave their outputs as they were.

    Args:
        parallel: the layout that the world is divided by.
        rank: of this process.
        size: of the world.
    """
    state, own_groups = _any(parallel_state), parallel_state.create_group
    # gloo would look for the other processes, so the fake backend replaces it too
    state.create_group = lambda *args, **options: own_groups(*args, **options | {"backend": "fake"})
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    try:
        groups.initialize(parallel)
        yield
    finally:
        groups.shutdown()
        state.create_group = own_groups


@contextmanager
def without_launches(meter: Meter) -> Iterator[None]:
    """Take the kernels' path as on a GPU while the block lasts, but let a launch only count what it would have moved.

    Args:
        meter: what the launches are counted in.

    Raises:
        UserError: Triton is not installed.
    """
    if dispatch.triton is None:
        raise UserError("the plan runs the code around the Triton kernels: install triton, or plan on Linux")
    from triton.runtime.jit import KernelInterface

    def launcher(kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            meter.cost.attention += kernel is forward_kernel
            meter.cost.attention_backward += kernel is query_gradient_kernel
            # a tensor descriptor keeps its tensor as `base`
            meter.kernel([getattr(x, "base", x) for x in args])

        return launch

    interface = _any(KernelInterface)
    before = interface.__getitem__
    interface.__getitem__ = launcher
    try:
        with dispatch.forced(True):
            yield
    finally:
        interface.__getitem__ = before


def _any(target: object) -> Any:
    return target


# ---------------------------------------------------------------- building


def _build(job: Job) -> tuple[list[Any], float, float]:
    """Return the wrapped chunks and the bytes of optimizer state, on the GPU and in host memory."""
    bare = gpt.build(job.shape, job.parallel, head=job.head, dtype=job.dtype)
    chunks: list[Any] = [*optimizer.wrap(bare, job.parallel)]
    made = optimizer.build(chunks, job.training, job.parallel)
    held = _optimizer_bytes(made, chunks)
    if not job.parallel.offload_optimizer:
        return chunks, held, 0.0
    groups_of_all = [group for part in made.chained_optimizers for group in part.optimizer.param_groups]
    elements = sum(p.numel() for group in groups_of_all for p in group["params"])
    share = max(
        (sum(p.numel() for p in portion) for group in groups_of_all for portion in portions(group["params"])),
        default=0,
    )
    return chunks, held * share / max(elements, 1), held


def _optimizer_bytes(made: Any, chunks: list[Any]) -> float:
    """Count the main parameters, where they are not the model's own, and both moments, which the first step makes."""
    own = {p.untyped_storage()._cdata for chunk in chunks for p in chunk.parameters()}
    total = 0.0
    for part in getattr(made, "chained_optimizers", [made]):
        for p in (p for group in part.optimizer.param_groups for p in group["params"]):
            copy = 0 if p.untyped_storage()._cdata in own else p.element_size()
            total += p.numel() * (copy + 2 * torch.float32.itemsize)
    return total


def _storages(tensors: Iterable[Tensor]) -> float:
    found = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return float(sum(found.values()))


# ---------------------------------------------------------------- stepping


def _step(job: Job, chunk: Any, meter: Meter) -> Chunk:
    """Pass one micro-batch forward and backward, as megatron-core's schedules do it."""
    model = gpt.unwrapped(chunk)
    chunk.train()
    versions = [p.main_grad._version for p in chunk.parameters()]
    meter.restart()
    before = meter.live
    shared = _pool_bytes()
    with meter, chunk.no_sync():
        batch, share = _row(job)
        if not model.pre_process:
            model.set_input_tensor(_hidden(job, requires_grad=True))
        out = gpt.forward(chunk, batch, share)
        shape = tuple(out.shape)
        forward, highest = meter.cost, meter.peak
        if not model.post_process:
            # `memory.budget` adds the output again for layouts that do not free it
            deallocate_output_tensor(out, True)
        pools = _pool_bytes() - shared
        saved = meter.live - before - pools
        meter.restart()
        gradient = torch.ones_like(out) if model.post_process else _hidden(job)
        if model.post_process:
            out.backward(gradient)
        else:
            custom_backward(out, gradient)
        backward, highest_backward = meter.cost, meter.peak
    del out, gradient, batch, share
    model.set_input_tensor(None)
    reached = [p.main_grad._version > v for p, v in zip(chunk.parameters(), versions, strict=True)]
    return Chunk(
        layers=len(model.decoder.layers),
        parameters=sum(p.numel() for p in chunk.parameters()),
        saved=saved,
        forward_peak=highest - before - pools - saved,
        backward_peak=highest_backward - before - pools - saved,
        forward=forward,
        backward=backward,
        output=shape,
        tensors=len(reached),
        reached=sum(reached),
    )


def _pool_bytes() -> float:
    return _storages(parallel_state.get_global_memory_buffer().buffer.values())


def _hidden(job: Job, *, requires_grad: bool = False) -> Tensor:
    """Return a tensor such as stages exchange: (S / cp, 1, H), also divided by tp with sequence parallelism."""
    size = (job.tokens, 1, job.shape.hidden)
    return torch.empty(size, dtype=job.dtype, device=META, requires_grad=requires_grad)


def _row(job: Job) -> tuple[TreeBatch, RowShare | None]:
    """Return the row that is stepped, and the share of it that this rank computes."""
    batch, share = plain_row(job.row_length, job.scored), None
    if job.parallel.context > 1:
        part = groups.context_rank(), groups.context_size()
        share = share_of(batch, *part, window=job.shape.window).to(META)
    return batch.to(META), share


def plain_row(size: int, scored: float = 1.0) -> TreeBatch:
    """Pack a row of `SEQUENCES` unrelated sequences.

    Args:
        size: number of tokens, a multiple of `SEQUENCES`.
        scored: share of each sequence's tokens that is scored, the last ones; its first token never is.
    """
    length = size // SEQUENCES
    first = max(1, length - round(scored * length))
    sequence = TokenSequence(np.zeros(length, np.int32), np.arange(length) >= first)
    piece = Piece(
        merge(TokenGroup.of([sequence])),
        np.zeros(1, np.int64),
        np.zeros((0, 2), np.int32),
        np.zeros(0, bool),
    )
    return pack_row([piece] * SEQUENCES, multiple=size, pad_id=0)
