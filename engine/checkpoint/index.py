"""Reads what a checkpoint's folder says of itself: its name, and `run.json` with the run and every file's digest.

Nothing here touches a model.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from silva.engine.parallel import groups

import torch.distributed as dist

from silva.engine import digests
from silva.engine.errors import UserError

PREFIX = "step-"
PARTIAL = ".partial"
# says which run the checkpoint belongs to, which step comes next, and size and digest of every file
RUN = "run.json"
# ends the name of a file that holds another one's digest until the checkpoint is complete
DIGEST = ".digest"
# ends the name of a damaged checkpoint
ASIDE = ".damaged"


class Damaged(UserError):
    """Says that a checkpoint is not what was written; another one may be."""


def checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints of a run, oldest first."""
    return sorted(p for p in folder.glob(f"{PREFIX}????????") if (p / RUN).is_file())


def described(checkpoint: Path) -> dict[str, Any]:
    """Return what `run.json` says; the other files are not looked at.

    Raises:
        Damaged: it is not what was written, or belongs to another checkpoint.
    """
    file = checkpoint / RUN
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        digest = saved.pop("digest")
        step, files = saved["step"], saved["files"]
        named = [(name, size, code) for name, (size, code) in files.items()]
    # whatever a damaged file may lead to
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{file}: is damaged ({str(error)[:80]!r})") from error
    if digest != _digest_of(saved):
        raise Damaged(f"{file}: is not what was written (its digest differs)")
    if checkpoint.name != f"{PREFIX}{step:08d}":
        raise Damaged(f"{file}: is that of step {step}, and the folder's name is another one")
    if any(Path(name).name != name for name, _, _ in named):
        raise Damaged(f"{file}: names a file outside the checkpoint")
    found: dict[str, Any] = saved
    return found


def publish(partial: Path, final: Path, run: dict[str, Any]) -> None:
    """Write `run.json` with the digest of every file, and give a complete checkpoint its name.

    Everything is on the disk before the name is there.

    Args:
        partial: the folder that was written.
        final: what it will be called; one that is there is replaced.
        run: what identifies the run, and its step, as JSON.
    """
    files = {}
    for path in sorted(partial.iterdir()):
        if path.name.endswith(DIGEST):
            continue
        known = path.with_name(path.name + DIGEST)
        code = known.read_text() if known.is_file() else settled(path)
        files[path.name] = [path.stat().st_size, code]
    for path in partial.glob(f"*{DIGEST}"):
        path.unlink()
    content = {**run, "files": files}
    (partial / RUN).write_text(json.dumps(content | {"digest": _digest_of(content)}, indent=1) + "\n")
    settled(partial / RUN)
    _sync(partial)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    _sync(final.parent)


def settled(path: Path) -> str:
    """Return the digest of a file when its bytes are on the disk."""
    _sync(path)
    return digests.of_file(path)


def damage(checkpoint: Path) -> str | None:
    """Say which file of a checkpoint is not what was written; None if all are.

    The call is collective: every rank reads its share of the files.

    Args:
        checkpoint: its folder, whose `run.json` is sound.
    """
    files: dict[str, Any] = described(checkpoint)["files"]
    problem = None
    for place, (name, (size, code)) in enumerate(sorted(files.items())):
        if place % dist.get_world_size() == dist.get_rank():
            problem = problem or _problem(checkpoint / name, size, code)
    problems: list[str | None] = [None] * dist.get_world_size()
    # a rank with more to read may be minutes behind
    groups.wait_for_all()
    dist.all_gather_object(problems, problem)
    return next((each for each in problems if each), None)


def _problem(file: Path, size: int, code: str) -> str | None:
    try:
        found = file.stat().st_size
        if found != size:
            return f"{file}: has {found:,} bytes instead of {size:,}"
        same = digests.of_file(file) == code
    except OSError as error:
        return f"{file}: cannot be read ({error.strerror})"
    return None if same else f"{file}: is not what was written (its digest differs)"


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that it is none any more, and return its new name."""
    aside = checkpoint.with_name(f"{checkpoint.name}{ASIDE}")
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    return aside


def _digest_of(content: dict[str, Any]) -> str:
    return digests.of_bytes(json.dumps(content, sort_keys=True).encode())


def _sync(path: Path) -> None:
    """Have the bytes of a file, or the names in a folder, written to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
