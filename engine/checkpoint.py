"""Saving and resuming a run: megatron-core's distributed checkpoint, published atomically, read without pickle.

A checkpoint is a folder `step-00000120` with the model, the optimizer and a `run.json` that tells which run it
belongs to. The number is the step that comes next.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint import filesystem

from silva.engine.errors import UserError

PREFIX = "step-"

# What torch's checkpoint index (`.metadata`) is made of. It is a pickle, so it is read through this list:
# anything else in it is refused instead of run.
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
    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in _INDEX_NAMES or (module in _INDEX_MODULES and "." not in name)
        if known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint's index")


@contextlib.contextmanager
def _guarded_index() -> Iterator[None]:
    """While it lasts, torch reads a checkpoint's index through the allow-list."""

    def load(file: BinaryIO) -> Any:
        return _IndexUnpickler(file).load()

    patched: Any = filesystem
    original = patched.pickle
    patched.pickle = SimpleNamespace(load=load, dump=pickle.dump)
    try:
        yield
    finally:
        patched.pickle = original


def _writers_queue() -> Any:
    """The writers' result queue. A synchronous save puts and gets in one process, so a plain queue serves.

    megatron-core's own is a spawned manager process per rank that imports the whole program again (12 s for a
    save of 1 s); a pipe would block for ever once a rank's results exceed its 64 KiB.
    """
    shared: Any = filesystem_async
    if shared._results_queue is None:
        shared._results_queue = queue.Queue()
    return shared._results_queue


def _metadata() -> dict[str, Any]:
    """How the optimizer is sharded: the form that can be loaded on any other layout."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _without_extra_state(state: dict[str, Any]) -> dict[str, Any]:
    """Drop `_extra_state` objects: they are empty without FP8 and would be read back by plain pickle."""
    kept = {}
    for key, value in state.items():
        if isinstance(key, str) and key.endswith("_extra_state"):
            continue
        if isinstance(value, ShardedObject):
            raise TypeError(f"checkpoint: {key} would be saved as a pickled object")
        kept[key] = _without_extra_state(value) if isinstance(value, dict) else value
    return kept


def unwrapped(chunk: Any) -> Any:
    """The model under megatron-core's wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _sharded_state(chunks: Sequence[Any], optimizer: Any, *, loading: bool) -> dict[str, Any]:
    metadata = _metadata()
    keys = ["model"] if len(chunks) == 1 else [f"model{k}" for k in range(len(chunks))]
    state = {
        key: _without_extra_state(unwrapped(chunk).sharded_state_dict(metadata=metadata))
        for key, chunk in zip(keys, chunks, strict=True)
    }
    model = state["model"] if len(chunks) == 1 else dict(state)
    state["optimizer"] = optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    return state


def save(
    folder: Path, step: int, chunks: Sequence[Any], optimizer: Any, run: dict[str, Any], *, keep: int
) -> Path:
    """Write `folder/step-...`, collectively, and remove all but the newest `keep` checkpoints.

    It is written under another name and renamed when it is whole: a killed run leaves no half checkpoint.

    Args:
        step: the step that comes next.
        run: what identifies the run; `latest` and `load` compare it.
    """
    patched: Any = filesystem_async
    patched._get_write_results_queue = _writers_queue
    final = folder / f"{PREFIX}{step:08d}"
    partial = final.with_suffix(".partial")
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    content = {k: v for k, v in _metadata().items() if k != "dp_cp_group"}
    dist_checkpointing.save(
        _sharded_state(chunks, optimizer, loading=False),
        str(partial),
        content_metadata=content,
    )
    dist.barrier()
    if first:
        (partial / "run.json").write_text(json.dumps({"step": step, **run}, indent=1) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(p for p in folder.glob(f"{PREFIX}????????") if (p / "run.json").is_file())


def load(checkpoint: Path, chunks: Sequence[Any], optimizer: Any, run: dict[str, Any]) -> int:
    """Read a checkpoint into model and optimizer, on any layout. Returns the step that comes next.

    Raises:
        UserError: the checkpoint belongs to a run of other data, another model or other settings of the data.
    """
    saved = json.loads((checkpoint / "run.json").read_text())
    for key, value in run.items():
        if saved.get(key) != value:
            raise UserError(
                f"{checkpoint}: belongs to another run ({key} was {saved.get(key)!r}, is {value!r}); "
                "give the new run another `output`, or remove the folder to start again"
            )
    with _guarded_index():
        state = dist_checkpointing.load(_sharded_state(chunks, optimizer, loading=True), str(checkpoint))
    for k, chunk in enumerate(chunks):
        key = "model" if len(chunks) == 1 else f"model{k}"
        # strict=False: `_extra_state` was left out on purpose; parameters are checked by hand
        missing, unexpected = unwrapped(chunk).load_state_dict(state[key], strict=False)
        lost = [name for name in missing if not name.endswith("_extra_state")]
        if lost or unexpected:
            raise UserError(
                f"{checkpoint}: does not hold this model: missing {lost}, unexpected {unexpected}"
            )
    optimizer.load_state_dict(state["optimizer"])
    return int(saved["step"])
