"""Finds processes that hang or were stopped, says which one and where, and ends the job.

The others would wait for such a process in a collective, without a word, until the collective's time limit or for ever.
Each process has a thread that writes a sign of life into the world's store: what the process is at, and where its main
thread stands. The thread of the next rank reads it, so that the cost does not grow with the world.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

import torch.distributed as dist

# seconds between two signs of life
PERIOD = 5.0
# seconds after which a process that gives none is taken for stopped, if the job's own limit is not shorter
STOPPED = 120.0
# of the stack, so many frames are told
_FRAMES = 6
_AGAIN = "started again, it goes on from its newest checkpoint"


class Heartbeat:
    """Watches the processes of a world while its context lasts.

    Args:
        store: shared by all processes, over a connection that only this object uses; None: nothing is watched.
        rank: of this process.
        size: number of processes.
        seconds: how long a watched stretch may last, and how long a process may give no sign of life (but not longer
            than `STOPPED`); 0: nothing is watched.
    """

    def __init__(self, store: dist.Store | None, rank: int, size: int, seconds: float) -> None:
        self._store = store if seconds and size > 1 else None
        self._rank, self._size, self._seconds = rank, size, seconds
        self._period, self._allowed = min(PERIOD, seconds / 10), min(seconds, STOPPED)
        self._main = threading.get_ident()
        self._at = "the set-up"
        # the number of beats when the watched stretch began
        self._since: int | None = None
        self._beats = 0
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=each, daemon=True) for each in (self._watch, self._watch_store)
        ]

    def __enter__(self) -> Heartbeat:
        if self._store is not None:
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After an error the process is about to end, and the others with it. Otherwise nobody leaves before all do,
        # because a process that has left watches no other.
        if self._store is not None and kind is None:
            self._leave(self._store)
        self._over.set()

    def _leave(self, store: dist.Store) -> None:
        # the store may be that of a process that has seen sooner that all are here
        with contextlib.suppress(RuntimeError, ValueError):
            here = store.add("left", 1)
            while here < self._size:
                time.sleep(0.1)
                here = store.add("left", 0)

    def now(self, what: str) -> None:
        """Note what this process is at, for the line that others print if it hangs.

        Args:
            what: completes "it was at ...".
        """
        self._at = what

    @contextlib.contextmanager
    def watched(self, what: str) -> Iterator[None]:
        """Limit the time of a stretch in which all processes take part.

        Args:
            what: as in `now`.
        """
        self._at, self._since = what, self._beats
        try:
            yield
        finally:
            self._since = None

    # ------------------------------------------------------------ the threads

    def _watch(self) -> None:
        assert self._store is not None
        silent, last = 0, b""
        while not self._over.wait(self._period):
            try:
                self._store.set(_key(self._rank), self._sign())
                found = self._read((self._rank - 1) % self._size)
                told = self._store.get("end").decode() if self._store.check(["end"]) else None
            # of several kinds, by the store's
            except (RuntimeError, ValueError):
                return
            if told is not None:
                os._exit(1)
            self._beats += 1
            # Rounds are counted, not seconds: a machine that sleeps, or a job that is stopped as a whole, goes on
            # afterwards.
            silent = silent + 1 if found == last else 0
            last = found
            if silent >= self._rounds(self._allowed):
                sign = json.loads(found) if found else _unseen((self._rank - 1) % self._size)
                self._report([sign], f"has given no sign of life for {self._allowed:g} seconds")
            since = self._since
            if self._rank == 0 and since is not None and self._beats - since > self._rounds(self._seconds):
                self._report(*self._slowest())

    def _watch_store(self) -> None:
        """End the process if the store has gone, or does not answer, and the run does not end by itself soon."""
        silent, last = 0, -1
        while not self._over.wait(self._period):
            silent = silent + 1 if self._beats == last else 0
            last = self._beats
            # rank 0 may be that store's host: its neighbour has more to say, and comes first
            if silent >= self._rounds(self._allowed) + 3:
                _end(
                    f"rank {self._rank}: the world's store at {os.environ.get('MASTER_ADDR')} (MASTER_ADDR) has not "
                    f"answered for {silent * self._period:g} seconds: its process has ended or was stopped. "
                    f"The job ends; {_AGAIN}"
                )

    def _rounds(self, seconds: float) -> int:
        return math.ceil(seconds / self._period)

    def _sign(self) -> str:
        return json.dumps(
            {
                "beats": self._beats,
                "rank": self._rank,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "at": self._at,
                "stack": _stack(sys._current_frames().get(self._main)),
            }
        )

    def _read(self, rank: int) -> bytes:
        assert self._store is not None
        key = _key(rank)
        return self._store.get(key) if self._store.check([key]) else b""

    def _slowest(self) -> tuple[list[dict[str, Any]], str]:
        """Return the signs of the processes that hold the others up, and what is wrong with them.

        They are those that give no sign any more, or else those that do not wait in a collective.
        """
        before = self._signs()
        self._over.wait(2 * self._period)
        after = self._signs()
        # this process's own sign, the first one, is not renewed here
        stopped = [sign for sign in after[1:] if sign in before]
        if stopped:
            return stopped, "gives no sign of life"
        busy = [sign for sign in after if not _waits(sign["stack"])]
        return busy or after, f"has not got on for {self._seconds / 60:g} minutes"

    def _signs(self) -> list[dict[str, Any]]:
        """Return the signs of all processes, beginning with this one's."""
        return [json.loads(found) for rank in range(self._size) if (found := self._read(rank))]

    def _report(self, signs: list[dict[str, Any]], what: str) -> None:
        first = signs[0]
        others = f" (and {len(signs) - 1} others)" if len(signs) > 1 else ""
        line = (
            f"rank {first['rank']}{others}, process {first['pid']} on {first['host']}, {what}; it was at "
            f"{first['at']}, in {' < '.join(first['stack'])}. The job ends; {_AGAIN}"
        )
        assert self._store is not None
        with contextlib.suppress(RuntimeError, ValueError):
            self._store.set("end", line)
        _end(line)


def _unseen(rank: int) -> dict[str, Any]:
    """Return what is known of a process that was stopped before it gave a first sign."""
    return {
        "rank": rank,
        "pid": "unknown",
        "host": "an unknown host",
        "at": "the start",
        "stack": ["unknown code"],
    }


def _key(rank: int) -> str:
    return f"sign-{rank}"


def _stack(frame: FrameType | None) -> list[str]:
    """Describe where a thread stands, innermost frame first."""
    found: list[str] = []
    while frame is not None and len(found) < _FRAMES:
        # the last folders are enough to find a file
        place = "/".join(Path(frame.f_code.co_filename).parts[-3:])
        found.append(f"{place}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return found


def _waits(stack: list[str]) -> bool:
    """Tell whether a process stands in a collective of torch or megatron-core, as one does that waits for others."""
    return any("torch/distributed/" in frame for frame in stack)


def _end(line: str) -> NoReturn:
    """Print why the job ends, and end this process with exit code 1."""
    print(f"silva: error: {line}", file=sys.stderr, flush=True)
    # the other processes read from the store that the job ends
    time.sleep(PERIOD / 5)
    os._exit(1)
