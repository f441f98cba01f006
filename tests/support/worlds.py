"""Small gloo worlds for tests: ranks are forked from a parent that has imported everything (0.3 s a world)."""

from __future__ import annotations

import datetime
import gc
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

# imported once, before the ranks are forked; pyarrow imports pandas only when it makes its first array
import pandas  # noqa: F401
import torch
import torch.distributed as dist

import silva.engine.trainer  # noqa: F401


def world(size: int, work: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
    """Call `work(*arguments)` on `size` processes of one gloo world; the results in rank order.

    Raises:
        RuntimeError: a rank failed, with its traceback, or did not answer in `timeout` seconds.
    """
    context = multiprocessing.get_context("fork")
    folder = tempfile.mkdtemp()
    processes, answers = [], {}
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        target = (rank, size, os.path.join(folder, "store"), work, arguments, theirs, timeout)
        # not daemonic: the writers of a checkpoint fork
        process = context.Process(target=_rank, args=target, daemon=False)
        process.start()
        theirs.close()
        processes.append(process)
        answers[ours] = rank
    results, failure = _collect(answers, timeout)
    for process in processes:
        if failure:
            process.kill()
        process.join()
    shutil.rmtree(folder)
    if failure:
        raise RuntimeError(failure)
    return [results[rank] for rank in range(size)]


def _collect(answers: dict[Connection, int], timeout: float) -> tuple[dict[int, Any], str]:
    results: dict[int, Any] = {}
    until = time.monotonic() + timeout
    while answers:
        ready = wait(list(answers), timeout=max(0.0, until - time.monotonic()))
        if not ready:
            return results, f"no answer in {timeout} s from ranks {sorted(answers.values())}"
        for connection in ready:
            rank = answers.pop(connection)  # type: ignore[index]
            try:
                good, value = connection.recv()  # type: ignore[union-attr]
            except EOFError:
                good, value = False, "died without a word"
            if not good:
                return results, f"rank {rank}: {value}"
            results[rank] = value
    return results, ""


def _rank(
    rank: int,
    size: int,
    store: str,
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    connection: Connection,
    timeout: float,
) -> None:
    gc.freeze()  # megatron-core collects garbage when it saves: not that of the parent, half a million objects
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        dist.barrier()  # work that ends the world at once would cut off a rank that is still connecting
        result = work(*arguments)
        if dist.is_initialized():
            dist.barrier()  # a rank that leaves early would cut off the others
        connection.send((True, result))
    except BaseException:  # whatever it was, the parent has to hear of it
        connection.send((False, traceback.format_exc()))
    finally:
        connection.close()
        os._exit(0)
