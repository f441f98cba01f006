"""Runs the work of a command-line program, and ends a user's mistake in one line and exit code 2."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from silva.engine import file_errors, parents
from silva.engine.errors import Stopped, UserError
from silva.engine.progress import is_first_process

# EX_TEMPFAIL of sysexits.h, for a run that has stopped as asked; what a shell gives after Ctrl-C
STOPPED, INTERRUPTED = 75, 130


def run(work: Callable[[], None]) -> int:
    """Do the work and return the program's exit code.

    Processes other than the first one name their rank in the error line, because a file can be missing on one node
    only. If this process fails and is in a process group with others, the function does not return: it ends the
    process at once, so that torchrun ends the others too.

    Args:
        work: what the program does; it raises UserError for bad input.

    Returns:
        0; 2 after one line on stderr for bad input; 75 for a run that SIGTERM or SIGUSR1 has stopped; 130 after Ctrl-C.
    """
    # first of all: until torch is imported and the processes have met, seconds pass
    parents.end_with_agent()
    try:
        work()
    except (UserError, OSError) as error:
        said = str(error) if isinstance(error, UserError) else file_errors.line(error)
        if said is None:
            code = _unexpected()
        else:
            who = "silva" if is_first_process() else f"silva (rank {os.environ['RANK']})"
            # a library's message quoted in it may hold line breaks
            print(f"{who}: error: {' '.join(said.splitlines())}", file=sys.stderr)
            code = 2
    except Stopped as stopped:
        if is_first_process():
            print(f"silva: {stopped}; start it again to go on", file=sys.stderr)
        code = STOPPED
    except KeyboardInterrupt:
        if is_first_process():
            print(
                "silva: interrupted; started again, a run goes on from its newest checkpoint", file=sys.stderr
            )
        code = INTERRUPTED
    except BaseException:
        code = _unexpected()
    else:
        return 0
    if _others_are_left():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _unexpected() -> int:
    """Raise the exception in flight again; in a world of several, print it and return the exit code."""
    if not _others_are_left():
        raise
    traceback.print_exc()
    return 1


def _others_are_left() -> bool:
    """Tell whether this process is in a process group with others, which would wait for it."""
    dist: Any = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
