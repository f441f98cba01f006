"""What the command-line programs share: how a user's mistake ends, and who speaks."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable

from silva.engine.errors import UserError

# megatron-core talking to its own developers: old names of its options and of torch's, and a look at a `.grad`
# that it knows may be absent. A user can do nothing about them.
HARMLESS = (
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf Tensor",
    r"`torch\.distributed\.\w+` is deprecated",
)


def is_first_process() -> bool:
    """Whether this process speaks for the run, also before there is a process group."""
    return os.environ.get("RANK", "0") == "0"


def run(work: Callable[[], None]) -> int:
    """Do the work; the exit code is 0, or 2 after one line on stderr for bad input.

    Other processes of a run prefix theirs with the rank: a file can be missing on one node only.
    """
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message)
    try:
        work()
    except UserError as error:
        who = "silva" if is_first_process() else f"silva (rank {os.environ['RANK']})"
        message = " ".join(str(error).splitlines())  # a library's words inside it may hold line breaks
        print(f"{who}: error: {message}", file=sys.stderr)
        return 2
    return 0
