"""A damaged checkpoint ends the run in one line that names the file, on every rank, and nothing in it is run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from worlds import world

from silva.engine.errors import UserError
from silva.engine.recipe.schema import Recipe
from silva.engine.training import trainer


def run(recipe: Recipe) -> str:
    try:
        trainer.train(recipe)
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory) -> tuple[Recipe, Path]:
    output = tmp_path_factory.mktemp("whole") / "run"
    recipe = runs.recipe("bt", output, training={"max_steps": 2, "save_every": 1, "keep": 9})
    assert world(2, run, recipe) == ["", ""]
    return recipe, output


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


@pytest.mark.parametrize("damage", [Path.unlink, cut, overwrite])
def test_damage_to_any_file_is_named(damage: Callable[[Path], None], whole, tmp_path):
    recipe, output = whole
    names = sorted(path.name for path in (output / "checkpoints" / "step-00000002").iterdir())
    assert len(names) >= 5  # a file of each of two ranks, two indices, run.json
    for name in names:
        if name == "run.json" and damage is Path.unlink:
            continue  # then it is no checkpoint
        folder = tmp_path / name
        shutil.copytree(output, folder)
        damage(folder / "checkpoints" / "step-00000002" / name)
        [said, other] = world(2, run, recipe.model_copy(update={"output": str(folder)}))
        # what is wrong inside a file that is as long as it was is known to the rank that reads it
        for answer in (said, other):
            assert f"{folder}/checkpoints/step-00000002" in answer
            assert "remove the checkpoint to go on from the one before it" in answer
            assert "\n" not in answer
        assert name in said or (damage is overwrite and "cannot be read" in said)


def test_the_one_before_is_gone_on_from(whole, tmp_path):
    recipe, output = whole
    shutil.copytree(output, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000002")
    assert world(2, run, recipe.model_copy(update={"output": str(tmp_path / "run")})) == ["", ""]
    again, before = tiny.history(tmp_path / "run"), tiny.history(output)
    assert [line["loss"] for line in again] == [line["loss"] for line in before]


def test_a_foreign_index_is_not_unpickled(whole, tmp_path):
    recipe, output = whole
    shutil.copytree(output, tmp_path / "run")
    index = tmp_path / "run" / "checkpoints" / "step-00000002" / ".metadata"
    index.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "pwned").encode() + b"'\ntR.")
    [said, _] = world(2, run, recipe.model_copy(update={"output": str(tmp_path / "run")}))
    assert "posix.system is not allowed" in said or "os.system is not allowed" in said
    assert not (tmp_path / "pwned").exists()
