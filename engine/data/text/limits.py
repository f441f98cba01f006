"""Limits what a chat template, which is a program of somebody else, may use: time, memory and output."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

# of one rendering: a conversation of a million tokens takes a hundredth of each
SECONDS, BYTES, CHARACTERS = 20.0, 1 << 30, 1 << 27
# of a template; the largest in use have some 20,000 characters
SOURCE_CHARACTERS = 1 << 20


class Exceeded(BaseException):
    """Says which limit was reached.

    It is no `Exception`, because Jinja goes on after any of those when it computes constants in advance.
    """


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Let the block use no more than `SECONDS` of the processor and `BYTES` of further memory.

    Time is limited in a process's main thread alone, because a signal ends the block; memory on Linux alone. Another
    thread that asks for memory meanwhile has the same limit.

    Raises:
        Exceeded: in the block, from wherever it is.
    """
    with _limited_memory(), _limited_time():
        try:
            yield
        except MemoryError:
            raise Exceeded(f"it needs more than {BYTES >> 20} MiB of memory") from None
        except RecursionError:
            raise Exceeded("it calls itself too deeply") from None


@contextlib.contextmanager
def _limited_time() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Exceeded(f"it takes more than {SECONDS:.0f} seconds")

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    import resource

    # opened without pathlib and without a buffer, because this is done for every conversation
    with open("/proc/self/statm", "rb", buffering=0) as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    ceilings = [used + BYTES, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(ceilings), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
