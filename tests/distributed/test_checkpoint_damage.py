"""A damaged checkpoint is named and put aside, the run goes on from the one before, and nothing in it is run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from silva.engine.parallel import groups

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from worlds import world

from silva.engine.checkpoint import index, plain_files
from silva.engine.errors import UserError
from silva.engine.recipe.schema import Parallel, Recipe
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


def swap(path: Path) -> None:
    """Exchanges the file for the one of that name of the checkpoint before."""
    path.write_bytes((path.parent.parent / "step-00000001" / path.name).read_bytes())


def zero(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(content)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


NEWEST = "checkpoints/step-00000002"


def damaged(folder: Path) -> str | None:
    with groups.joined(Parallel()):
        try:
            return index.damage(folder)
        except index.Damaged as error:
            return str(error)


@pytest.mark.parametrize("damage", [Path.unlink, cut, overwrite, swap, zero, flip])
def test_damage_to_any_file_is_named(damage: Callable[[Path], None], whole, tmp_path):
    _, output = whole
    names = sorted(path.name for path in (output / NEWEST).iterdir())
    assert len(names) >= 5  # a file of each of two ranks, the index, the settings, run.json
    for name in names:
        if name == "run.json" and damage is Path.unlink:
            continue  # then it is no checkpoint
        shutil.copytree(output / "checkpoints", tmp_path / name / "checkpoints")
        folder = tmp_path / name / NEWEST
        before = (folder / name).read_bytes()
        damage(folder / name)
        if (folder / name).is_file() and (folder / name).read_bytes() == before:
            continue  # two checkpoints may have an equal file
        found = world(2, damaged, folder)
        assert [f"{folder / name}: " in str(each) for each in found] == [True, True]
    assert world(2, damaged, output / NEWEST) == [None, None]


@pytest.mark.parametrize("name", [".metadata", "common.json", "__0_0.distcp", "run.json"])
def test_the_run_goes_on_from_the_checkpoint_before_a_damaged_one(name, whole, tmp_path, capfd):
    recipe, output = whole
    shutil.copytree(output, tmp_path / "run")
    file = tmp_path / "run" / NEWEST / name
    flip(file)
    assert world(2, run, recipe.model_copy(update={"output": str(tmp_path / "run")})) == ["", ""]
    said = capfd.readouterr().out
    assert f"damaged    {file}: " in said
    assert "is now called step-00000002.damaged" in said
    assert f"at step 1 of 2 from {tmp_path}/run/checkpoints/step-00000001" in said
    again, before = tiny.history(tmp_path / "run"), tiny.history(output)
    assert [line["loss"] for line in again] == [line["loss"] for line in before]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_again_in_silence(whole, tmp_path):
    recipe, output = whole
    shutil.copytree(output, tmp_path / "run")
    for number in (1, 2):
        flip(tmp_path / "run" / "checkpoints" / f"step-0000000{number}" / "run.json")
    for said in world(2, run, recipe.model_copy(update={"output": str(tmp_path / "run")})):
        assert "every checkpoint is damaged" in said
        assert "step-00000001.damaged" in said


@pytest.mark.parametrize(
    "change",
    [
        {"step": -5},
        {"step": 1},
        {"files": {}},
        {"files": {"../../escape": [1, "0"]}},
        {"files": [1]},
        {"digest": "0"},
        {"step": 10**5000},
    ],
    ids=["step", "other", "no files", "outside", "list", "digest", "digits"],
)
def test_what_a_checkpoint_says_of_itself_is_checked(change, whole, tmp_path):
    _, output = whole
    folder = shutil.copytree(output / NEWEST, tmp_path / "step-00000002")
    said = json.loads((folder / "run.json").read_text()) | change
    if "step" in change and change["step"] == 1:
        # even if it is another checkpoint's own
        said = json.loads((output / "checkpoints" / "step-00000001" / "run.json").read_text())
    with int_digits(0):
        (folder / "run.json").write_text(json.dumps(said))
    with pytest.raises(index.Damaged, match=r"run\.json: "):
        index.described(folder)


@contextlib.contextmanager
def int_digits(most: int) -> Iterator[None]:
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(most)
    yield
    sys.set_int_max_str_digits(before)


def test_bytes_need_not_be_compared(whole, tmp_path):
    """A zeroed page of a weight is then not noticed, as the recipe says."""
    recipe, output = whole
    shutil.copytree(output, tmp_path / "run")
    said = world(
        2,
        run,
        recipe.model_copy(
            update={
                "output": str(tmp_path / "run"),
                "resume": recipe.resume.model_copy(update={"verify": False}),
            }
        ),
    )
    assert said == ["", ""]


# ---------------------------------------------------------------- code in files


class Runs:
    """Unpickling it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def signed(folder: Path) -> None:
    """Writes the digests of a checkpoint anew, as who changes its files can."""
    content = json.loads((folder / "run.json").read_text())
    del content["digest"], content["files"]
    (folder / "run.json").unlink()
    copy = folder.with_name("copy")
    folder.rename(copy)
    index.publish(copy, folder, content)


@pytest.mark.parametrize("name", [".metadata", "common.json", "__0_0.distcp", "metadata.json", "run.json"])
def test_no_file_of_a_checkpoint_runs_code(name, whole, tmp_path):
    """A pickle in place of any file, by someone who can also write the digests."""
    recipe, output = whole
    shutil.copytree(output, tmp_path / "run")
    folder = tmp_path / "run" / NEWEST
    trace = tmp_path / "pwned"
    (folder / name).write_bytes(pickle.dumps(Runs(trace)))
    if name != "run.json":
        signed(folder)
    world(2, run, recipe.model_copy(update={"output": str(tmp_path / "run")}))
    assert not trace.exists()
    # the attack is one
    pickle.loads(pickle.dumps(Runs(trace)))
    assert trace.is_dir()


def test_a_pickle_inside_torchs_own_file_runs_no_code(whole, tmp_path):
    recipe, output = whole
    shutil.copytree(output, tmp_path / "run")
    folder = tmp_path / "run" / NEWEST
    trace = tmp_path / "pwned"
    torch.save(Runs(trace), folder / "__0_0.distcp")
    places = json.loads((folder / ".metadata").read_text())
    size = (folder / "__0_0.distcp").stat().st_size
    for place in places["places"]:
        if place[2] == "__0_0.distcp":
            place[3:] = [0, size]
    (folder / ".metadata").write_text(json.dumps(places))
    signed(folder)
    for said in world(2, run, recipe.model_copy(update={"output": str(tmp_path / "run")})):
        assert "cannot be read" in said
    assert not trace.exists()


def test_an_index_of_objects_is_refused(whole, tmp_path):
    """torch unpickles what an index calls bytes; ours has no such entry."""
    with pytest.raises(TypeError, match="would be saved as a pickled object"):
        plain_files._dump(Metadata({"a": BytesStorageMetadata()}, storage_data={}), io.BytesIO())


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_fuzzed_index_is_read_or_refused(data, whole, tmp_path):
    _, output = whole
    content = (output / NEWEST / ".metadata").read_bytes()
    kind = data.draw(st.sampled_from(["bytes", "flip", "json", "pickle"]))
    if kind == "bytes":
        content = data.draw(st.binary(max_size=200))
    elif kind == "flip":
        changed = bytearray(content)
        for _ in range(data.draw(st.integers(1, 8))):
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
        content = bytes(changed)
    elif kind == "json":
        leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
        values = data.draw(st.recursive(leaves, st.lists, max_leaves=8))
        key = data.draw(st.sampled_from(["tensors", "places", "version"]))
        content = json.dumps(json.loads(content) | {key: values}).encode()
    else:
        content = pickle.dumps(data.draw(st.lists(st.integers() | st.text(max_size=3), max_size=4)))
    with contextlib.suppress(ValueError):
        plain_files._load(io.BytesIO(content))


def test_the_one_before_is_gone_on_from(whole, tmp_path):
    recipe, output = whole
    shutil.copytree(output, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000002")
    assert world(2, run, recipe.model_copy(update={"output": str(tmp_path / "run")})) == ["", ""]
    again, before = tiny.history(tmp_path / "run"), tiny.history(output)
    assert [line["loss"] for line in again] == [line["loss"] for line in before]
