"""Keeps tokenized trees on disk: an Arrow file with one row per tree, read through a memory map.

Only a few numbers per tree are held in memory; a tree's arrays are views into the mapped file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from silva.engine.data.trees.group import ABSENT, TokenGroup

_LISTS = ("tokens", "length", "shared", "run_pointer", "runs", "owner", "comparisons")
_BYTES = ("instruction", "digest")
SCHEMA = pa.schema(
    [
        # as in TokenGroup, arrays of pairs flattened
        *((name, pa.list_(pa.int32())) for name in _LISTS),
        ("absolute", pa.list_(pa.uint8())),
        *((name, pa.binary(16)) for name in _BYTES),
    ]
)


def to_batch(groups: Sequence[TokenGroup]) -> pa.RecordBatch:
    """Convert trees to their Arrow form."""
    columns = [_lists([getattr(g, name).reshape(-1) for g in groups], np.int32) for name in _LISTS]
    columns.append(_lists([g.absolute for g in groups], np.uint8))
    columns.append(pa.array([g.instruction or bytes(16) for g in groups], pa.binary(16)))
    columns.append(pa.array([_digest(g) for g in groups], pa.binary(16)))
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def write(path: Path, groups: Sequence[TokenGroup]) -> None:
    """Write trees to `path` as one Arrow file."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(to_batch(groups))


class Shard:
    """Holds the trees of one Arrow record batch.

    Args:
        batch: of `to_batch`.

    Attributes:
        sequences: (n,) int64, how many each tree has.
        comparisons: (n,) int64, how many each tree has.
        tokens: (n,) int64, tokens of each merged tree.
        instruction: (n, 16) uint8, of `instruction_digest`.
        digest: (n, 16) uint8, of everything that a tree holds except its instruction.
    """

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._lists: dict[str, tuple[NDArray[np.int32], NDArray]] = {}
        for name in (*_LISTS, "absolute"):
            column = batch.column(name)
            self._lists[name] = (column.offsets.to_numpy(), column.values.to_numpy())
        self.instruction, self.digest = (
            np.frombuffer(batch.column(name).buffers()[1], np.uint8)[: 16 * len(batch)].reshape(-1, 16)
            for name in _BYTES
        )
        offsets, owner = self._lists["owner"]
        self.sequences = _highest(owner, offsets) + 1
        self.comparisons = self._counts("comparisons") // 2
        self.tokens = self._counts("tokens")

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Map a file that `write` made into memory."""
        return cls(pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def longest(self) -> NDArray[np.int64]:
        """Return the tokens of the longest path of each tree, (n,) int64."""
        offsets, length = self._lists["length"]
        return _highest(length, offsets)

    @property
    def sides(self) -> NDArray[np.int64]:
        """Return how many chosen and how many rejected sides the comparisons of each tree have, (n, 2) int64."""
        offsets, compared = self._lists["comparisons"]
        present = np.cumsum(np.insert(compared.reshape(-1, 2) != ABSENT, 0, False, axis=0), axis=0)
        return np.diff(present[offsets // 2], axis=0).astype(np.int64)

    def __getitem__(self, k: int) -> TokenGroup:
        """Return tree `k`; its arrays are read-only views."""
        part = {name: values[offsets[k] : offsets[k + 1]] for name, (offsets, values) in self._lists.items()}
        return TokenGroup(
            tokens=part["tokens"],
            length=part["length"],
            shared=part["shared"],
            run_pointer=part["run_pointer"],
            runs=part["runs"].reshape(-1, 2),
            owner=part["owner"],
            comparisons=part["comparisons"].reshape(-1, 2),
            absolute=part["absolute"].view(bool),
            instruction=self.instruction[k].tobytes(),
        )

    def _counts(self, name: str) -> NDArray[np.int64]:
        return np.diff(self._lists[name][0]).astype(np.int64)


def _highest(values: NDArray, offsets: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the largest value of each list; every tree holds at least one path, so no list is empty."""
    found = np.maximum.reduceat(values, offsets[:-1]) if len(offsets) > 1 else np.zeros(0, np.int32)
    return found.astype(np.int64)


def _lists(parts: Sequence[NDArray], kind: type) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, parts)])
    if offsets[-1] >= 2**31:
        raise ValueError("a shard holds 2^31 numbers or more")
    values: NDArray = np.concatenate([np.zeros(0, kind), *parts]).astype(kind, copy=False)
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))


def _digest(group: TokenGroup) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name in (*_LISTS, "absolute"):
        array = getattr(group, name)
        digest.update(np.int64(array.size).tobytes() + array.tobytes())
    return digest.digest()
