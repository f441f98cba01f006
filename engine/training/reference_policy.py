"""The reference policy's log-probs: one forward-only pass before training, kept on disk.

The cache file's name is a digest of everything the numbers depend on: the bytes of the weights, every token and
every scored flag, and the number type. A stale cache cannot be found under the new name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

FORMAT = "1"  # raised whenever the meaning of the cached numbers changes


def weights_digest(folder: Path) -> str:
    """Digest of a checkpoint's config and every byte of its safetensors files (hashed in parallel)."""
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])

    def digest(path: Path) -> bytes:
        with path.open("rb") as file:
            return hashlib.file_digest(file, hashlib.blake2b).digest()  # releases the interpreter lock

    with ThreadPoolExecutor(min(16, len(files))) as pool:
        parts = pool.map(digest, files)
        whole = hashlib.blake2b(digest_size=16)
        for path, part in zip(files, parts, strict=True):
            whole.update(path.name.encode() + b"\0" + part)
    return whole.hexdigest()


def cache_key(weights: str, data: str, dtype: torch.dtype, mismatched: bool) -> str:
    """The name under which log-probs are kept.

    Args:
        weights: `weights_digest` of the reference checkpoint.
        data: `DataSet.fingerprint`, which covers tokenizer, template and length rule by their results.
        dtype: the number type of the forward pass.
        mismatched: whether KTO's mismatched pairs are included.
    """
    text = "\0".join([FORMAT, weights, data, str(dtype), str(mismatched)])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def cached(
    folder: Path, key: str, count: int, compute: Callable[[], NDArray[np.float32]]
) -> tuple[NDArray[np.float32], bool]:
    """The (count,) log-probs under `key`, read or computed. Collective: every rank gets the same array.

    Returns:
        the log-probs, and whether they came from the cache. An unreadable file, or one of another length, is
        computed again and replaced.
    """
    path = folder / f"{key}.safetensors"
    # rank 0 alone decides, so that ranks that see different file systems still agree
    found = [_read(path, count) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    if found[0] is not None:
        return found[0], True
    values = compute()
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({"logprob": values}, partial, metadata={"key": key})
        os.replace(partial, path)
    dist.barrier()
    return values, False


def _read(path: Path, count: int) -> NDArray[np.float32] | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, "numpy") as file:
            values = file.get_tensor("logprob")
    except (SafetensorError, OSError):
        return None
    return values if values.shape == (count,) else None
