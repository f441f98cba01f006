"""Writes a trained model, or a run's checkpoint, as a Hugging Face checkpoint: weights, config, tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from silva.engine.parallel import groups

import torch

from silva.engine.checkpoint import index, state
from silva.engine.data.text.chat import ChatTokenizer
from silva.engine.errors import UserError
from silva.engine.model import gpt, hf, hf_export
from silva.engine.objectives import OBJECTIVES
from silva.engine.recipe.schema import Recipe
from silva.engine.training.inputs import load_tokenizer


def export_checkpoint(recipe: Recipe) -> Path:
    """Export the newest checkpoint of a recipe's run, on the recipe's layout.

    The call is collective.

    Args:
        recipe: of the run.

    Returns:
        The folder written.

    Raises:
        UserError: the run has no checkpoint, or recipe and checkpoint do not belong together.
    """
    with groups.joined(recipe.parallel, seed=recipe.seed):
        saved = index.checkpoints(Path(recipe.output) / "checkpoints")
        if not saved:
            raise UserError(
                f"{recipe.output}: no checkpoint to export; check that the run has saved one and that `output` is "
                "its folder"
            )
        folder = hf.fetch(recipe.model.path)
        head = OBJECTIVES[recipe.objective.name].head
        # the checkpoint fills every parameter, so the weights that the run started from are not read
        chunks = gpt.build(
            hf.read_shape(folder), recipe.parallel, head=head, dtype=getattr(torch, recipe.model.dtype)
        )
        state.load(saved[-1], chunks, None, recipe.identity)
        return export_model(chunks, recipe, folder, load_tokenizer(recipe, folder))


def export_model(chunks: Sequence[Any], recipe: Recipe, source: Path, tokenizer: ChatTokenizer) -> Path:
    """Write the model as one or two Hugging Face checkpoints, tokenizer included.

    The call is collective.

    Args:
        chunks: wrapped or not, with their parameters in place (`optimizer.settle`).
        recipe: of the run.
        source: folder of the checkpoint that training started from.
        tokenizer: is saved beside the weights.

    Returns:
        The first folder written.
    """
    head = OBJECTIVES[recipe.objective.name].head

    def finish(folder: Path) -> None:
        tokenizer.save(folder)
        if head == "reward":
            hf_export.set_padding(folder, tokenizer.pad_id)

    folders = hf_export.export(
        [gpt.unwrapped(chunk) for chunk in chunks],
        hf.read_shape(source),
        source=source,
        folder=recipe.export_path,
        dtype=getattr(torch, recipe.export_dtype),
        head=head,
        reward_format=recipe.export.reward_format,
        max_shard_size=recipe.export.max_shard_size,
        finish=finish,
    )
    return folders[0]
