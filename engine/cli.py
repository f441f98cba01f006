"""What the command-line programs share: how a user's mistake ends, and who speaks."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from silva.engine.errors import UserError
from silva.engine.progress import is_first_process

# megatron-core talking to its own developers: old names of its options and of torch's, and a look at a `.grad`
# that it knows may be absent. A user can do nothing about them.
HARMLESS = (
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf Tensor",
    r"`torch\.distributed\.\w+` is deprecated",
)


def run(work: Callable[[], None]) -> int:
    """Do the work; the exit code is 0, or 2 after one line on stderr for bad input.

    Other processes of a run prefix theirs with the rank: a file can be missing on one node only. Where others are left
    that this process has a group with, it does not return but ends at once, so that torchrun ends them too.
    """
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message)
    try:
        work()
    except UserError as error:
        who = "silva" if is_first_process() else f"silva (rank {os.environ['RANK']})"
        message = " ".join(str(error).splitlines())  # a library's words inside it may hold line breaks
        print(f"{who}: error: {message}", file=sys.stderr)
        code = 2
    except BaseException:
        if not _others_are_left():
            raise
        traceback.print_exc()
        code = 1
    else:
        return 0
    if _others_are_left():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _others_are_left() -> bool:
    dist: Any = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
