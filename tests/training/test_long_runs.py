"""Two thousand steps with saving, validation and prefetch: memory, open files and threads stay what they are."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import tiny
from worlds import world

from silva.engine.recipe.schema import Recipe
from silva.engine.training import trainer

STEPS, EVERY = 2000, 100


def train(made: Recipe) -> list[tuple[float, int, int, int, int]]:
    """Trains, and notes MiB of memory, open files, threads, child processes and objects after every hundredth step."""
    found = []
    own = psutil.Process()

    @contextlib.contextmanager
    def noted(running: Any, number: int, batch: Any) -> Iterator[None]:
        yield
        # a checkpoint is being written after every hundredth step; fifty later it is there
        if number % EVERY == EVERY // 2:
            gc.collect()
            found.append(
                (
                    own.memory_info().rss / 2**20,
                    len(os.listdir("/proc/self/fd")),
                    threading.active_count(),
                    len(own.children(recursive=True)),
                    len(gc.get_objects()),
                )
            )

    trainer.train(made, around=noted)
    return found


def test_what_a_run_holds_does_not_grow(tmp_path):
    model = tiny.checkpoint(
        tmp_path / "model", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    rows = tiny.write(tmp_path / "rows.jsonl", tiny.rows("pair", 8))
    held: Path = tiny.write(tmp_path / "held.jsonl", tiny.rows("pair", 2))
    made = tiny.recipe(
        "dpo",
        model,
        rows,
        tmp_path / "run",
        data={"validation": [{"path": str(held), "format": "ultrainteract_pair"}], "row_length": 512},
        training={
            "global_batch": 1,
            "max_steps": STEPS,
            "epochs": 999,
            "save_every": EVERY,
            "validate_every": EVERY,
            "keep": 1,
        },
    )
    [found] = world(1, train, made, timeout=400)
    assert len(found) == STEPS // EVERY
    # the first checkpoints make what is then used again
    settled, last = found[4], found[-1]
    assert last[1:4] == settled[1:4], found
    # 15 hundreds of steps later: a leak of a kilobyte a step would be 1.5 MiB, one object a step 1,500
    assert last[0] - settled[0] < 4, found
    assert last[4] - settled[4] < 1000, found
