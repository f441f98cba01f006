"""Reads what a checkpoint's folder says of itself: its name, `run.json`, and torch's index of what lies where.

Nothing here touches a model. The index is a pickle, so it is read through a list of the names that it may hold.
"""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

from silva.engine.parallel import groups

import torch
from torch.distributed.checkpoint import filesystem

from silva.engine.errors import UserError

PREFIX = "step-"
PARTIAL = ".partial"
# says which run the checkpoint belongs to, which step comes next, and the size of every file
RUN = "run.json"
# torch's index of what lies where in which file
INDEX = ".metadata"
# ends the errors about a damaged checkpoint
ELSE = "remove the checkpoint to go on from the one before it"

# The names that torch's checkpoint index may hold. The index is a pickle: any other name in it is refused, because
# loading it could run code.
_INDEX_MODULES = {
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
    "megatron.core.dist_checkpointing.strategies.torch",
}
_INDEX_NAMES = {
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("builtins", "list"),
    ("builtins", "dict"),
}


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles an index, and refuses names that are not in the list."""

    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in _INDEX_NAMES or (module in _INDEX_MODULES and "." not in name)
        if known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a checkpoint's index")


@contextlib.contextmanager
def guarded_index() -> Iterator[None]:
    """Have torch read a checkpoint's index through the list of allowed names while the block lasts.

    Every release of torch up to 2.13 loads it with `pickle.load`, and none offers another way.
    """

    def load(file: BinaryIO) -> Any:
        return _IndexUnpickler(file).load()

    patched: Any = filesystem
    original = patched.pickle
    patched.pickle = SimpleNamespace(load=load, dump=pickle.dump)
    try:
        yield
    finally:
        patched.pickle = original


def checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints of a run, oldest first."""
    return sorted(p for p in folder.glob(f"{PREFIX}????????") if (p / RUN).is_file())


def described(checkpoint: Path) -> dict[str, Any]:
    """Return what `run.json` says; the other files are not looked at.

    Raises:
        UserError: it is damaged, or written by another version.
    """
    try:
        saved: dict[str, Any] = json.loads((checkpoint / RUN).read_text(encoding="utf-8"))
        complete = isinstance(saved["step"], int) and isinstance(saved["files"], dict)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{checkpoint / RUN}: is damaged ({error!r}); {ELSE}") from error
    if not complete:
        raise UserError(f"{checkpoint / RUN}: is damaged (its step or its files are missing); {ELSE}")
    return saved


def checked(checkpoint: Path) -> dict[str, Any]:
    """Return what `run.json` says, if the checkpoint is complete.

    The call is collective: rank 0 reads the folder, and every rank returns what it found or raises its error.

    Args:
        checkpoint: its folder.

    Returns:
        The content of `run.json`.

    Raises:
        UserError: the checkpoint is damaged.
    """
    saved: dict[str, Any] = groups.from_first(lambda: _inspected(checkpoint))
    return saved


def _inspected(checkpoint: Path) -> dict[str, Any]:
    saved = described(checkpoint)
    for name, size in saved["files"].items():
        file = checkpoint / name
        if not file.is_file():
            raise UserError(f"{file}: is missing; {ELSE}")
        if file.stat().st_size != size:
            raise UserError(f"{file}: has {file.stat().st_size} bytes instead of {size}; {ELSE}")
    try:
        with (checkpoint / INDEX).open("rb") as stream:
            _IndexUnpickler(stream).load()
    # a damaged pickle may raise any exception
    except Exception as error:
        raise UserError(f"{checkpoint / INDEX}: is no index of a checkpoint ({error}); {ELSE}") from error
    return saved
