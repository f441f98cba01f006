"""Holds what both sides of a comparison give, and runs Silva's side of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from silva.engine.parallel import groups
from silva.engine.parallel.forked import world

from safetensors.torch import load_file
from torch import Tensor

from silva.engine.data.dataset import DataSet
from silva.engine.data.trees.group import ABSENT
from silva.engine.objectives import OBJECTIVES
from silva.engine.recipe.schema import Recipe
from silva.engine.training.trainer import Trainer

Rows = Sequence[dict[str, Any]]


class Tokens(NamedTuple):
    """Holds the ids of one path, and which of them are scored."""

    ids: tuple[int, ...]
    scored: tuple[bool, ...]


@dataclass(frozen=True)
class Settings:
    """Holds the settings that both sides of a comparison train with; a step takes all rows.

    Attributes:
        reference: folder of the reference policy; None: the checkpoint that training starts from.
    """

    steps: int = 3
    learning_rate: float = 5e-4
    weight_decay: float = 0.1
    epsilon: float = 1e-6
    beta: float = 0.1
    reference: Path | None = None


@dataclass(frozen=True)
class Run:
    """Holds what a run read and computed.

    Attributes:
        tokens: of each row, chosen and rejected in turns.
        losses: of each step.
        weights: after the last step, by transformers' names.
        kl: KTO's estimate in the first step; None for other objectives.
        after: Silva's validation metrics of the trained model over the same rows.
    """

    tokens: list[list[Tokens]]
    losses: list[float]
    weights: dict[str, Tensor]
    kl: float | None = None
    after: dict[str, float] = field(default_factory=dict)


def run(
    objective: str,
    rows: Rows,
    folder: Path,
    settings: Settings,
    work: Path,
    *,
    form: str,
    sections: dict[str, dict[str, Any]] | None = None,
) -> Run:
    """Train with Silva in a process of its own, from a recipe over a file of the rows.

    Args:
        objective: of the recipe.
        rows: written to a JSON lines file.
        folder: of the checkpoint.
        settings: of the run.
        work: where files are written; the exported model lies in `run/export` of it.
        form: the rows' format.
        sections: keys of the recipe beside those of the settings.

    Returns:
        What the run read and computed.
    """
    work.mkdir(parents=True, exist_ok=True)
    file = work / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = {"path": str(file), "format": form}
    keys: dict[str, Any] = {"name": objective}
    if "beta" in OBJECTIVES[objective].keys:
        keys["beta"] = settings.beta
    raw: dict[str, Any] = {
        "output": str(work / "run"),
        "objective": keys,
        "model": {"path": str(folder), "dtype": "float32"},
        "data": {"train": [source], "validation": [source], "row_length": 2048, "shuffle": False},
        "training": {
            "global_batch": len(rows),
            "epochs": settings.steps,
            "learning_rate": settings.learning_rate,
            "schedule": "constant",
            "warmup": 0.0,
            "weight_decay": settings.weight_decay,
            "epsilon": settings.epsilon,
        },
        "export": {"reward_format": "sequence_classification"},
    }
    if settings.reference is not None:
        raw["reference"] = {"path": str(settings.reference)}
    for section, more in (sections or {}).items():
        raw[section] = raw.get(section, {}) | more
    [tokens] = world(1, _train, raw)
    lines = (work / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    history = [json.loads(line) for line in lines]
    steps = [entry for entry in history if entry["kind"] == "train"]
    return Run(
        tokens,
        [step["loss"] for step in steps],
        load_file(work / "run" / "export" / "model.safetensors"),
        steps[0].get("kl"),
        history[-1],
    )


def _train(raw: dict[str, Any]) -> list[list[Tokens]]:
    recipe = Recipe.model_validate(raw)
    with groups.joined(recipe.parallel, seed=recipe.seed):
        trainer = Trainer(recipe)
        tokens = list(_tokens(trainer.inputs.data))
        trainer.run()
    return tokens


def _tokens(data: DataSet) -> Iterator[list[Tokens]]:
    """Yield the paths of each sequence, those of comparisons in their order."""
    for k in range(len(data)):
        group = data.group(k)
        compared = [side for pair in group.comparisons.tolist() for side in pair if side != ABSENT]
        for sequence in compared or range(len(group)):
            paths = [group.path(place) for place in group.paths_of(sequence)]
            yield [Tokens(tuple(p.tokens.tolist()), tuple(p.scored.tolist())) for p in paths]
