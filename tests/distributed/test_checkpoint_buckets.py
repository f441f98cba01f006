"""Gradient buffers of several buckets: what the distributed optimizer saves belongs to the weight it is named for."""

from __future__ import annotations

from pathlib import Path

from megatron.core import dist_checkpointing
from worlds import world

from silva.engine.checkpoint import plain_files
from silva.engine.training import trainer


def apart(folder: Path) -> dict[str, float]:
    """How far each main weight of a float32 checkpoint is from the weight itself; equal, if all is well."""
    with plain_files.in_use():
        state = dist_checkpointing.load_plain_tensors(str(folder))
    prefix = "optimizer.state.param."
    names = [name for name in state if name.startswith(prefix)]
    return {name: float((state[name] - state[name.removeprefix(prefix)]).abs().max()) for name in names}


def test_main_weights_are_saved_where_they_belong(runs, tmp_path):
    """A tied embedding at both ends of a pipeline gets a bucket of its own, and buckets are padded.

    megatron-core's own gathering form (0.16, 0.17) saves everything behind the first padding shifted.
    """
    recipe = runs.recipe("sft", tmp_path, kind="tied", parallel={"pipeline": 2}, training={"max_steps": 1})
    world(2, trainer.train, recipe)
    [found] = world(1, apart, tmp_path / "checkpoints" / "step-00000001")
    assert len(found) >= 8
    assert set(found.values()) == {0.0}, found
