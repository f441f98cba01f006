"""Builds the process groups: torch.distributed's world, and megatron-core's parallel state on top of it.

`initialize` works under torchrun, in a process group that already exists, and in a single plain process. `shutdown`
undoes it, so one process can train several models one after the other.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from silva.engine.parallel import rendezvous

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import ProcessGroup

from silva.engine import parents
from silva.engine.errors import UserError

if TYPE_CHECKING:
    from silva.engine.recipe.schema import Parallel

# The rendezvous store lives as long as the process, because its server cannot be moved; torchrun's outlives its
# processes when it starts them again. Every world takes a prefix of its own, because the addresses of an earlier world
# would be read as those of the new one.
_store: dist.Store | None = None
_worlds = 0


def initialize(parallel: Parallel, *, seed: int = 0) -> None:
    """Join the world and build the groups of `parallel`'s layout.

    Args:
        parallel: tensor x pipeline x context must divide the number of processes; the rest is data-parallel.
        seed: of megatron-core's random states.

    Raises:
        UserError: the layout does not fit the number of processes; the message names the keys.
    """
    if not dist.is_initialized():
        _join_world()
    try:
        _check_layout(parallel, dist.get_world_size())
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
            context_parallel_size=parallel.context,
        )
    except Exception:
        shutdown()
        raise
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def shutdown() -> None:
    """Leave the world and forget every group; do nothing if there is none."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def joined(parallel: Parallel, *, seed: int = 0) -> Iterator[None]:
    """Call `initialize` at the beginning of the block and `shutdown` at its end.

    If the block fails in a world with other processes, `shutdown` is not called. The others may be in a collective,
    and NCCL would wait for that collective before this process may leave, so the error would never be printed.
    `cli.run` prints it and ends the process.

    Args:
        parallel: as in `initialize`.
        seed: as in `initialize`.
    """
    initialize(parallel, seed=seed)
    try:
        yield
    except BaseException:
        if world_size() == 1:
            shutdown()
        raise
    shutdown()


def _join_world() -> None:
    """Join torchrun's world if its variables are set, else make a world of this one process."""
    global _store, _worlds
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    rank, size = rendezvous.world()
    parents.end_with_agent()
    if _store is None:
        _store = rendezvous.join(rank, size)
    _worlds += 1
    store = dist.PrefixStore(_prefix(), _store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


def _prefix() -> str:
    return f"silva-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{_worlds}"


def _check_layout(parallel: Parallel, world: int) -> None:
    model = parallel.tensor * parallel.pipeline * parallel.context
    if world % model:
        raise UserError(
            f"parallel.tensor {parallel.tensor} x parallel.pipeline {parallel.pipeline} x parallel.context "
            f"{parallel.context} = {model} does not divide the number of processes, {world}: start a "
            f"multiple of {model} processes or change these keys"
        )
    parallel.check()


def device() -> torch.device:
    """Return the device on which this process keeps its tensors."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def rank() -> int:
    """Return this process's number among all processes."""
    return dist.get_rank()


def world_size() -> int:
    """Return the number of all processes."""
    return dist.get_world_size()


def local_rank() -> int:
    """Return this process's number among those of its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def own_store() -> dist.Store | None:
    """Return the world's store over a connection of its own; None if `initialize` has not joined a world of several."""
    if _store is None or world_size() == 1:
        return None
    # torch's type information lacks `clone`
    store: Any = _store
    return dist.PrefixStore(f"{_prefix()}-own", store.clone())


def wait_for_all() -> None:
    """Wait until every process is here, for hours if need be, because one process may do long work for all of them."""
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
    dist.barrier(group)
    dist.destroy_process_group(group)


def from_first(compute: Callable[[], Any]) -> Any:
    """Return what the first process computes on every process; the others wait, for hours if need be.

    Args:
        compute: is called by the first process.

    Raises:
        UserError: on every process, if `compute` raises it.
    """
    found: list[Any] = [None, None]
    if rank() == 0:
        try:
            found[0] = compute()
        except UserError as error:
            found[1] = str(error)
    wait_for_all()
    dist.broadcast_object_list(found)
    if found[1]:
        raise UserError(found[1])
    return found[0]


def data_rank() -> int:
    """Return which data-parallel copy of the model this process belongs to; context parallelism is not counted."""
    return parallel_state.get_data_parallel_rank()


def data_size() -> int:
    """Return the number of data-parallel copies of the model; context parallelism is not counted."""
    return parallel_state.get_data_parallel_world_size()


def data_group() -> ProcessGroup:
    """Return the processes with the same slice of the model and other rows; context parallelism is not counted."""
    return parallel_state.get_data_parallel_group()


def copy_rank() -> int:
    """Return this process's number among those with the same slice of the model, by data and context parallelism."""
    return parallel_state.get_data_parallel_rank(with_context_parallel=True)


def context_rank() -> int:
    """Return this process's number among those that share the tokens of every row."""
    return parallel_state.get_context_parallel_rank()


def context_size() -> int:
    """Return the number of processes that share the tokens of every row."""
    return parallel_state.get_context_parallel_world_size()


def context_group() -> ProcessGroup:
    """Return the processes that share the tokens of every row."""
    return parallel_state.get_context_parallel_group()


def tensor_rank() -> int:
    """Return this process's number among those that split every layer."""
    return parallel_state.get_tensor_model_parallel_rank()


def tensor_size() -> int:
    """Return the number of processes that split every layer."""
    return parallel_state.get_tensor_model_parallel_world_size()


def tensor_group() -> ProcessGroup:
    """Return the processes that split every layer."""
    return parallel_state.get_tensor_model_parallel_group()


def pipeline_rank() -> int:
    """Return which pipeline stage this process holds."""
    return parallel_state.get_pipeline_model_parallel_rank()


def pipeline_size() -> int:
    """Return the number of pipeline stages."""
    return parallel_state.get_pipeline_model_parallel_world_size()


def pipeline_group() -> ProcessGroup:
    """Return the processes of this process's pipeline."""
    return parallel_state.get_pipeline_model_parallel_group()


def is_last_stage() -> bool:
    """Tell whether this process holds the head, and so computes the losses."""
    return pipeline_rank() == pipeline_size() - 1


def last_stage_rank() -> int:
    """Return the number, among all, of the process that holds the head of this process's pipeline."""
    return parallel_state.get_pipeline_model_parallel_last_rank()
