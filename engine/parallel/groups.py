"""Process groups: torch.distributed's world and megatron-core's parallel state on top of it.

`initialize` works under torchrun, in a process group that already exists, and in a single plain process.
`shutdown` undoes it, so one process can train several models one after the other.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed import ProcessGroup

from silva.engine.errors import UserError

if TYPE_CHECKING:
    from silva.engine.recipe.schema import Parallel

# The rendezvous store lives as long as the process: its server cannot be moved, and every world takes a
# prefix of its own, because the addresses of an earlier world would be read as those of the new one.
_store: dist.Store | None = None
_worlds = 0


def initialize(parallel: Parallel, *, seed: int = 0) -> None:
    """Join the world and build the groups of `parallel`'s layout.

    Args:
        parallel: tensor x pipeline x context must divide the number of processes; the rest is data-parallel.
        seed: of megatron-core's random states.

    Raises:
        UserError: the layout does not fit the number of processes, naming the keys.
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
    """Leave the world and forget every group; does nothing where there is none."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def joined(parallel: Parallel, *, seed: int = 0) -> Iterator[None]:
    """`initialize`, and `shutdown` at the end.

    A process that fails does not leave a world of others: they may stand in a collective, and NCCL would wait for it to
    end before it lets this one go, which would never say what is wrong. `cli.run` says it and ends the process.
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
    """torchrun's world where its variables are set, else a world of this one process."""
    global _store, _worlds
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if _store is None:
        _store = next(dist.rendezvous("env://"))[0] if size > 1 else dist.HashStore()
    _worlds += 1
    store = dist.PrefixStore(f"silva-{_worlds}", _store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


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
    """Where this process keeps its tensors."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def rank() -> int:
    """This process among all."""
    return dist.get_rank()


def world_size() -> int:
    return dist.get_world_size()


def local_rank() -> int:
    """This process among those of its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def wait_for_all() -> None:
    """A barrier on the host that allows for hours: what one process does for all of them may take long."""
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
    dist.barrier(group)
    dist.destroy_process_group(group)


def data_rank() -> int:
    """Which of the data-parallel copies this process belongs to (context parallelism not counted)."""
    return parallel_state.get_data_parallel_rank()


def data_size() -> int:
    return parallel_state.get_data_parallel_world_size()


def data_group() -> ProcessGroup:
    """Processes that hold the same slice of the model and see different rows; context parallelism not counted."""
    return parallel_state.get_data_parallel_group()


def copy_rank() -> int:
    """Which of the processes that hold the same slice of the model this one is: data and context parallelism."""
    return parallel_state.get_data_parallel_rank(with_context_parallel=True)


def context_rank() -> int:
    return parallel_state.get_context_parallel_rank()


def context_size() -> int:
    return parallel_state.get_context_parallel_world_size()


def context_group() -> ProcessGroup:
    """Processes that share the tokens of every row."""
    return parallel_state.get_context_parallel_group()


def tensor_rank() -> int:
    return parallel_state.get_tensor_model_parallel_rank()


def tensor_size() -> int:
    return parallel_state.get_tensor_model_parallel_world_size()


def tensor_group() -> ProcessGroup:
    return parallel_state.get_tensor_model_parallel_group()


def pipeline_rank() -> int:
    return parallel_state.get_pipeline_model_parallel_rank()


def pipeline_size() -> int:
    return parallel_state.get_pipeline_model_parallel_world_size()


def pipeline_group() -> ProcessGroup:
    return parallel_state.get_pipeline_model_parallel_group()


def is_last_stage() -> bool:
    """Whether this process holds the head, and so the losses."""
    return pipeline_rank() == pipeline_size() - 1


def last_stage_rank() -> int:
    """The process, among all, that holds the head of this process's pipeline: source of a broadcast."""
    return parallel_state.get_pipeline_model_parallel_last_rank()
