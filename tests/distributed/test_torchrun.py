"""The command of the README, as a user types it."""

import os
import subprocess
import sys

import pytest
import tiny
from worlds import world

from silva.engine.training import trainer


def run(recipe) -> None:
    trainer.train(recipe)


def test_torchrun_gives_the_losses_of_one_process(tmp_path):
    model = tiny.checkpoint(tmp_path / "model")
    rows = tiny.write(tmp_path / "pairs.jsonl", tiny.rows("pair", 6))
    recipe = tiny.recipe("nca", model, rows, tmp_path / "two")
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.dump())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "silva.engine.train", str(file), "parallel.tensor=2"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warning" not in done.stderr, done.stderr
    assert done.stdout.count("exported   ") == 1  # one process speaks
    assert f"export={tmp_path / 'two' / 'export'}" in done.stdout
    world(1, run, tiny.recipe("nca", model, rows, tmp_path / "one"))
    for ours, expected in zip(tiny.history(tmp_path / "two"), tiny.history(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-5)  # float32 sums in another order
