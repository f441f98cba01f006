"""Numbers that are not finite: nothing of them is saved or exported, and a step that has them can be left out."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from worlds import world

from silva.engine.recipe.schema import Recipe
from silva.engine.training import trainer
from silva.engine.training.metrics import Journal

LAYOUTS = [(1, {}), (2, {}), (2, {"tensor": 2}), (2, {"pipeline": 2})]


def train(recipe: Recipe, bad: tuple[int, ...] = (), rank: int = 0) -> None:
    """Trains; in some steps, one rank's gradients are not finite."""

    @contextlib.contextmanager
    def spoiled(running: trainer.Trainer, number: int, batch: Any) -> Iterator[None]:
        hooks = []
        if number in bad and trainer.groups.rank() == rank:
            weight = next(running.step.chunks[0].parameters())
            hooks = [weight.register_hook(lambda gradient: gradient * float("nan"))]
        yield
        for hook in hooks:
            hook.remove()

    trainer.train(recipe, around=spoiled)


def recipe(model: Path, rows: Path, output: Path, **sections: Any) -> Recipe:
    training = {"global_batch": 4, "max_steps": 4, "save_every": 1, "keep": 9}
    sections["training"] = training | sections.get("training", {})
    return tiny.recipe("sft", model, rows, output, **sections)


@pytest.mark.parametrize(("size", "parallel"), LAYOUTS, ids=str)
def test_an_update_that_breaks_weights_is_not_saved(size, parallel, model, rows, tmp_path):
    """One step with a rate beyond float32: the gradients are finite, the weights after it are not."""
    made = recipe(
        model, rows, tmp_path / "run", training={"learning_rate": 3e38, "max_steps": 1}, parallel=parallel
    )
    with pytest.raises(
        RuntimeError, match=r"step 0: its update left weights that are not finite \(.*weight on rank"
    ):
        world(size, train, made)
    assert not (tmp_path / "run" / "export").exists()
    assert not list((tmp_path / "run" / "checkpoints").glob("step-????????"))


def test_the_step_after_notices_it_too(model, rows, tmp_path):
    """Where nothing is saved in between."""
    settings = {"learning_rate": 3e38, "save_every": 0}
    with pytest.raises(RuntimeError, match="step 0: its update left weights that are not finite"):
        world(1, train, recipe(model, rows, tmp_path / "run", training=settings))


@pytest.mark.parametrize(("size", "parallel"), LAYOUTS, ids=str)
def test_a_bad_step_is_left_out_on_all_ranks_alike(size, parallel, model, rows, tmp_path, capfd):
    settings = {"skip_nonfinite": 1, "save_every": 0}
    world(
        size,
        train,
        recipe(model, rows, tmp_path / "run", training=settings, parallel=parallel),
        (1,),
        size - 1,
    )
    lines = tiny.history(tmp_path / "run")
    assert [line.get("skipped") for line in lines] == [None, 1.0, None, None]
    assert [line.get("not_finite") for line in lines] == [None, ["gradient_norm"], None, None]
    assert "left out   step 1: the loss is " in capfd.readouterr().out
    exported = load_file(next((tmp_path / "run" / "export").glob("*.safetensors")))
    assert all(tensor.isfinite().all() for tensor in exported.values())


def test_a_step_that_is_left_out_changes_no_weight(model, rows, tmp_path):
    settings = {"skip_nonfinite": 9, "max_steps": 2, "save_every": 0}
    world(1, train, recipe(model, rows, tmp_path / "run", training=settings), (0, 1))
    start, end = load_file(model / "model.safetensors"), load_file(tmp_path / "run/export/model.safetensors")
    assert all(torch.equal(start[name], end[name]) for name in start)


def test_too_many_in_a_row_end_the_run(model, rows, tmp_path):
    settings = {"skip_nonfinite": 1, "save_every": 0}
    with pytest.raises(RuntimeError, match=r"step 2: .*1 steps before it were left out"):
        world(1, train, recipe(model, rows, tmp_path / "a", training=settings), (1, 2))
    world(1, train, recipe(model, rows, tmp_path / "b", training=settings), (1, 3))


def test_the_row_is_named(model, rows, tmp_path):
    """A model that comes to give NaN for the token of every conversation's beginning."""
    told = r"step 0: the loss is nan, .*not finite: row 0 of rank 0 \(sequences \d+ to \d+ of the data\), row 0 of rank"
    with pytest.raises(RuntimeError, match=told):
        world(2, train_with_a_broken_embedding, recipe(model, rows, tmp_path / "run"))


def train_with_a_broken_embedding(made: Recipe) -> None:
    @contextlib.contextmanager
    def broken(running: trainer.Trainer, number: int, batch: Any) -> Iterator[None]:
        next(running.step.chunks[0].parameters()).data[0] = float("nan")
        yield

    trainer.train(made, around=broken)


def test_a_checkpoint_with_numbers_that_are_not_finite_is_refused(rows, tmp_path):
    broken = tiny.checkpoint(tmp_path / "model")
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("inf")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    told = (
        r"model\.safetensors: tensor model\.layers\.1\.mlp\.up_proj\.weight holds numbers that are not finite"
    )
    with pytest.raises(RuntimeError, match=told):
        world(1, train, recipe(broken, rows, tmp_path / "run"))


def test_the_journal_is_json_and_survives_a_torn_line(tmp_path):
    with Journal(tmp_path, writes=True, start_step=0) as journal:
        journal.write(0, "train", {"loss": float("nan"), "rate": 1.0, "norm": float("inf")})
        journal.write(1, "train", {"loss": 2.0})
        journal.write(2, "train", {"loss": 3.0})
    file = tmp_path / "metrics.jsonl"
    first = json.loads(file.read_text().splitlines()[0], parse_constant=lambda name: pytest.fail(name))
    assert first == {"step": 0, "kind": "train", "rate": 1.0, "not_finite": ["loss", "norm"]}
    file.write_bytes(file.read_bytes()[:-9] + b"\xff")
    with Journal(tmp_path, writes=True, start_step=2) as journal:
        journal.write(2, "train", {"loss": 4.0})
    assert [line["step"] for line in tiny.history(tmp_path)] == [0, 1, 2]
    assert tiny.history(tmp_path)[-1]["loss"] == 4.0
