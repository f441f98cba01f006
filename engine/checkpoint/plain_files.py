"""Keeps a checkpoint's index and its settings as JSON, where torch and megatron-core would pickle them.

Unpickling a file may run code that is in it. torch loads its index by `pickle.load` in every release up to 2.13, and
none offers another way, so its functions are replaced while a checkpoint is written or read. Tensors stay in torch's
files, which are read with `weights_only`: they can hold tensors and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO
from unittest.mock import patch

# prepares megatron-core, so it stands before megatron-core's import
import silva.engine.parallel  # noqa: F401

import torch
from megatron.core.dist_checkpointing.strategies import common
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

# the settings that are no tensors: those of the optimizer's groups
SETTINGS = "common.json"
FORMAT = "silva index 1"


@contextlib.contextmanager
def in_use() -> Iterator[None]:
    """While the block lasts, have torch and megatron-core write and read JSON."""
    plain = SimpleNamespace(dump=_dump, load=_load)
    with (
        patch.object(filesystem, "pickle", plain),
        patch.object(common.TorchCommonSaveStrategy, "save_common", _save_settings),
        patch.object(common.TorchCommonLoadStrategy, "load_common", _load_settings),
    ):
        yield


# ---------------------------------------------------------------- the index: what lies where


def _dump(index: Metadata, stream: BinaryIO) -> None:
    """Write torch's index; it fits where torch's `pickle.dump` stands."""
    tensors: dict[str, Any] = {}
    for name, tensor in index.state_dict_metadata.items():
        if not isinstance(tensor, TensorStorageMetadata):
            raise TypeError(f"checkpoint: {name} would be saved as a pickled object")
        chunks = [[list(chunk.offsets), list(chunk.sizes)] for chunk in tensor.chunks]
        tensors[name] = [_name(tensor.properties.dtype), list(tensor.size), chunks]
    places = [
        [place.fqn, place.offset and list(place.offset), info.relative_path, info.offset, info.length]
        for place, info in index.storage_data.items()
    ]
    content = {"format": FORMAT, "version": index.version, "tensors": tensors, "places": places}
    stream.write(json.dumps(content).encode())


def _load(stream: BinaryIO) -> Metadata:
    """Read torch's index; it fits where torch's `pickle.load` stands.

    Raises:
        ValueError: it is none, or names a file outside the checkpoint.
    """
    try:
        found = json.loads(stream.read())
        if found["format"] != FORMAT:
            raise ValueError(f"its format is {found['format']!r:.40} and not {FORMAT!r}")
        tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {
            _text(name): TensorStorageMetadata(
                TensorProperties(dtype=_dtype(dtype)),
                _size(size),
                [ChunkStorageMetadata(_size(offsets), _size(sizes)) for offsets, sizes in chunks],
            )
            for name, (dtype, size, chunks) in found["tensors"].items()
        }
        places = {
            MetadataIndex(_text(name), offset and _size(offset)): filesystem._StorageInfo(
                _file(path), _count(start), _count(length)
            )
            for name, offset, path, start, length in found["places"]
        }
        version = None if found["version"] is None else _text(found["version"])
    # whatever a damaged file may lead to
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"no index of a checkpoint: {str(error)[:200]}") from None
    return Metadata(tensors, storage_data=places, version=version)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: object) -> torch.dtype:
    found = getattr(torch, _text(name), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"{name!r:.40} is no number type")
    return found


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no text")
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ValueError(f"{value!r:.40} is no count")
    return value


def _size(values: Any) -> torch.Size:
    return torch.Size([_count(value) for value in values])


def _file(name: object) -> str:
    if not _text(name) or Path(_text(name)).name != name:
        raise ValueError(f"{name!r:.80} is no file of the checkpoint")
    return _text(name)


# ---------------------------------------------------------------- settings


def _save_settings(self: Any, state: dict[str, Any], folder: str | Path) -> None:
    """Stand in for `TorchCommonSaveStrategy.save_common`."""
    if torch.distributed.get_rank() == 0:
        (Path(folder) / SETTINGS).write_text(json.dumps(_plain(state, "")) + "\n", encoding="utf-8")


def _load_settings(self: Any, folder: str | Path) -> dict[str, Any]:
    """Stand in for `TorchCommonLoadStrategy.load_common`."""
    return read_settings(Path(folder) / SETTINGS)


def read_settings(file: Path) -> dict[str, Any]:
    """Read the settings of a checkpoint.

    Raises:
        ValueError: they are none.
    """
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"no settings of a checkpoint: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise ValueError(f"no settings of a checkpoint: {found!r:.40}")
    return _filled(found)


def _plain(value: Any, at: str) -> Any:
    """Return a value as JSON can hold it; tuples become lists, which torch's optimizers take as well."""
    if isinstance(value, dict):
        if any(not isinstance(key, str) for key in value):
            raise TypeError(f"checkpoint: a key under {at or 'the settings'} is no text")
        return {key: _plain(inner, f"{at}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, at) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"checkpoint: {at} is {value}")
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"checkpoint: {at} is a {type(value).__name__}, which would be pickled")


def _filled(value: Any) -> Any:
    """Return JSON as settings: lists of numbers are the betas, which torch writes as a tuple."""
    if isinstance(value, dict):
        return {key: _filled(inner) for key, inner in value.items()}
    if isinstance(value, list):
        inner = [_filled(each) for each in value]
        return tuple(inner) if all(isinstance(each, int | float) for each in inner) and inner else inner
    return value
