"""One process's runs, which every layout is compared with: each is made once, when a test first asks for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
from worlds import world

from silva.engine.recipe.schema import Recipe
from silva.engine.training import trainer

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "llama3": {"rope_parameters": LLAMA3},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"family": "Qwen2"},
    "qwen3": {"family": "Qwen3", "head_dim": 12, "tie_word_embeddings": True},
}


@dataclass
class Run:
    """What is left of a run."""

    output: Path
    divergence: list[float]  # KTO's KL estimate of each step


class Runs:
    """Recipes over the same models and trees, and the runs of one process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # an odd vocabulary: every tensor-parallel layout pads it
        self.models = {
            kind: tiny.checkpoint(folder / kind, num_hidden_layers=4, vocab_size=1025, **changes)
            for kind, changes in KINDS.items()
        }
        self.data = {
            form: tiny.write(folder / f"{form}.jsonl", tiny.rows(form, 9)) for form in ("sft", "pair")
        }
        self._single: dict[tuple[str, str, str], Run] = {}

    def recipe(self, objective: str, output: Path, *, kind: str = "untied", **sections: Any) -> Recipe:
        rows = self.data["sft" if objective == "sft" else "pair"]
        # tokenized once: what is read does not depend on the layout
        sections["data"] = {"cache": str(self.folder / "cache")} | sections.get("data", {})
        return tiny.recipe(objective, self.models[kind], rows, output, **sections)

    def single(self, objective: str, *, kind: str = "untied", dtype: str = "float32") -> Run:
        key = objective, kind, dtype
        if key not in self._single:
            recipe = self.recipe(objective, self.folder / "-".join(key), kind=kind, model={"dtype": dtype})
            self._single[key] = run(1, recipe)
        return self._single[key]


def run(size: int, recipe: Recipe) -> Run:
    """A whole run on `size` processes, which must agree in what they estimate."""
    first, *others = world(size, _train, recipe)
    assert all(other == first for other in others)
    return Run(Path(recipe.output), first)


def _train(recipe: Recipe) -> list[float]:
    found: list[float] = []

    @contextlib.contextmanager
    def recorded(running: trainer.Trainer, number: int, batch: Any) -> Iterator[None]:
        yield
        if "kl" in running.last:
            found.append(running.last["kl"])

    trainer.train(recipe, around=recorded)
    return found


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def run_on() -> Callable[[int, Recipe], Run]:
    return run
