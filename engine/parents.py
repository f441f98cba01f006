"""Ends processes whose parent has ended, so that none goes on for ever and keeps its GPU."""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def end_with(parent: int) -> None:
    """Have this process killed when its parent ends; on Linux alone.

    Args:
        parent: the id of the parent's process.
    """
    if sys.platform == "linux":
        # 1 is PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        # the parent may have ended before the call
        if os.getppid() != parent:
            os._exit(1)


def end_with_agent() -> None:
    """Have a process that torchrun's agent has started killed when the agent ends.

    A process whose agent was killed would otherwise train on, without anyone who could start the others again.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with(os.getppid())
