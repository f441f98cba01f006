"""Writes a trained model, or a run's checkpoint, as a Hugging Face checkpoint: weights, config, tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from silva.engine.parallel import groups

import torch

from silva.engine.checkpoint import state
from silva.engine.data.text import reader_tokens
from silva.engine.data.text.chat import ChatTokenizer
from silva.engine.model import gpt, hf, hf_export
from silva.engine.objectives import OBJECTIVES
from silva.engine.progress import say
from silva.engine.recipe.schema import Recipe
from silva.engine.training import model_card, resume, verify
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
        folder = hf.fetch(recipe.model.path)
        tokenizer = load_tokenizer(recipe, folder)
        checkpoint = resume.to_export(recipe, folder, tokenizer)
        head = OBJECTIVES[recipe.objective.name].head
        # the checkpoint fills every parameter, so the weights that the run started from are not read
        chunks = gpt.build(
            hf.read_shape(folder), recipe.parallel, head=head, dtype=getattr(torch, recipe.model.dtype)
        )
        steps = state.load(checkpoint, chunks, None)
        return export_model(chunks, recipe, folder, tokenizer, steps)


def export_model(
    chunks: Sequence[Any], recipe: Recipe, source: Path, tokenizer: ChatTokenizer, steps: int
) -> Path:
    """Write the model as one or two Hugging Face checkpoints, tokenizer and model card included.

    The call is collective. The first folder is compared with the model in memory, as `export.verify` says.

    Args:
        chunks: wrapped or not, with their parameters in place (`optimizer.settle`).
        recipe: of the run.
        source: folder of the checkpoint that training started from.
        tokenizer: is saved beside the weights.
        steps: that were trained.

    Returns:
        The first folder written.

    Raises:
        UserError: the exported model is not the trained one.
    """
    objective = OBJECTIVES[recipe.objective.name]
    shape = hf.read_shape(source)

    def finish(folder: Path) -> None:
        tokenizer.save(folder)
        if objective.head == "reward":
            padding = tokenizer.padding_within(shape.vocab)
            hf_export.set_padding(folder, padding[0] if padding else None)
            if padding:
                reader_tokens.write_padding(folder, *padding)
        elif tokenizer.end is not None:
            hf_export.set_end(folder, tokenizer.end)

    folders = hf_export.export(
        [gpt.unwrapped(chunk) for chunk in chunks],
        shape,
        source=source,
        folder=recipe.export_path,
        dtype=getattr(torch, recipe.export_dtype),
        head=objective.head,
        reward_format=recipe.export.reward_format,
        max_shard_size=recipe.export.max_shard_size,
        finish=finish,
    )
    verified = verify.compare(chunks, recipe, tokenizer, folders[0])
    if groups.rank() == 0:
        for folder in folders:
            # transformers has no class for the second one
            found = verified.lines if folder == folders[0] else [f"The same weights as `{folders[0].name}`."]
            model_card.write(folder, recipe, tokenizer, steps, [*found, *filter(None, [verified.problem])])
    verify.refuse(verified)
    say(f"exported   {folders[0]}")
    for line in verified.lines:
        say(f"           {line}")
    return folders[0]
