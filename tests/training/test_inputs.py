"""What a run reads: the lines about what is allowed and may not be meant, and which references fit a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from silva.engine.parallel import groups

import pytest
import tiny
from worlds import world

from silva.engine.recipe.schema import Recipe
from silva.engine.training import inputs, trainer


def read(recipe: Recipe) -> None:
    with groups.joined(recipe.parallel):
        inputs.read(recipe)


def said(capfd: pytest.CaptureFixture[str], recipe: Recipe) -> str:
    world(1, read, recipe)
    return capfd.readouterr().out


def recipe(objective: str, model: Path, folder: Path, rows: list[dict[str, Any]], **sections: Any) -> Recipe:
    source = {"path": str(tiny.write(folder / "rows.jsonl", rows)), "format": "unpaired"}
    sections["data"] = {"train": [source]} | sections.get("data", {})
    return tiny.recipe(objective, model, folder, folder / "run", **sections)


def judged(*labels: bool) -> list[dict[str, Any]]:
    return [{"prompt": f"ask {k}", "completion": "say", "label": label} for k, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("labels", "told"),
    [((True,) * 3, "all 3 judged completions are desirable"), ((False,) * 3, "undesirable")],
)
def test_feedback_of_one_kind_is_said(labels, told, model, tmp_path, capfd):
    assert told in said(capfd, recipe("kto", model, tmp_path, judged(*labels)))


def test_nothing_is_said_of_ordinary_data(model, tmp_path, capfd):
    settings = {"training": {"global_batch": 3}}
    found = said(capfd, recipe("kto", model, tmp_path, judged(True, False, True), **settings))
    assert "judged completions" not in found
    assert "takes all of them" not in found
    assert "was made for" not in found


def test_a_batch_larger_than_an_epoch_is_said(model, tmp_path, capfd):
    settings = {"training": {"global_batch": 8}}
    found = said(capfd, recipe("kto", model, tmp_path, judged(True, False, True), **settings))
    assert "training.global_batch is 8, and an epoch has 3 comparisons: every step takes all of them" in found


def test_text_longer_than_the_model_was_made_for_is_said(model, tmp_path, capfd):
    """A short conversation fits, a longer one does not."""
    short = tiny.checkpoint(tmp_path / "short", max_position_embeddings=20)
    assert "was made for" not in said(capfd, recipe("kto", short, tmp_path, judged(True, False)))
    longer = {"prompt": "ask", "completion": "say it all, one by one, again and again", "label": True}
    found = said(capfd, recipe("kto", short, tmp_path, [*judged(True, False), longer]))
    assert "was made for 20 (max_position_embeddings)" in found


def test_a_reference_for_longer_text_is_no_other_shape(model, tmp_path):
    longer = tiny.checkpoint(tmp_path / "longer", max_position_embeddings=8192)
    rows = tiny.write(tmp_path / "pairs.jsonl", tiny.rows("pair", 4))
    world(
        1, trainer.train, tiny.recipe("dpo", model, rows, tmp_path / "run", reference={"path": str(longer)})
    )
    other = tiny.checkpoint(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.25}))
    with pytest.raises(RuntimeError, match=r"another shape .*\(norm_eps is 0\.25 and not 1e-06\)"):
        world(
            1, trainer.train, tiny.recipe("dpo", model, rows, tmp_path / "b", reference={"path": str(other)})
        )
