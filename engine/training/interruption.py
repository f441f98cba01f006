"""Stops a run when the machine is taken away: signals ask for it, every rank stops at the same step, nothing is lost.

SIGTERM and SIGUSR1 ask a run to stop. It does so at the end of the step, on all ranks, after a checkpoint; another
signal later ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from silva.engine.parallel import groups

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# A scheduler may signal all processes of a job, and torchrun's agent then passes its own on: within so many seconds,
# several signals are one.
TOGETHER = 5.0


class Interruption:
    """Notes signals while its context lasts, and lets all ranks agree on what to do after a step.

    Args:
        save_seconds: how often a checkpoint is due; 0: never.
    """

    def __init__(self, save_seconds: float) -> None:
        self._save_seconds = save_seconds
        self._saved = time.monotonic()
        self._asked: float | None = None
        self._before: dict[int, Any] = {}
        self._group: Any = None

    def __enter__(self) -> Interruption:
        # host memory alone is exchanged, so that no rank waits for its GPU
        self._group = dist.new_group(backend="gloo")
        # Python allows handlers in the main thread alone; a caller of another thread keeps its own
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked is None:
            self._asked = now
        elif now - self._asked > TOGETHER:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def agree(self) -> tuple[bool, bool]:
        """Return whether any rank was asked to stop, and whether a checkpoint is due by the first one's clock.

        The call is collective.
        """
        due = bool(self._save_seconds) and time.monotonic() - self._saved >= self._save_seconds
        flags = torch.tensor([self._asked is not None, due and groups.rank() == 0], dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        stop, save = (bool(flag) for flag in flags.tolist())
        return stop, save

    def saved(self) -> None:
        """Note that a checkpoint was written."""
        self._saved = time.monotonic()
