"""Runs functions in forked processes: what a planned job changes (groups, torch's names) never reaches the caller."""

from __future__ import annotations

import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, ParamSpec, TypeVar

import torch

from silva.engine.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")


def isolated(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """What `function` returns (anything that can be sent between processes).

    Raises:
        UserError: as the function did.
        RuntimeError: with its traceback, for anything else it raised, or if the process died.
    """
    return _result(*_start(function, args, kwargs))


def isolated_each(function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> Iterator[T]:
    """`isolated` for every tuple of arguments, in their order, on as many processes at a time as there are cores."""
    waiting: list[tuple[Connection, BaseProcess]] = []
    todo = iter(arguments)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for _ in arguments:
        while len(waiting) < cores and (following := next(todo, None)) is not None:
            waiting.append(_start(function, following, {}))
        yield _result(*waiting.pop(0))


def _start(function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Connection, BaseProcess]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, function, args, kwargs))
    process.start()
    theirs.close()
    return ours, process


def _result(connection: Connection, process: BaseProcess) -> Any:
    try:
        kind, value = connection.recv()
    except EOFError:
        kind, value = "died", "its process was killed"
    process.join()
    if kind == "user error":
        raise UserError(value)
    if kind != "result":
        raise RuntimeError(f"the planned job failed:\n{value}")
    return value


def _child(connection: Connection, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # advice to a run on GPUs, and meta tensors' about themselves
    try:
        connection.send(("result", function(*args, **kwargs)))
    except UserError as error:
        connection.send(("user error", str(error)))
    except BaseException:  # whatever it was, the parent has to hear of it
        connection.send(("failure", traceback.format_exc()))
    finally:
        connection.close()
        os._exit(0)
