"""An optimizer whose state is in host memory takes the same steps, to the last bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from silva.engine.parallel import offload, optimizer

import pytest
import tiny
import torch
from safetensors.torch import load_file
from worlds import world

from benchmarks import random_models
from silva.engine.recipe.schema import Recipe
from silva.engine.training import trainer

TRAINING = {
    "max_steps": 4,
    "save_every": 2,
    "keep": 9,
    "epsilon": 1e-4,
    "learning_rate": 1e-3,
    "global_batch": 4,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("data") / "pair.jsonl", tiny.rows("pair", 6))


def run(recipe: Recipe, portion: int) -> tuple[int, int, int]:
    """Trains; elements of main weights, bytes that they and their moments hold on the device after it, on the host."""
    parts: list[Any] = []

    @contextlib.contextmanager
    def kept(running: trainer.Trainer, number: int, batch: Any) -> Iterator[None]:
        parts[:] = running.step.optimizer.chained_optimizers
        yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "PORTION", portion)
        trainer.train(recipe, around=kept)
    mains = [p for part in parts for group in part.shard_fp32_from_float16_groups for p in group]
    state = [x for part in parts for each in part.optimizer.state.values() for x in each.values()]
    return (
        sum(p.numel() for p in mains),
        sum(p.untyped_storage().nbytes() for p in mains),
        sum(x.nbytes for x in state),
    )


def settings(dtype: str, parallel: dict[str, Any]) -> dict[str, Any]:
    return {"training": TRAINING, "model": {"dtype": dtype}, "parallel": parallel}


def exported(output: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in output.glob("export/*.safetensors") for name, x in load_file(file).items()}


def metrics(output: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["gradient_norm"]) for line in tiny.history(output)]


@pytest.mark.parametrize(
    ("size", "dtype", "parallel", "portion"),
    [
        (1, "bfloat16", {}, 5000),
        (1, "bfloat16", {}, 1 << 26),  # everything at once
        (2, "bfloat16", {"overlap": True}, 1),  # one weight at a time
        (2, "bfloat16", {"tensor": 2, "sequence_parallel": True}, 5000),
        (2, "float32", {}, 5000),
    ],
)
def test_steps_are_those_without_it(size, dtype, parallel, portion, model, data, tmp_path):
    for name, more in (("with", {"offload_optimizer": True}), ("without", {})):
        recipe = tiny.recipe("nca", model, data, tmp_path / name, **settings(dtype, parallel | more))
        for elements, device, host in world(size, run, recipe, portion):
            assert (elements > 0) == (dtype == "bfloat16")
            if name == "with":
                assert device == 0
                assert host >= 8 * elements
    assert metrics(tmp_path / "with") == metrics(tmp_path / "without")
    ours, theirs = exported(tmp_path / "with"), exported(tmp_path / "without")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (True, True)])
def test_a_checkpoint_goes_on_with_and_without_it(before, after, model, data, tmp_path):
    whole = tiny.recipe(
        "nca", model, data, tmp_path / "whole", **settings("bfloat16", {"offload_optimizer": before})
    )
    world(2, run, whole, 5000)
    half = tmp_path / "half"
    (half / "checkpoints").mkdir(parents=True)
    (half / "checkpoints" / "step-00000002").symlink_to(tmp_path / "whole" / "checkpoints" / "step-00000002")
    recipe = tiny.recipe("nca", model, data, half, **settings("bfloat16", {"offload_optimizer": after}))
    world(2, run, recipe, 5000)
    assert metrics(half) == metrics(tmp_path / "whole")[2:]
    ours, theirs = exported(half), exported(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def bytes_while_built(recipe: Recipe) -> tuple[int, int, int]:
    """Bytes of gradient buffers while main weights are made and afterwards; of the latter all that are not zero."""
    [bare], _ = random_models.build(Path(recipe.model.path), recipe.parallel, dtype=torch.bfloat16)
    [chunk] = optimizer.wrap([bare], recipe.parallel)
    make, during = optimizer.get_megatron_optimizer, []

    def held() -> int:
        return sum(buffer.grad_data.untyped_storage().nbytes() for buffer in chunk.buffers)

    def recorded(*arguments: Any, **options: Any) -> Any:
        during.append(held())
        return make(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "get_megatron_optimizer", recorded)
        optimizer.build([chunk], recipe.training, recipe.parallel)
    return during[0], held(), sum(int(buffer.grad_data.count_nonzero()) for buffer in chunk.buffers)


def test_main_weights_are_made_where_the_gradients_will_be(model, data, tmp_path):
    """Both at once would be 10 bytes a weight, 80 GiB of CodeLlama-70B on eight GPUs."""
    for offloaded in (True, False):
        recipe = tiny.recipe(
            "nca", model, data, tmp_path, **settings("bfloat16", {"offload_optimizer": offloaded})
        )
        [(during, after, left)] = world(1, bytes_while_built, recipe)
        assert after > 0
        assert during == (0 if offloaded else after)
        assert left == 0


def test_host_memory_is_taken_in_slabs_that_are_filled_up(monkeypatch):
    monkeypatch.setattr(offload, "SLAB", 100)
    slabs = offload._Slabs(1000)
    shapes = [(6, 10), (50,), (5, 8), (150,), (3, 10), (0,)]
    found = [slabs.like(torch.empty(shape)) for shape in shapes]
    assert [tuple(x.shape) for x in found] == shapes
    # 60 + 40, 50 + 30, 150
    assert len({x.untyped_storage().data_ptr() for x in found if x.numel()}) == 3
    for number, x in enumerate(found):
        x.fill_(number)
    assert all((x == number).all() for number, x in enumerate(found))


def test_portions_are_no_larger_than_they_may_be_or_one_weight(monkeypatch):
    monkeypatch.setattr(offload, "PORTION", 10)
    sizes = [4, 6, 1, 30, 2, 2]
    found = [[len(p) for p in portion] for portion in offload.portions(torch.zeros(n) for n in sizes)]
    assert found == [[4, 6], [1], [30], [2, 2]]
