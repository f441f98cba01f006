"""Runs that are started again: with the same recipe, with another one, and with one that was changed on purpose."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from worlds import world

from silva.engine.checkpoint import index
from silva.engine.recipe.loading import load
from silva.engine.recipe.schema import Recipe
from silva.engine.training import publish, resume, trainer

CONSTANT = {"schedule": "constant", "save_every": 1, "keep": 9}


@pytest.fixture
def rows(tmp_path) -> Path:
    return tiny.write(tmp_path / "rows.jsonl", tiny.rows("pair", 6))


def train(recipe: Recipe) -> None:
    world(1, trainer.train, recipe)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "export" / "model.safetensors")


def stopped(output: Path, step: int) -> None:
    """Leaves of a run what a kill after `step` steps would have left."""
    for checkpoint in (output / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(output / "export")


def refused(recipe: Recipe) -> str:
    """The refusal of a run, which has left everything in its folder as it was."""
    output = Path(recipe.output)
    before = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    with pytest.raises(RuntimeError) as caught:
        train(recipe)
    after = {file: file.read_bytes() for file in output.rglob("*") if file.is_file()}
    assert {f: c for f, c in after.items() if "data" not in f.parts} == {
        f: c for f, c in before.items() if "data" not in f.parts
    }
    return str(caught.value)


@pytest.mark.parametrize(
    ("section", "key", "value", "told"),
    [
        ("training", "learning_rate", 2e-3, "training.learning_rate was 0.001, is 0.002"),
        ("training", "weight_decay", 0.1, "training.weight_decay was 0.0, is 0.1"),
        ("training", "clip", 0.5, "training.clip was 1.0, is 0.5"),
        ("training", "schedule", "linear", "training.schedule was 'cosine', is 'linear'"),
        ("training", "warmup", 0.5, "training.warmup was 0.0, is 0.5"),
        ("training", "max_steps", 2, "training.max_steps was 3, is 2"),
        ("data", "shuffle", False, "data.shuffle was true, is false"),
        ("objective", "beta", 0.2, "objective.beta was 0.1, is 0.2"),
        ("reference", "path", "another", "reference.path was nothing, is '{another}'"),
        ("tokenizer", "chat_template", "eurus", "tokenizer.chat_template was nothing, is 'eurus'"),
    ],
)
def test_a_finished_run_refuses_another_recipe(section, key, value, told, trained, tmp_path):
    output, model, rows = trained
    if value == "another":
        value = str(tiny.checkpoint(tmp_path / "another", seed=5))
    found = refused(tiny.recipe("dpo", model, rows, output, **{section: {key: value}}))
    assert f"{output}: holds a run that is finished, with 3 steps, and this recipe differs" in found
    assert told.format(another=value) in found
    assert "Nothing was trained" in found
    # not even on purpose, where nothing is left to train
    assert ("resume.change" in found) == (key == "max_steps")
    if section == "training" and key != "max_steps":
        change = {"change": [f"{section}.{key}"]}
        again = tiny.recipe("dpo", model, rows, output, resume=change, **{section: {key: value}})
        assert "this recipe differs" in refused(again)


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory) -> tuple[Path, Path, Path]:
    """A finished run of DPO: its folder, its model and its rows."""
    folder = tmp_path_factory.mktemp("trained")
    rows = tiny.write(folder / "rows.jsonl", tiny.rows("pair", 6))
    train(tiny.recipe("dpo", model, rows, folder / "run"))
    return folder / "run", model, rows


def test_other_rows_under_the_same_name_are_noticed(trained):
    output, model, rows = trained
    kept = rows.read_text()
    rows.write_text(kept.replace("Step 1", "Step one"))
    try:
        found = refused(tiny.recipe("dpo", model, rows, output))
    finally:
        rows.write_text(kept)
    assert "data.train is the same, but what it leads to has changed" in found


def test_what_is_free_may_change(model, rows, tmp_path):
    """Moved inputs, another layout, other files: the finished run is exported again, and nothing is trained."""
    train(tiny.recipe("sft", model, _sft(tmp_path), tmp_path / "run"))
    history = (tmp_path / "run" / "metrics.jsonl").read_text()
    moved = shutil.copytree(model, tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    again = tiny.recipe(
        "sft",
        moved,
        (tmp_path / "sft.jsonl").rename(tmp_path / "elsewhere" / "sft.jsonl"),
        tmp_path / "run",
        training={"save_every": 2, "keep": 5},
        export={"dtype": "bfloat16"},
        data={"workers": 1},
        parallel={"recompute": "full"},
    )
    train(again)
    assert _without_time(tmp_path / "run") == [_timeless(json.loads(line)) for line in history.splitlines()]
    assert weights(tmp_path / "run")["lm_head.weight"].dtype == torch.bfloat16
    assert load(str(tmp_path / "run" / "recipe.yaml")) == again
    earlier = load(str(tmp_path / "run" / "recipe-until-step-00000003.yaml"))
    assert earlier.export.dtype is None


def test_a_longer_run_is_the_run_that_was_long_from_the_start(model, rows, tmp_path):
    def recipe(name: str, steps: int, **more: Any) -> Recipe:
        settings = {"training": CONSTANT | {"max_steps": steps, "epochs": 9}, **more}
        return tiny.recipe("sft", model, _sft(tmp_path), tmp_path / name, **settings)

    train(recipe("long", 5))
    train(recipe("short", 3))
    assert "resume.change=[training.max_steps]" in refused(recipe("short", 5))
    longer = recipe("short", 5, resume={"change": ["training.max_steps"]})
    train(longer)
    assert _without_time(tmp_path / "short") == _without_time(tmp_path / "long")
    ours, expected = weights(tmp_path / "short"), weights(tmp_path / "long")
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert load(str(tmp_path / "short" / "recipe.yaml")) == longer
    assert load(str(tmp_path / "short" / "recipe-until-step-00000003.yaml")) == recipe("short", 3)
    # the recipe of the longer run is now the run's own, with and without the permission
    train(recipe("short", 5))
    found = refused(recipe("short", 2, resume={"change": ["training.max_steps"]}))
    assert "cannot become one with 2 steps" in found


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"schedule": "cosine"}, "belong to training.schedule cosine over 3 steps"),
        ({"schedule": "constant", "warmup": 1.0}, "the warm-up over 5 steps takes 5 steps"),
    ],
)
def test_a_schedule_that_depends_on_the_end_cannot_be_extended(settings, told, model, rows, tmp_path):
    def recipe(steps: int, **more: Any) -> Recipe:
        training = settings | {"max_steps": steps, "epochs": 9}
        return tiny.recipe("sft", model, _sft(tmp_path), tmp_path / "run", training=training, **more)

    train(recipe(3))
    assert told in refused(recipe(5, resume={"change": ["training.max_steps"]}))


def test_a_rate_that_is_changed_on_purpose(model, rows, tmp_path):
    """The steps before the change are kept, the later ones are taken with the new rate."""

    def recipe(rate: float, **more: Any) -> Recipe:
        training = CONSTANT | {"learning_rate": rate}
        return tiny.recipe("sft", model, _sft(tmp_path), tmp_path / "run", training=training, **more)

    train(recipe(1e-3))
    whole, first = weights(tmp_path / "run"), tiny.history(tmp_path / "run")
    stopped(tmp_path / "run", 2)
    assert "is at step 2 of 3" in refused(recipe(1e-2))
    changed = recipe(1e-2, resume={"change": ["training.learning_rate"]})
    train(changed)
    again = tiny.history(tmp_path / "run")
    assert [line["loss"] for line in again] == [line["loss"] for line in first]
    moved = {
        name: (tensor - whole[name]).abs().max().item() for name, tensor in weights(tmp_path / "run").items()
    }
    assert 1e-3 < max(moved.values()) < 1e-2
    assert load(str(tmp_path / "run" / "recipe.yaml")) == changed
    assert load(str(tmp_path / "run" / "recipe-until-step-00000002.yaml")) == recipe(1e-3)


def test_an_export_of_another_model_is_refused(trained, tmp_path):
    output, model, rows = trained
    other = tiny.checkpoint(tmp_path / "other", seed=7)
    with pytest.raises(RuntimeError, match=r"was written with another recipe: model\.path was "):
        world(1, publish.export_checkpoint, tiny.recipe("dpo", other, rows, output))
    shutil.move(output / "checkpoints", tmp_path / "kept")
    try:
        with pytest.raises(RuntimeError, match="no checkpoint to export"):
            world(1, publish.export_checkpoint, tiny.recipe("dpo", model, rows, output))
    finally:
        shutil.move(tmp_path / "kept", output / "checkpoints")


@pytest.mark.parametrize("damage", [lambda run: run.pop("recipe"), lambda run: run["recipe"].update(new=1)])
def test_a_checkpoint_of_another_version_is_refused(damage, trained, tmp_path):
    output, model, rows = trained
    copy = shutil.copytree(output, tmp_path / "run")
    file = next((copy / "checkpoints").iterdir()) / "run.json"
    run = json.loads(file.read_text())
    damage(run)
    del run["digest"]
    run["digest"] = index._digest_of(run)
    file.write_text(json.dumps(run))
    assert "was written by another version of Silva" in refused(tiny.recipe("dpo", model, rows, copy))


def test_a_fine_tuned_model_has_another_sample(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "same")
    assert resume.weights_sample(folder) == resume.weights_sample(model)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert resume.weights_sample(folder) != resume.weights_sample(model)


def _sft(folder: Path) -> Path:
    return tiny.write(folder / "sft.jsonl", tiny.rows("sft", 6))


def _timeless(line: dict[str, Any]) -> dict[str, Any]:
    timing = {"seconds", "tokens_per_second", "unrolled_tokens_per_second", "data_wait"}
    return {key: value for key, value in line.items() if key not in timing}


def _without_time(output: Path) -> list[dict[str, Any]]:
    return [_timeless(line) for line in tiny.history(output)]
