"""Names what a checkpoint holds of a model and its optimizer, and reads it back on any layout."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# prepares megatron-core, so it stands before megatron-core's import
import silva.engine.parallel  # noqa: F401

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint import CheckpointException

from silva.engine.checkpoint import optimizer_state, plain_files
from silva.engine.checkpoint.index import described
from silva.engine.errors import UserError
from silva.engine.model.gpt import unwrapped


def metadata() -> dict[str, Any]:
    """Return how megatron-core names and cuts what is saved, so that it can be loaded on any other layout."""
    return {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _without_extra_state(state: dict[str, Any]) -> dict[str, Any]:
    """Drop `_extra_state` objects, which are empty without FP8 and would be read back by plain pickle."""
    kept = {}
    for key, value in state.items():
        if isinstance(key, str) and key.endswith("_extra_state"):
            continue
        if isinstance(value, ShardedObject):
            raise TypeError(f"checkpoint: {key} would be saved as a pickled object")
        kept[key] = _without_extra_state(value) if isinstance(value, dict) else value
    return kept


def sharded(chunks: Sequence[Any], optimizer: Any, *, loading: bool) -> dict[str, Any]:
    """Return the state of model and optimizer for megatron-core's `dist_checkpointing`.

    Args:
        chunks: the model of this rank, one module per virtual pipeline stage, wrapped or not.
        optimizer: of `get_megatron_optimizer`; None leaves it out.
        loading: whether the state will be read into.
    """
    names = metadata()
    keys = ["model"] if len(chunks) == 1 else [f"model{k}" for k in range(len(chunks))]
    state = {
        key: _without_extra_state(unwrapped(chunk).sharded_state_dict(metadata=names))
        for key, chunk in zip(keys, chunks, strict=True)
    }
    if optimizer is not None:
        model = state["model"] if len(chunks) == 1 else dict(state)
        state["optimizer"] = optimizer_state.sharded(model, optimizer, names, loading=loading)
    return state


def load(checkpoint: Path, chunks: Sequence[Any], optimizer: Any) -> int:
    """Read a checkpoint into model and optimizer, on any layout.

    The call is collective.

    Args:
        checkpoint: its folder.
        chunks: the model of this rank, one module per virtual pipeline stage, wrapped or not.
        optimizer: of `get_megatron_optimizer`; None reads the model alone, whose chunks then need no gradient buffers.

    Returns:
        The step that comes next.

    Raises:
        UserError: the checkpoint is damaged, or holds another model. That files are what was written is not checked
            here; see `index.damage`.
    """
    saved = described(checkpoint)
    problem, cause = None, None
    try:
        with plain_files.in_use(), warnings.catch_warnings():
            # megatron-core reads through functions of torch that have newer names, and nobody here can change that
            warnings.filterwarnings("ignore", "(`load_state_dict` is|Please use DTensor)", FutureWarning)
            state = dist_checkpointing.load(sharded(chunks, optimizer, loading=True), str(checkpoint))
    except (CheckpointException, CheckpointingException, pickle.UnpicklingError, ValueError) as error:
        why = reasons(error) if isinstance(error, CheckpointException) else _reason(error)
        problem, cause = (
            f"{checkpoint}: cannot be read ({why}); remove it to go on from the one before it",
            error,
        )
    problems: list[str | None] = [None] * dist.get_world_size()
    # not every release of megatron-core tells the other ranks
    dist.all_gather_object(problems, problem)
    for found in [problem, *problems]:
        if found:
            raise UserError(found) from cause
    for k, chunk in enumerate(chunks):
        key = "model" if len(chunks) == 1 else f"model{k}"
        # strict=False, because `_extra_state` was left out on purpose; the parameters are compared below
        missing, unexpected = unwrapped(chunk).load_state_dict(state[key], strict=False)
        lost = [name for name in missing if not name.endswith("_extra_state")]
        if lost or unexpected:
            raise UserError(
                f"{checkpoint}: does not hold this model: missing {lost}, unexpected {unexpected}"
            )
    if optimizer is not None:
        optimizer_state.load(optimizer, state["optimizer"])
    return int(saved["step"])


def reasons(error: CheckpointException) -> str:
    """State why ranks failed, which only rank 0 knows; on other ranks the error says only that some did."""
    reasons = [f"rank {rank}: {_reason(reason[0])}" for rank, reason in sorted(error.failures.items())]
    return "; ".join(reasons) or "see rank 0"


def _reason(error: BaseException) -> str:
    # torch's own message has several lines and advises to load the file unsafely
    unread = isinstance(error, pickle.UnpicklingError)
    return "its bytes are not what was written" if unread else str(error).partition("\n")[0]
