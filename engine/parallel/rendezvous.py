"""Connects the processes of a world by the variables that torchrun sets, and says what is wrong with them."""

from __future__ import annotations

import datetime
import errno
import os
import socket
import time

import torch.distributed as dist

from silva.engine.errors import UserError

# how long a process waits for the first one, and the first one for the others
SECONDS = 600
# how long a process waits for its agent's store, which was there before the process was
AGENT_SECONDS = 60
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_START = "start the program with torchrun, or unset these variables to run one process"


def world() -> tuple[int, int]:
    """Return this process's rank and the number of processes.

    Raises:
        UserError: the variables contradict each other.
    """
    rank, size = _number("RANK"), _number("WORLD_SIZE")
    if size in (None, 1) and rank in (None, 0):
        return 0, 1
    missing = [name for name in _NEEDED if not os.environ.get(name)]
    found = ", ".join(f"{name}={os.environ[name]}" for name in _NEEDED if os.environ.get(name))
    if missing:
        raise UserError(f"found {found}, but no {', '.join(missing)}: {_START}")
    assert rank is not None
    assert size is not None
    if not 0 <= rank < size or not 0 < (_number("MASTER_PORT") or 0) < 1 << 16:
        raise UserError(
            f"found {found}: RANK counts from 0 to WORLD_SIZE - 1, MASTER_PORT up to 65535; {_START}"
        )
    return rank, size


def join(rank: int, size: int) -> dist.Store:
    """Return the store that all processes of the world share.

    Args:
        rank: of this process.
        size: number of processes.

    Raises:
        UserError: the first process cannot be reached, its port is taken, or others do not come.
    """
    if size == 1:
        return dist.HashStore()
    # under torchrun the store is that of its agent, so that every process connects to it
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # torch says the same in dozens of lines, most of them from its C++ side
    if serves:
        _check_free(place[1])
    else:
        _wait_for(*place)
    try:
        store: dist.Store = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=SECONDS)))[0]
    except dist.DistError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"the {size} processes of the world did not find each other at {place[0]}:{place[1]} (MASTER_ADDR, "
            f"MASTER_PORT): {reason}; check that all of them were started"
        ) from None
    return store


def _number(name: str) -> int | None:
    text = os.environ.get(name)
    if not text:
        return None
    if not text.isdecimal():
        raise UserError(f"found {name}={text}, which is no number: {_START}")
    return int(text)


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        # as torch's own server does
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise UserError(
                f"port {port} (MASTER_PORT) is in use on this host, perhaps by another run: choose another one "
                "(torchrun --master-port)"
            ) from None


def _wait_for(host: str, port: int) -> None:
    """Return when the first process's port answers, or that of the agent's store."""
    seconds = AGENT_SECONDS if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else SECONDS
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=10).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise UserError(
                    f"{host}:{port} (MASTER_ADDR, MASTER_PORT) did not answer for {seconds} seconds ({error}): check "
                    "that the process of rank 0 was started there, and that this host can reach it"
                ) from None
        time.sleep(0.2)
