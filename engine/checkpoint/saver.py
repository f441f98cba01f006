"""Saving and resuming a run: megatron-core's distributed checkpoint, published atomically, read without pickle.

A checkpoint is a folder `step-00000120` with the model, the optimizer and a `run.json` that tells which run it
belongs to. The number is the step that comes next. Writing goes on behind training: the state is staged in host
memory, a forked process of every rank writes its part, and the whole is published when all of them are done.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import json
import os
import pickle
import queue
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

from silva.engine.parallel import groups

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest, _disable_gc
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, SavePlan, SavePlanner, filesystem
from torch.distributed.checkpoint.planner import WriteItemType

from silva.engine import optimizer_state
from silva.engine.errors import UserError

PREFIX = "step-"
PARTIAL = ".partial"
ELSE = "remove the checkpoint to go on from the one before it"
INDEX = ".metadata"  # torch's, of what lies where in which file

# What torch's checkpoint index is made of. It is a pickle, so it is read through this list:
# anything else in it is refused instead of run.
_INDEX_MODULES = {
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
    "megatron.core.dist_checkpointing.strategies.torch",
}
_INDEX_NAMES = {
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("builtins", "list"),
    ("builtins", "dict"),
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in _INDEX_NAMES or (module in _INDEX_MODULES and "." not in name)
        if known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint's index")


@contextlib.contextmanager
def _guarded_index() -> Iterator[None]:
    """While it lasts, torch reads a checkpoint's index through the allow-list."""

    def load(file: BinaryIO) -> Any:
        return _IndexUnpickler(file).load()

    patched: Any = filesystem
    original = patched.pickle
    patched.pickle = SimpleNamespace(load=load, dump=pickle.dump)
    try:
        yield
    finally:
        patched.pickle = original


def _metadata() -> dict[str, Any]:
    """How megatron-core names and cuts what is saved: so that it can be loaded on any other layout."""
    return {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _without_extra_state(state: dict[str, Any]) -> dict[str, Any]:
    """Drop `_extra_state` objects: they are empty without FP8 and would be read back by plain pickle."""
    kept = {}
    for key, value in state.items():
        if isinstance(key, str) and key.endswith("_extra_state"):
            continue
        if isinstance(value, ShardedObject):
            raise TypeError(f"checkpoint: {key} would be saved as a pickled object")
        kept[key] = _without_extra_state(value) if isinstance(value, dict) else value
    return kept


def unwrapped(chunk: Any) -> Any:
    """The model under megatron-core's wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _sharded_state(chunks: Sequence[Any], optimizer: Any, *, loading: bool) -> dict[str, Any]:
    """optimizer: None leaves it out."""
    metadata = _metadata()
    keys = ["model"] if len(chunks) == 1 else [f"model{k}" for k in range(len(chunks))]
    state = {
        key: _without_extra_state(unwrapped(chunk).sharded_state_dict(metadata=metadata))
        for key, chunk in zip(keys, chunks, strict=True)
    }
    if optimizer is not None:
        model = state["model"] if len(chunks) == 1 else dict(state)
        state["optimizer"] = optimizer_state.sharded(model, optimizer, metadata, loading=loading)
    return state


class Saver:
    """Writes a run's checkpoints into one folder, one at a time. Every method is collective."""

    def __init__(self, folder: Path, *, keep: int, asynchronous: bool) -> None:
        """
        Args:
            keep: how many checkpoints stay, the newest ones.
            asynchronous: whether training may go on while a checkpoint is written.
        """
        self.folder, self.keep, self.asynchronous = folder, keep, asynchronous
        self._calls = (
            AsyncCallsQueue()
        )  # megatron-core's: forks a writer, finishes when those of all are done
        self._target = folder  # the checkpoint that is being written

    def save(
        self,
        step: int,
        chunks: Sequence[Any],
        optimizer: Any,
        run: dict[str, Any],
        *,
        wait: bool = False,
    ) -> None:
        """Stage the state of model and optimizer, which may change from then on, and have it written.

        It is written under another name and renamed when it is whole: a killed run leaves no half checkpoint.
        An earlier checkpoint that is still being written is waited for.

        Args:
            step: the step that comes next.
            run: what identifies the run; `load` compares it.
            wait: return only when the checkpoint is published, as a saver that is not asynchronous always does.

        Raises:
            UserError: the checkpoint, or the one before it, could not be written.
        """
        self.wait()
        self._target = self.folder / f"{PREFIX}{step:08d}"
        partial_folder = self._new_partial()
        state = _sharded_state(chunks, optimizer, loading=False)
        request = _request(partial_folder, state, forked=self.asynchronous)
        request.add_finalize_fn(partial(self._publish, partial_folder, self._target, {"step": step, **run}))
        if not self.asynchronous:
            self._finishing(partial(_execute, request))
            return
        self._calls.schedule_async_request(request)
        if wait:
            self.wait()

    def poll(self) -> None:
        """Publish the checkpoint in flight if every rank has written its part; costs nothing where there is none.

        Raises:
            UserError: it could not be written.
        """
        if self._calls.get_num_unfinalized_calls():
            self._finishing(self._calls.maybe_finalize_async_calls)

    def wait(self) -> None:
        """Return when no checkpoint is in flight; raises as `poll` does."""
        while self._calls.get_num_unfinalized_calls():
            # many short collectives: one that waited for the slowest writer would run into its time limit
            self._finishing(self._calls.maybe_finalize_async_calls)
            time.sleep(0.01)

    def _new_partial(self) -> Path:
        """An empty folder with a name of its own: writers of a killed run may still be writing into theirs."""
        name = [f"{self._target.name}.{secrets.token_hex(4)}{PARTIAL}"]
        dist.broadcast_object_list(name)
        found = self.folder / name[0]
        if dist.get_rank() == 0:
            for stale in self.folder.glob(f"{PREFIX}*{PARTIAL}"):
                shutil.rmtree(stale, ignore_errors=True)
            found.mkdir(parents=True)
        dist.barrier()
        return found

    def _publish(self, partial_folder: Path, final: Path, identity: dict[str, Any]) -> None:
        if dist.get_rank() == 0:
            files = {path.name: path.stat().st_size for path in sorted(partial_folder.iterdir())}
            del files[INDEX]  # holds the folder's name, and is read whole anyway
            text = json.dumps(identity | {"files": files}, indent=1) + "\n"
            (partial_folder / "run.json").write_text(text)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial_folder, final)
            for old in checkpoints(self.folder)[: -self.keep]:
                shutil.rmtree(old)
        dist.barrier()

    def _finishing(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except CheckpointException as error:  # raised on every rank, with the reasons on the first one
            raise UserError(
                f"{self._target}: the checkpoint could not be written ({_reasons(error)}); earlier "
                "checkpoints are whole: look at disk space and memory, then start the run again to resume"
            ) from error


def _request(folder: Path, state: dict[str, Any], *, forked: bool) -> AsyncRequest:
    """megatron-core's plan of who writes what, with our way to write it.

    Args:
        forked: whether a forked process writes it.
    """
    patched: Any = filesystem_async
    patched._results_queue = _Results()  # one for each save: nothing of a failed one is left in it
    content = {k: v for k, v in _metadata().items() if k != "dp_cp_group"}
    # later releases ask which library writes
    library = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    options: dict[str, Any] = {"async_strategy": "mcore"} if library else {}
    with _without_copies():
        request: Any = dist_checkpointing.save(
            state,
            str(folder),
            async_sharded_save=True,
            content_metadata=content,
            **options,
        )
    if request.async_fn is None:  # nothing to write on this rank
        return request
    transforms = request.async_fn.args[0]
    buckets = request.async_fn_args[1]
    return request._replace(
        async_fn=partial(_write, transforms), preload_fn=partial(_staged, buckets, forked=forked)
    )


@contextlib.contextmanager
def _without_copies() -> Iterator[None]:
    """While it lasts, megatron-core plans what is written without copying tensors of the host.

    It copies every one that is a part of a larger storage, all at once; an optimizer's state on the host is. A part is
    copied here when it is its turn to be written.
    """
    patched: Any = filesystem_async.FileSystemWriterAsync
    original = patched.prepare_write_data
    patched.prepare_write_data = _planned
    try:
        yield
    finally:
        patched.prepare_write_data = original


def _planned(writer: Any, plan: SavePlan, planner: SavePlanner) -> None:
    """In the place of `FileSystemWriterAsync.prepare_write_data`."""
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
    """(item, tensor) pairs; each tensor has a storage of its own, for as long as it is looked at."""

    def __iter__(self) -> Iterator[Any]:
        for item, tensor in super().__iter__():
            yield item, _whole(tensor)


def _whole(tensor: Tensor) -> Tensor:
    """torch would write all of the storage that it is a part of."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _staged(buckets: list[Any], *, forked: bool) -> list[Any]:
    """What is written, in host memory; a forked writer sees it as it is now.

    Not in page-locked memory, which torch would round up to powers of two and keep, and which is not a forked process's
    own. Nor can that process copy: torch's threads do not survive the fork.
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


def _execute(request: AsyncRequest) -> None:
    """Write in this process. Unlike `AsyncRequest.execute_sync`, ranks that are done wait for hours for the others."""
    if request.async_fn is not None:
        rank, _, results = request.async_fn_args
        request.async_fn(rank, request.preload_fn(), results)
    groups.wait_for_all()
    for finalize in request.finalize_fns:
        finalize()


@_disable_gc()  # in a forked writer it would free tensors of the GPU, which belong to the parent
def _write(transforms: list[Any], rank: int, buckets: list[Any], results: _Results) -> None:
    """Write this rank's files, in a thread each.

    megatron-core 0.16 forks a process for each, and waits for ever if one of them is killed.
    """
    if os.getpid() != results.owner:
        _end_with(results.owner)
    answers: queue.Queue[Any] = queue.Queue()
    tickets: queue.Queue[int] = queue.Queue()

    def write(place: int) -> None:
        tickets.put(place)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, place, buckets[place], answers, tickets, True
        )

    with ThreadPoolExecutor(len(buckets)) as pool:
        list(pool.map(write, range(len(buckets))))
    found = dict(answers.get_nowait() for _ in buckets)
    failed = [answer for answer in found.values() if isinstance(answer, Exception)]
    results.put(failed[0] if failed else found)


def _end_with(parent: int) -> None:
    """Have this process killed when its parent ends: a forked writer holds the GPU's memory for as long as it lives,
    and the run that is started again needs it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it was faster
            os._exit(1)


class _Results:
    """Carries what was written from a rank's writer, a forked process or the rank itself, to the rank.

    megatron-core's own is a spawned manager process per rank that imports the whole program again (12 s for a
    save of 1 s); a pipe would block for ever once the results exceed its 64 KiB.
    """

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the save

    def put(self, results: Any) -> None:
        pickle.dump(results, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        """The results, or an exception that says why there are none: megatron-core tells it to every rank."""
        self._file.seek(0)
        try:
            return pickle.load(self._file)
        except (EOFError, pickle.UnpicklingError):
            return RuntimeError("the process that wrote it was killed")


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(p for p in folder.glob(f"{PREFIX}????????") if (p / "run.json").is_file())


def load(checkpoint: Path, chunks: Sequence[Any], optimizer: Any, run: dict[str, Any]) -> int:
    """Read a checkpoint into model and optimizer, on any layout. Returns the step that comes next. Collective.

    Args:
        optimizer: None reads the model alone; its chunks need no gradient buffers then.

    Raises:
        UserError: the checkpoint is damaged, or belongs to a run of other data, another model or other settings of
            the data.
    """
    saved = _checked(checkpoint, run)
    problem, cause = None, None
    try:
        with _guarded_index():
            state = dist_checkpointing.load(_sharded_state(chunks, optimizer, loading=True), str(checkpoint))
    except (CheckpointException, CheckpointingException, pickle.UnpicklingError, ValueError) as error:
        reasons = _reasons(error) if isinstance(error, CheckpointException) else _reason(error)
        problem, cause = f"{checkpoint}: cannot be read ({reasons}); {ELSE}", error
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)  # not every release tells the others
    for found in [problem, *problems]:
        if found:
            raise UserError(found) from cause
    for k, chunk in enumerate(chunks):
        key = "model" if len(chunks) == 1 else f"model{k}"
        # strict=False: `_extra_state` was left out on purpose; parameters are checked by hand
        missing, unexpected = unwrapped(chunk).load_state_dict(state[key], strict=False)
        lost = [name for name in missing if not name.endswith("_extra_state")]
        if lost or unexpected:
            raise UserError(
                f"{checkpoint}: does not hold this model: missing {lost}, unexpected {unexpected}"
            )
    if optimizer is not None:
        optimizer_state.load(optimizer, state["optimizer"])
    return int(saved["step"])


def _checked(checkpoint: Path, run: dict[str, Any]) -> dict[str, Any]:
    """What `run.json` says, if the checkpoint is this run's and whole. One rank looks; all raise what it found."""
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = _inspected(checkpoint, run)
        except UserError as error:
            found[1] = str(error)
    dist.broadcast_object_list(found)
    if found[1]:
        raise UserError(found[1])
    saved: dict[str, Any] = found[0]
    return saved


def _inspected(checkpoint: Path, run: dict[str, Any]) -> dict[str, Any]:
    try:
        saved: dict[str, Any] = json.loads((checkpoint / "run.json").read_text())
        files: dict[str, int] = saved["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{checkpoint / 'run.json'}: is damaged ({error!r}); {ELSE}") from error
    for key, value in run.items():
        if saved.get(key) != value:
            raise UserError(
                f"{checkpoint}: belongs to another run ({key} was {saved.get(key)!r}, is {value!r}); "
                "give the new run another `output`, or remove the folder to start again"
            )
    for name, size in files.items():
        file = checkpoint / name
        if not file.is_file():
            raise UserError(f"{file}: is missing; {ELSE}")
        if file.stat().st_size != size:
            raise UserError(f"{file}: has {file.stat().st_size} bytes of {size}; {ELSE}")
    try:
        with (checkpoint / INDEX).open("rb") as stream:
            _IndexUnpickler(stream).load()
    # a damaged pickle raises whatever its bytes happen to mean
    except Exception as error:
        raise UserError(f"{checkpoint / INDEX}: is no index of a checkpoint ({error}); {ELSE}") from error
    return saved


def _reasons(error: CheckpointException) -> str:
    """Why ranks failed, on the first one: the others are told that some did."""
    reasons = [f"rank {rank}: {_reason(reason[0])}" for rank, reason in sorted(error.failures.items())]
    return "; ".join(reasons) or "see rank 0"


def _reason(error: BaseException) -> str:
    # torch's own text of several lines advises to load the file unsafely
    unread = isinstance(error, pickle.UnpicklingError)
    return "its bytes are not what was written" if unread else str(error).partition("\n")[0]
