"""Runs functions in forked processes: one, several at a time, or the ranks of a small gloo world on this machine.

What a child changes (groups, torch's names) does not change the caller's process. A child is forked from a process
that has imported everything, so it starts in milliseconds.
"""

from __future__ import annotations

import datetime
import gc
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.distributed as dist

from silva.engine.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")


class _Child(NamedTuple):
    """Holds a forked process and the pipe through which it answers."""

    connection: Connection
    process: BaseProcess

    def answer(self) -> tuple[str, Any]:
        """Wait for what the child sends: ("result", value), or ("user error" or "failure", (text, traceback))."""
        died = "died without a word: its process was killed"
        try:
            found: tuple[str, Any] = self.connection.recv()
        except EOFError:
            found = "failure", (died, died)
        return found


def isolated(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a forked process, and wait for it.

    Args:
        function: what is called.
        *args: of the call.
        **kwargs: of the call.

    Returns:
        What the function returns; it must be possible to send it between processes.

    Raises:
        UserError: the function raised it.
        RuntimeError: the function raised anything else, whose traceback is in the message, or the process died.
    """
    return _result(_start(function, args, kwargs, quiet=True))


def isolated_each(function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> Iterator[T]:
    """Yield `isolated` of each tuple of arguments, in their order; as many run at a time as there are cores.

    Args:
        function: what is called.
        arguments: one tuple for each call.

    Yields:
        What each call returns.

    Raises:
        UserError: as `isolated`.
        RuntimeError: as `isolated`.
    """
    waiting: list[_Child] = []
    todo = iter(arguments)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for _ in arguments:
        while len(waiting) < cores and (following := next(todo, None)) is not None:
            waiting.append(_start(function, following, {}, quiet=True))
        yield _result(waiting.pop(0))


def world(size: int, work: Callable[..., T], *arguments: Any, timeout: float = 120) -> list[T]:
    """Call a function in every process of a new gloo world.

    Args:
        size: number of processes.
        work: what is called.
        *arguments: of the call, the same on every rank.
        timeout: seconds until every rank must have answered; it is also the time limit of each collective.

    Returns:
        What each rank's call returns, in rank order.

    Raises:
        RuntimeError: a rank failed, whose traceback is in the message, or did not answer in time. The others are
            killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        children = {
            rank: _start(_as_rank, (rank, size, store, timeout, work, arguments), {}) for rank in range(size)
        }
        results: list[Any] = [None] * size
        failure = ""
        until = time.monotonic() + timeout
        while children and not failure:
            by_connection: dict[Any, int] = {child.connection: rank for rank, child in children.items()}
            ready = wait(list(by_connection), timeout=max(0.0, until - time.monotonic()))
            if not ready:
                failure = f"no answer in {timeout} s from ranks {sorted(children)}"
            for rank in (by_connection[connection] for connection in ready):
                child = children[rank]
                kind, results[rank] = child.answer()
                if kind != "result":
                    failure = f"rank {rank}: {results[rank][1]}"
                    break
                child.process.join()
                del children[rank]
        for child in children.values():
            child.process.kill()
            child.process.join()
    if failure:
        raise RuntimeError(failure)
    return results


def _start(function: Callable[..., Any], args: Any, kwargs: Any, *, quiet: bool = False) -> _Child:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    # not daemonic, because a daemonic process may not fork, and the writers of a checkpoint do
    process = context.Process(target=_serve, args=(theirs, quiet, function, args, kwargs), daemon=False)
    process.start()
    theirs.close()
    return _Child(ours, process)


def _result(child: _Child) -> Any:
    kind, value = child.answer()
    child.process.join()
    if kind == "user error":
        raise UserError(value[0])
    if kind != "result":
        raise RuntimeError(f"a forked process failed:\n{value[1]}")
    return value


def _serve(connection: Connection, quiet: bool, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
    torch.set_num_threads(1)
    if quiet:
        # the warnings are advice to a run on GPUs, or about meta tensors
        warnings.simplefilter("ignore")
    try:
        connection.send(("result", function(*args, **kwargs)))
    # the parent has to learn of any exception
    except BaseException as error:
        kind = "user error" if isinstance(error, UserError) else "failure"
        connection.send((kind, (str(error), traceback.format_exc())))
    finally:
        connection.close()
        os._exit(0)


def _as_rank(
    rank: int, size: int, store: str, timeout: float, work: Callable[..., T], arguments: tuple[Any, ...]
) -> T:
    # megatron-core collects garbage when it saves; the half a million objects of the parent are left out of that
    gc.freeze()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    # work that ends the world at once would cut off a rank that is still connecting
    dist.barrier()
    result = work(*arguments)
    if dist.is_initialized():
        # a rank that leaves early would cut off the others
        dist.barrier()
    return result
