"""Computes the digests by which files and values are known again."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any


def of_bytes(content: bytes) -> str:
    """Return the digest of bytes, in hexadecimal."""
    return str(_new(content).hexdigest())


def of_file(path: Path) -> str:
    """Return the digest of a file's bytes, in hexadecimal; it equals `of_bytes` of them.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, _new).hexdigest()


def _new(content: bytes = b"") -> Any:
    return hashlib.blake2b(content, digest_size=16)
