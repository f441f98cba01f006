"""Writes a rank's part of a checkpoint, because megatron-core would hang, copy too much or spawn processes to do so.

Every place where megatron-core's behaviour is replaced is in this file. The table was checked against the releases up
to 0.19.2; "all" means that the reason holds in every one of them.

====================================  =====================================================================  ==========
replaced                              why                                                                    releases
====================================  =====================================================================  ==========
filesystem_async._results_queue       spawns a manager process per rank, which imports the whole program     all
                                      again: 12 s for a save of 1 s
FileSystemWriterAsync                 copies, all at once, every tensor in host memory that is a part of a   all
.prepare_write_data                   larger storage; an optimizer's state in host memory is such a part
AsyncRequest.async_fn                 forks a process for each file, and waits for ever if one of them is    0.16
                                      killed; later releases write in threads, as is done here
AsyncRequest.preload_fn               stages in page-locked memory, which torch rounds up to powers of two   all
                                      and keeps, and of which a forked process has no copy of its own
AsyncRequest.execute_sync             waits at most ten minutes at a barrier for the slowest writer          all
====================================  =====================================================================  ==========
"""

from __future__ import annotations

import contextlib
import inspect
import os
import pickle
import queue
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from silva.engine.parallel import groups

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, _disable_gc
from torch import Tensor
from torch.distributed.checkpoint import SavePlan, SavePlanner
from torch.distributed.checkpoint.planner import WriteItemType

from silva.engine.checkpoint import plain_files
from silva.engine.checkpoint.index import DIGEST, settled
from silva.engine.parents import end_with

Write = Callable[[list[Any], int, list[Any], "Results"], None]


def request(
    folder: Path, state: dict[str, Any], content: dict[str, Any], write: Write, *, forked: bool
) -> AsyncRequest:
    """Have megatron-core plan which rank writes what, and replace its way to write it by ours.

    Args:
        folder: of the checkpoint.
        state: what to save, as megatron-core's `dist_checkpointing` takes it.
        content: how the state is named and cut, kept beside it.
        write: what writes: `write_files`, or a test's own function.
        forked: whether a forked process writes it.

    Returns:
        The request, which megatron-core's queue or `execute` carries out.
    """
    patched: Any = filesystem_async
    # a new one for each save, so that nothing of a failed save is left in it
    patched._results_queue = Results()
    # later releases ask which library writes
    library = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    options: dict[str, Any] = {"async_strategy": "mcore"} if library else {}
    with _without_copies(), plain_files.in_use():
        found: Any = dist_checkpointing.save(
            state,
            str(folder),
            async_sharded_save=True,
            content_metadata=content,
            **options,
        )
    # this rank has nothing to write
    if found.async_fn is None:
        return found
    transforms = found.async_fn.args[0]
    buckets = found.async_fn_args[1]
    return found._replace(
        async_fn=partial(write, transforms), preload_fn=partial(_staged, buckets, forked=forked)
    )


@contextlib.contextmanager
def _without_copies() -> Iterator[None]:
    """Have megatron-core plan what is written without copying tensors in host memory, while the block lasts.

    A part of a larger storage is copied only when it is its turn to be written.
    """
    patched: Any = filesystem_async.FileSystemWriterAsync
    original = patched.prepare_write_data
    patched.prepare_write_data = _planned
    try:
        yield
    finally:
        patched.prepare_write_data = original


def _planned(writer: Any, plan: SavePlan, planner: SavePlanner) -> None:
    """Stand in for `FileSystemWriterAsync.prepare_write_data`."""
    library: Any = filesystem_async
    buckets: list[Any] = []
    for items in library._split_by_size_and_type(writer.thread_count, plan.items):
        found: tuple[list[Any], list[Any]] = [], []
        for item in items:
            found[item.type != WriteItemType.BYTE_IO].append((item, planner.resolve_data(item)))
        if items:
            name = f"{plan.storage_data.prefix}{len(buckets)}{library.DEFAULT_SUFFIX}"
            buckets.append((os.path.join(writer.checkpoint_dir, name), name, found))
    writer.write_buckets = buckets
    writer.results_queue = library._results_queue if buckets else None


class _Parts(list[Any]):
    """Lists (item, tensor) pairs, and gives each tensor a storage of its own while the loop is at it."""

    def __iter__(self) -> Iterator[Any]:
        for item, tensor in super().__iter__():
            yield item, _whole(tensor)


def _whole(tensor: Tensor) -> Tensor:
    """Copy a tensor that is a part of a storage, because torch would write all of the storage."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _staged(buckets: list[Any], *, forked: bool) -> list[Any]:
    """Copy what is written to host memory that is not page-locked; a forked writer sees it as it is now.

    A forked writer cannot copy anything itself, because torch's threads do not survive the fork.
    """

    def staged(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu()
        if not forked:
            return tensor
        return tensor.clone() if tensor.is_pinned() else _whole(tensor)

    return [
        (path, name, (objects, _Parts([(item, staged(tensor)) for item, tensor in tensors])))
        for path, name, (objects, tensors) in buckets
    ]


def execute(request: AsyncRequest) -> None:
    """Write in this process.

    The call is collective: a rank that is done waits for the others, for hours if need be.
    """
    if request.async_fn is not None:
        rank, _, results = request.async_fn_args
        request.async_fn(rank, request.preload_fn(), results)
    groups.wait_for_all()
    for finalize in request.finalize_fns:
        finalize()


# the garbage collector of a forked writer would free tensors of the GPU, which belong to the parent
@_disable_gc()
def write_files(transforms: list[Any], rank: int, buckets: list[Any], results: Results) -> None:
    """Write this rank's files, each in a thread of its own.

    Args:
        transforms: what megatron-core does to the data on the way to a file.
        rank: this process among all.
        buckets: the files, as `request` staged them.
        results: what was written, or the exception of a thread that failed, is put here.
    """
    # a forked writer holds the GPU's memory for as long as it lives, and the run that is started again needs it
    if os.getpid() != results.owner:
        end_with(results.owner)
    answers: queue.Queue[Any] = queue.Queue()
    tickets: queue.Queue[int] = queue.Queue()

    def write(place: int) -> None:
        tickets.put(place)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, place, buckets[place], answers, tickets, True
        )
        # computed here, where the file is still in memory; the first process collects them when it publishes
        file = Path(buckets[place][0])
        if file.is_file():
            file.with_name(file.name + DIGEST).write_text(settled(file))

    with ThreadPoolExecutor(len(buckets)) as pool:
        list(pool.map(write, range(len(buckets))))
    found = dict(answers.get_nowait() for _ in buckets)
    failed = [answer for answer in found.values() if isinstance(answer, Exception)]
    results.put(failed[0] if failed else found)


class Results:
    """Carries what a rank's writer, a forked process or the rank itself, has written back to the rank.

    It is a file, because a pipe would block for ever once the results exceed its 64 KiB.

    Attributes:
        owner: the id of the rank's process.
    """

    def __init__(self) -> None:
        self.owner = os.getpid()
        # lives as long as the save
        self._file = tempfile.TemporaryFile()  # noqa: SIM115

    def put(self, results: Any) -> None:
        """Write the results; called once, by the writer."""
        pickle.dump(results, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """Return the results, or an exception that says why there are none; megatron-core tells it to every rank."""
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except (EOFError, pickle.UnpicklingError):
            return RuntimeError("the process that wrote it was killed")
