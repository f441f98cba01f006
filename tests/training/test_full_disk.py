"""Disks that are full at each place where a run writes, and folders that are somebody else's."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from worlds import world

from silva.engine.data import pipeline
from silva.engine.model import hf_export
from silva.engine.recipe.schema import Recipe
from silva.engine.training import metrics, reference_policy, resume, trainer

# where the disk becomes full, and what the error names
STAGES = [
    (pipeline, "_spool", "data"),
    (pipeline, "_make_shard", "data"),
    (reference_policy, "save_file", "reference"),
    (resume, "keep_recipe", "recipe.yaml"),
    (metrics.Journal, "__init__", "run"),
    (metrics.Journal, "write", "metrics.jsonl"),
    (hf_export, "_write_stage", "export.partial"),
    (hf_export, "_write_companions", "export.partial"),
]


def recipe(model: Path, rows: Path, output: Path, **sections: Any) -> Recipe:
    sections["training"] = {"global_batch": 4, "max_steps": 2, "save_every": 1}
    return tiny.recipe("dpo", model, rows, output, **sections)


def train(made: Recipe, full: tuple[Any, str] | None = None) -> None:
    """Trains; while a function works, no file may grow over 20 bytes."""
    if full is not None:
        where, name = full
        original = getattr(where, name)

        def limited(*args: Any, **kwargs: Any) -> Any:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))
            try:
                return original(*args, **kwargs)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        setattr(where, name, limited)
    trainer.train(made)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "export" / "model.safetensors")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", tiny.rows("pair", 6))


@pytest.fixture(scope="module")
def expected(model, pairs, tmp_path_factory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("whole")
    world(1, train, recipe(model, pairs, folder))
    return weights(folder)


@pytest.mark.parametrize(("where", "name", "told"), STAGES, ids=lambda each: str(each)[-20:])
def test_a_full_disk_ends_the_run_in_one_line_and_the_next_one_goes_on(
    where, name, told, model, pairs, expected, tmp_path
):
    made = recipe(model, pairs, tmp_path / "run")
    with pytest.raises(RuntimeError) as caught:
        world(1, train, made, (where, name))
    line = str(caught.value).strip().splitlines()[-1]
    kind, _, said = line.partition(": ")
    assert kind.endswith("UserError") or (kind == "OSError" and "File too large" in said), line
    assert told in said
    world(1, train, made)
    found = weights(tmp_path / "run")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[each], expected[each]) for each in expected)
    assert [line["step"] for line in tiny.history(tmp_path / "run")] == [0, 1]
    assert not list((tmp_path / "run").glob("*.partial"))


# ---------------------------------------------------------------- folders of other people


@pytest.mark.parametrize("name", ["export", "export.partial", "export.old"])
@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling link"])
def test_what_no_export_wrote_is_neither_replaced_nor_removed(name, kind, model, pairs, tmp_path):
    place, elsewhere = tmp_path / "run" / name, tmp_path / "elsewhere"
    place.parent.mkdir()
    if kind == "folder":
        place.mkdir()
        (place / "thesis.tex").write_text("years of work")
    elif kind == "file":
        place.write_text("years of work")
    else:
        if kind == "link":
            elsewhere.mkdir()
            (elsewhere / "thesis.tex").write_text("years of work")
        place.symlink_to(elsewhere)
        if name == "export" and kind == "dangling link":
            # what it points to is made
            world(1, train, recipe(model, pairs, tmp_path / "run"))
            assert place.is_symlink()
            assert (elsewhere / "model.safetensors").is_file()
            return
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(
        RuntimeError, match=r"exists and was not written by an export|export cannot be a folder"
    ):
        world(1, train, recipe(model, pairs, tmp_path / "run"))
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_a_link_to_an_export_stays_and_what_it_points_to_is_replaced(model, pairs, tmp_path):
    world(1, train, recipe(model, pairs, tmp_path / "run"))
    os.rename(tmp_path / "run" / "export", tmp_path / "published")
    (tmp_path / "run" / "export").symlink_to(tmp_path / "published")
    (tmp_path / "published" / "model.safetensors").unlink()
    world(1, train, recipe(model, pairs, tmp_path / "run"))
    assert (tmp_path / "run" / "export").is_symlink()
    assert (tmp_path / "published" / "model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["published", "run"]


def test_caches_that_cannot_be_written_are_refused_before_anything_is_computed(model, pairs, tmp_path):
    (tmp_path / "cache").write_text("")
    for key, section in (
        ("reference.cache", {"reference": {"cache": str(tmp_path / "cache")}}),
        ("data.cache", {"data": {"cache": str(tmp_path / "cache")}}),
    ):
        with pytest.raises(RuntimeError, match=rf"{key}: .*cannot be a folder"):
            world(1, train, recipe(model, pairs, tmp_path / "run", **section))


def test_a_cache_that_is_only_read_may_be_read_only(model, pairs, expected, tmp_path, monkeypatch):
    """Another run has filled it; `os.access` says what it says on a read-only file system."""
    sections = {
        "reference": {"cache": str(tmp_path / "reference")},
        "data": {"cache": str(tmp_path / "data")},
    }
    world(1, train, recipe(model, pairs, tmp_path / "first", **sections))

    def read_only(path: Any, mode: int, *more: Any, **named: Any) -> bool:
        return not (mode & os.W_OK and str(path).startswith(tuple(s["cache"] for s in sections.values())))

    monkeypatch.setattr(os, "access", read_only)
    before = sorted(
        (path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if "first" not in path.parts
    )
    world(1, train, recipe(model, pairs, tmp_path / "second", **sections))
    after = sorted(
        (path, path.stat().st_mtime_ns)
        for path in tmp_path.rglob("*")
        if not {"first", "second"} & {*path.parts}
    )
    assert after == before

    def refused(**named: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    others = tiny.write(tmp_path / "others.jsonl", tiny.rows("pair", 5))
    monkeypatch.setattr(reference_policy.tempfile, "TemporaryFile", refused)
    monkeypatch.setattr(reference_policy, "_computed", None)
    with pytest.raises(RuntimeError, match="reference: Read-only file system; choose a folder that can be"):
        world(1, train, recipe(model, others, tmp_path / "third", reference=sections["reference"]))
