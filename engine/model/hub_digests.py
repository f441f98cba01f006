"""Compares a checkpoint's weight files with the digests that the Hugging Face hub gave when they were downloaded.

The hub keeps large files under their SHA-256. Its client writes it down: in the name of the file that a snapshot links
to, or in the metadata beside a folder into which it has downloaded.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from silva.engine.parallel import groups

import torch.distributed as dist

from silva.engine.errors import UserError

_SHA256 = re.compile(r"[0-9a-f]{64}")


def check(folder: Path) -> int:
    """Check the files of a checkpoint of which a digest is known.

    The call is collective. The processes of a node share its files, because every node may have its own copy.

    Args:
        folder: of the checkpoint.

    Returns:
        The number of files that have a known digest.

    Raises:
        UserError: on every process, if a file of any node is not what the hub gave.
    """
    files = [(file, digest) for file in sorted(folder.glob("*.safetensors")) if (digest := known(file))]
    problem = None
    share, processes = groups.local_rank(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    for file, digest in files[share % processes :: processes]:
        with file.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != digest:
            problem = (
                f"{file}: is not what the model hub gave (SHA-256 {found[:12]}... instead of {digest[:12]}...); "
                "remove it and download the checkpoint again"
            )
            break
    problems: list[str | None] = [None] * groups.world_size()
    groups.wait_for_all()
    dist.all_gather_object(problems, problem)
    first = next((each for each in problems if each), None)
    if first is not None:
        raise UserError(first)
    return len(files)


def known(file: Path) -> str | None:
    """Return the SHA-256 under which the hub keeps a file, in hexadecimal; None if nothing says it.

    Args:
        file: of a snapshot in the hub's cache, or of a folder into which its client has downloaded.
    """
    if file.is_symlink() and _SHA256.fullmatch(name := os.path.basename(os.readlink(file))):
        return name
    metadata = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
    try:
        # commit, digest, time; a file that was changed on purpose afterwards is younger than that
        _, digest, when = metadata.read_text(encoding="utf-8").split()
        changed = file.stat().st_mtime > float(when) + 1
    except (OSError, ValueError):
        return None
    return digest if _SHA256.fullmatch(digest) and not changed else None
