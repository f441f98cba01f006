"""The example of docs/contributing.md, taken from the page: added, trained with, and compared with TRL's own code."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import trl_losses
import yaml
from worlds import world

from silva.engine import objectives
from silva.engine.errors import UserError
from silva.engine.recipe.loading import load
from silva.engine.training import trainer

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "contributing.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n# objective: ([\w./]+)\n(.*?)```", PAGE, flags=re.S)


def add_the_example() -> None:
    """As the page says: the code blocks go into the module that they name."""
    code = [text for language, place, text in BLOCKS if place == "engine/objectives.py"]
    assert len(code) == 2
    for text in code:
        exec(compile(text, "docs/contributing.md", "exec"), vars(objectives))


def recipe_of(folder: Path) -> Any:
    [text] = [text for language, place, text in BLOCKS if place == "recipe"]
    raw = {
        "output": str(folder / "run"),
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "data": {
            "train": [{"path": str(folder / "pair.jsonl"), "format": "ultrainteract_pair"}],
            "row_length": 1024,
        },
        "training": {"global_batch": 4, "max_steps": 2, "learning_rate": 1e-3},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw | yaml.safe_load(text)))
    return folder / "recipe.yaml"


def train_with_it(recipe: Path) -> dict[str, float]:
    with pytest.raises(UserError, match=r"objective\.name: found 'robust'; allowed: 'sft', .* or 'bt_dr'"):
        load(str(recipe))
    add_the_example()
    return trainer.train(load(str(recipe))).last


def test_the_example_trains_on_two_layouts(tmp_path):
    tiny.checkpoint(tmp_path / "model")
    tiny.write(tmp_path / "pair.jsonl", tiny.rows("pair", 6))
    recipe = recipe_of(tmp_path)
    [alone] = world(1, train_with_it, recipe)
    assert alone["reward_margin"] != 0
    (tmp_path / "run").rename(tmp_path / "alone")
    first, second = world(2, train_with_it, recipe)
    assert first["loss"] == second["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def compare_with_trl() -> tuple[float, float]:
    add_the_example()
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(22, generator=generator, dtype=torch.float64) * 5 - 20 for _ in range(2))
    settings = SimpleNamespace(beta=0.2, label_smoothing=0.1)
    theirs, _ = trl_losses.dpo_loss(policy, reference, torch.full((22,), 7), "robust", settings)
    pairs = torch.stack([torch.arange(11), torch.arange(11, 22)], 1)
    ours = objectives.OBJECTIVES["robust"].preference(
        policy, reference, torch.full((22,), 7), pairs, torch.zeros(11, dtype=torch.bool), None, settings
    )
    return float(ours.loss.mean()), float(theirs)


def test_the_example_is_trls_loss():
    [(ours, theirs)] = world(1, compare_with_trl)
    assert ours == pytest.approx(theirs, rel=1e-12)
