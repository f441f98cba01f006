"""Computes the reference policy's log-probs: one forward-only pass before training, kept on disk.

The cache file's name is a digest of everything that the numbers depend on: the bytes of the weights, every token and
every scored flag, and the number type. So a stale file is never read, because the new numbers have another name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from silva.engine.parallel import groups

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from silva.engine import digests, file_errors
from silva.engine.data.dataset import DataSet
from silva.engine.data.loader import BatchLoader
from silva.engine.data.trees.packing import pack_rows
from silva.engine.errors import UserError
from silva.engine.model import gpt, hf
from silva.engine.progress import ProgressBar, say
from silva.engine.recipe.schema import Recipe
from silva.engine.training.inputs import Inputs, batches_of
from silva.engine.training.passes import sequence_values

# is raised whenever the meaning of the cached numbers changes
FORMAT = "reference 3"

LogProbs = NDArray[np.float32]


def log_probs(
    recipe: Recipe, inputs: Inputs, chunks: Sequence[torch.nn.Module]
) -> tuple[LogProbs, LogProbs | None]:
    """Return the log-probs of training and validation data under the reference policy.

    The call is collective.

    Args:
        recipe: of the run.
        inputs: of the run.
        chunks: of `gpt.build`, not wrapped; their weights are replaced if anything has to be computed.

    Returns:
        Two float32 arrays, of the training data and of the validation data (None if there is none). Each has the shape
        (sequences of the data set and, for KTO, two for each comparison,).

    Raises:
        UserError: the reference policy is of another shape than the model.
    """
    folder = hf.fetch(recipe.reference_path)
    found = hf.read_shape(folder)
    # how long a sequence may be, and what the shape is called, change nothing about what is computed
    other = [
        f"{key} is {getattr(found, key)} and not {value}"
        for key, value in dataclasses.asdict(inputs.shape).items()
        if key not in ("max_position", "architecture") and getattr(found, key) != value
    ]
    if other:
        raise UserError(
            f"{recipe.reference_path}: the reference policy has another shape than {recipe.model.path} "
            f"({', '.join(other)}); take a checkpoint of the same model"
        )
    weights = groups.from_first(lambda: weights_digest(folder))
    loaded = False

    def of(data: DataSet, title: str) -> LogProbs:
        # each tree once, however often an epoch takes it
        once = data.with_copies(np.ones(len(data), np.int64))
        batches = batches_of(once, recipe, inputs.shape, training=False)
        count = once.sequences + (2 * once.comparisons if batches.mismatched else 0)

        def compute() -> LogProbs:
            nonlocal loaded
            if not loaded:
                hf.load(chunks, folder, inputs.shape)
                loaded = True
            multiple = gpt.row_multiple(recipe.parallel)
            return _computed(chunks, batches, count, title, multiple, inputs.tokenizer.pad_id)

        dtype = getattr(torch, recipe.model.dtype)
        key = cache_key(weights, once.fingerprint, dtype, batches.mismatched)
        values, hit = cached(recipe.reference_cache, key, count, compute)
        say(f"reference  {count:,} log-probs {'from the cache' if hit else 'computed'}")
        return values

    training = of(inputs.data, "reference log-probs")
    held = None if inputs.validation is None else of(inputs.validation, "reference, held out")
    return training, held


def _computed(
    chunks: Sequence[Any], batches: BatchLoader, count: int, title: str, multiple: int, pad_id: int
) -> LogProbs:
    """Compute (count,) log-probs of every sequence, by forward passes alone; the same on every rank."""
    found = torch.zeros(count, dtype=torch.float64, device=groups.device())
    with (
        ProgressBar(title, len(batches), visible=groups.rank() == 0) as bar,
        contextlib.closing(batches.prefetch(0, len(batches))) as coming,
    ):
        for _, batch in coming:
            mine = [*batch.rows, *batch.mismatched]
            values = sequence_values(chunks, pack_rows(mine, multiple=multiple, pad_id=pad_id))
            # stages before the last one have no values
            for pieces, part in zip(mine, values, strict=False):
                ids = [torch.from_numpy(piece.sequence_ids) for piece in pieces]
                if ids:
                    # assigned, not added, because a tree that the end of a batch cuts has sequences in both batches
                    found[torch.cat(ids).to(found.device)] = part.double()
            bar.advance()
    return _merge_ranks(found)


def _merge_ranks(found: Tensor) -> LogProbs:
    """Combine the numbers of the data-parallel ranks: log-probs are negative, and 0 on ranks that computed nothing."""
    if groups.is_last_stage():
        dist.all_reduce(found, op=dist.ReduceOp.MIN, group=groups.data_group())
    if groups.pipeline_size() > 1:
        dist.broadcast(found, src=groups.last_stage_rank(), group=groups.pipeline_group())
    return found.float().cpu().numpy()


@functools.cache
def weights_digest(folder: Path) -> str:
    """Compute the digest of a checkpoint's config and of every byte of its safetensors files, once in a process."""
    files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])

    def digest(path: Path) -> bytes:
        with path.open("rb") as file:
            # releases the interpreter lock, so the threads run in parallel
            return hashlib.file_digest(file, hashlib.blake2b).digest()

    with ThreadPoolExecutor(min(16, len(files))) as pool:
        parts = pool.map(digest, files)
        whole = hashlib.blake2b(digest_size=16)
        for path, part in zip(files, parts, strict=True):
            whole.update(path.name.encode() + b"\0" + part)
    return whole.hexdigest()


def cache_key(weights: str, data: str, dtype: torch.dtype, mismatched: bool) -> str:
    """Compute the name under which log-probs are kept.

    Args:
        weights: `weights_digest` of the reference checkpoint.
        data: `DataSet.fingerprint`, which covers tokenizer, template and length rule by their results.
        dtype: the number type of the forward pass.
        mismatched: whether KTO's mismatched pairs are included.

    Returns:
        The digest of all of these, in hexadecimal.
    """
    text = "\0".join([FORMAT, weights, data, str(dtype), str(mismatched)])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def cached(folder: Path, key: str, count: int, compute: Callable[[], LogProbs]) -> tuple[LogProbs, bool]:
    """Read the log-probs under `key`, or compute and keep them.

    The call is collective: every rank gets the same array. An unreadable file, or one of another length, is computed
    again and replaced.

    Args:
        folder: of the cache.
        key: of `cache_key`.
        count: how many log-probs there are.
        compute: returns them as (count,) float32; called on every rank or on none.

    Returns:
        The log-probs, and whether they came from the cache.
    """
    path = folder / f"{key}.safetensors"
    # rank 0 alone decides, so that ranks that see different file systems still agree
    found: LogProbs | None = groups.from_first(lambda: _read(path, key, count))
    if found is not None:
        return found, True
    groups.from_first(lambda: _check_writable(folder))
    values = compute()

    def keep() -> None:
        partial = path.with_suffix(".partial")
        about = {"key": key, "digest": digests.of_bytes(values.tobytes())}
        with file_errors.named(path, SafetensorError):
            folder.mkdir(parents=True, exist_ok=True)
            save_file({"logprob": values}, partial, metadata=about)
            os.replace(partial, path)

    groups.from_first(keep)
    return values, False


def _check_writable(folder: Path) -> None:
    """Raise UserError if nothing can be kept in a folder, before hours are spent on what is to be kept."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    with file_errors.named(folder):
        tempfile.TemporaryFile(dir=there).close()


def _read(path: Path, key: str, count: int) -> LogProbs | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, "numpy") as file:
            values, written = file.get_tensor("logprob"), file.metadata() or {}
    except (SafetensorError, OSError):
        values, written = np.zeros(0, np.float32), {}
    same = (written.get("key"), written.get("digest")) == (key, digests.of_bytes(values.tobytes()))
    if same and values.shape == (count,):
        return values
    say(f"damaged    {path}: is not what was written; its log-probs are computed again")
    return None
