"""Writes the model card of an exported model: what it is, how it was trained, and what its readers get."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path

from silva.engine.data.text.chat import ChatTokenizer
from silva.engine.model import hf
from silva.engine.objectives import OBJECTIVES
from silva.engine.recipe.schema import Recipe
from silva.engine.training.inputs import unit_of


def write(
    folder: Path, recipe: Recipe, tokenizer: ChatTokenizer, steps: int, verified: Sequence[str]
) -> None:
    """Write `README.md` into an exported folder, in the form that the Hugging Face hub reads.

    Args:
        folder: of the export.
        recipe: of the run.
        tokenizer: of the run.
        steps: that were trained.
        verified: what was found when the export was compared with the trained model.
    """
    objective = OBJECTIVES[recipe.objective.name]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    keys = ", ".join(f"{key} {getattr(recipe.objective, key)}" for key in objective.keys)
    base = recipe.model.path if hf.HUB_NAME.fullmatch(recipe.model.path) else None
    rows = [
        ("trained from", f"`{recipe.model.path}`"),
        ("objective", f"`{objective.name}`" + (f" ({keys})" if keys else "")),
        ("data", ", ".join(f"`{source.path}` ({source.format})" for source in recipe.data.train)),
        ("steps", f"{steps:,}, each of {recipe.training.global_batch:,} {unit_of(objective)}s"),
        ("learning rate", f"{recipe.training.learning_rate:g} ({recipe.training.schedule})"),
        ("number type", f"{recipe.export_dtype}, trained in {recipe.model.dtype}"),
        ("chat template", _template(recipe)),
    ]
    if tokenizer.end is not None:
        rows.append(("an answer ends with", f"`{tokenizer.token(tokenizer.end)}` (id {tokenizer.end})"))
    if objective.head == "reward":
        rows += [
            ("a reward is read", "at the last token of the whole conversation"),
            ("padding", _padding(config)),
        ]
    head = ["---", "library_name: transformers", *([f"base_model: {base}"] if base else [])]
    head += ["tags:", "- silva", f"- {objective.name}", "---", ""]
    table = ["| | |", "|---|---|", *(f"| {name} | {what} |" for name, what in rows), ""]
    version = importlib.metadata.version("silva")
    lines = [
        *head,
        f"# {Path(recipe.output).name}",
        "",
        f"Trained with Silva {version}. `config.json` names the architecture: {config['architectures'][0]}.",
        "",
        *table,
        "## What readers get",
        "",
        *(f"- {line}" for line in verified),
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _template(recipe: Recipe) -> str:
    chosen = recipe.tokenizer.chat_template
    if chosen is None:
        return "the tokenizer's own"
    if chosen == "none":
        return "none: text as it is"
    return f"`{chosen}`" if len(chosen) < 80 and "{" not in chosen else "the recipe's own"


def _padding(config: dict[str, object]) -> str:
    number = config.get("pad_token_id")
    if number is None:
        return "none: no token is free for it, so transformers scores one conversation at a time"
    return f"id {number}, a token that no conversation ends with"
