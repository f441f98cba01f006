"""Ranks killed at random moments, from the set-up to the export: no loss differs, nothing is stuck."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import tiny
from worlds import world

from silva.engine.recipe.schema import Recipe
from silva.engine.training import trainer

KILLS = 5


def run(recipe: Recipe, victim: int = -1, seconds: float = 0.0) -> None:
    """Trains; one rank is killed after some seconds."""
    if trainer.groups.rank() == victim:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    trainer.train(recipe)


@pytest.mark.parametrize(
    ("size", "parallel"), [(1, {}), (2, {}), (2, {"tensor": 2}), (2, {"pipeline": 2})], ids=str
)
def test_a_run_killed_again_and_again_has_the_losses_of_one_that_was_not(
    size, parallel, model, pairs, tmp_path
):
    def recipe(name: str) -> Recipe:
        settings = {"global_batch": 4, "max_steps": 8, "epochs": 9, "save_every": 1}
        return tiny.recipe("dpo", model, pairs, tmp_path / name, training=settings, parallel=parallel)

    world(size, run, recipe("first"))
    began = time.monotonic()
    world(size, run, recipe("whole"))
    whole = time.monotonic() - began
    expected = [line["loss"] for line in tiny.history(tmp_path / "whole")]
    chance, kills, number = random.Random(str(parallel)), 0, 0
    while kills < KILLS:
        number += 1
        for _ in range(40):
            try:
                world(size, run, recipe(str(number)), chance.randrange(size), chance.uniform(0.02, whole))
            except RuntimeError as error:
                if "no answer in" in str(error):
                    raise
                kills += 1
            else:
                break
        # 40 kills in a row without an end
        else:
            raise AssertionError("the run never ends")
        assert [line["loss"] for line in tiny.history(tmp_path / str(number))] == expected


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", tiny.rows("pair", 6))
