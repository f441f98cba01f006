"""What computes: said at the start, and what a recipe asks for is used or refused."""

from __future__ import annotations

import json

import flash_stand_in
import pytest
import tiny
from worlds import world

from silva.engine.training import trainer
from silva.kernels import document_attention


@pytest.fixture
def flash(monkeypatch):
    flash_stand_in.install(monkeypatch)
    yield
    document_attention._function.cache_clear()


def test_a_recipe_that_asks_for_it_trains_the_same(flash, tmp_path):
    """Rows of conversations are plain documents; rows of trees are not, and take the tree's kernel."""
    folder = tiny.checkpoint(tmp_path / "model")
    rows = [
        {"prompt": f"Question {n}: what is {n} times {n}?", "completion": f"It is {n * n}."}
        for n in range(12)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = [{"path": str(data), "format": "prompt_completion"}]

    def train(name: str, attention: str) -> list[int]:
        flash_stand_in.calls.clear()
        settings = {"model": {"attention": attention, "dtype": "float32", "path": str(folder)}}
        if name != "nca":
            settings["data"] = {"train": source, "row_length": 128}
        where = tiny.write(tmp_path / "pairs.jsonl", tiny.rows("pair", 6)) if name == "nca" else data
        trainer.train(tiny.recipe(name, folder, where, tmp_path / f"{name} {attention}", **settings))
        return list(flash_stand_in.calls)

    for name, plain in (("sft", True), ("nca", False)):
        assert world(1, train, name, "tree") == [[]]
        [found] = world(1, train, name, "flash")
        assert bool(found) == plain
        lines = [tiny.history(tmp_path / f"{name} {which}") for which in ("tree", "flash")]
        for ours, theirs in zip(*lines, strict=True):
            # float32 sums in another order, over three optimizer steps
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_asking_for_what_is_not_installed_is_one_line(tmp_path):
    folder = tiny.checkpoint(tmp_path / "model")
    recipe = tiny.recipe("sft", folder, tiny.write(tmp_path / "sft.jsonl", tiny.rows("sft", 2)), tmp_path / "run",
                         model={"attention": "flash", "dtype": "float32", "path": str(folder)})  # fmt: skip
    with pytest.raises(RuntimeError, match=r"model\.attention: found flash, but none of flash_attn_"):
        world(1, trainer.train, recipe)


def test_what_computes_is_said_once(tmp_path, capfd):
    folder = tiny.checkpoint(tmp_path / "model")
    rows = tiny.write(tmp_path / "pair.jsonl", tiny.rows("pair", 3))
    layout = {"parallel": {"offload_optimizer": True}, "training": {"max_steps": 1, "global_batch": 2}}
    world(2, trainer.train, tiny.recipe("bt", folder, rows, tmp_path / "run", **layout))
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("computes ")]
    assert lines == [
        "computes   CPU, gloo; tree attention (torch); log-probs, losses, norms, rotary positions, SwiGLU (torch); "
        "AdamW (torch, fused, its state on the host)"
    ]
