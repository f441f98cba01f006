"""A checkpoint belongs to no layout: what one wrote, any other reads, goes on with, writes again and exports."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from silva.engine.parallel import groups, optimizer

import pytest
import tiny
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file
from worlds import world

from silva.engine.checkpoint import plain_files, state
from silva.engine.checkpoint.saver import Saver
from silva.engine.model import gpt, hf
from silva.engine.recipe.schema import Recipe
from silva.engine.training import publish, trainer

TRAINING = {
    "global_batch": 4,
    "max_steps": 6,
    "save_every": 2,
    "learning_rate": 1e-3,
    "epsilon": 1e-4,
    "keep": 9,
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2 x pp2": (4, {"tensor": 2, "pipeline": 2}),
    "dp4": (4, {}),
    "tp1": (1, {}),
    "tp2": (2, {"tensor": 2, "sequence_parallel": True}),
    "pp2 interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "dp2 plain optimizer": (2, {"distributed_optimizer": False}),
}
CHAIN = ("tp2 x pp2", "dp4", "tp1")  # two steps on each


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    # an odd vocabulary: its padding depends on the layout, and is no part of a checkpoint's meaning
    return tiny.checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=4, vocab_size=1025)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("data") / "pair.jsonl", tiny.rows("pair", 9))


class Stopped(Exception):
    pass


def run_to(recipe: Recipe, stop: int) -> None:
    """Trains until `stop` steps are done and their checkpoint is whole."""

    @contextlib.contextmanager
    def stopping(running: trainer.Trainer, number: int, batch: Any) -> Iterator[None]:
        if number == stop:
            running.saver.wait()
            raise Stopped
        yield

    with contextlib.suppress(Stopped):
        trainer.train(recipe, around=stopping)


@pytest.fixture(scope="module")
def travelled(model, data, tmp_path_factory) -> dict[str, Path]:
    """By objective: the folder of a run that changed its layout every two steps."""
    found = {}
    for name in ("nca", "bt"):
        found[name] = tmp_path_factory.mktemp(name)
        for place, layout in enumerate(CHAIN):
            size, parallel = LAYOUTS[layout]
            settings = {"training": TRAINING, "parallel": parallel}
            world(size, run_to, tiny.recipe(name, model, data, found[name], **settings), 2 * (place + 1))
    return found


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


@pytest.mark.parametrize("objective", ["nca", "bt"])
def test_losses_go_on_as_without_interruption(objective, model, data, travelled, tmp_path):
    world(1, trainer.train, tiny.recipe(objective, model, data, tmp_path, training=TRAINING))
    found, expected = tiny.history(travelled[objective]), tiny.history(tmp_path)
    assert [line["step"] for line in found] == [*range(6)]
    for ours, theirs in zip(found, expected, strict=True):
        # float32 sums in another order, over six optimizer steps
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=3e-5)
    ours, theirs = exported(travelled[objective] / "export"), exported(tmp_path / "export")
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        # a hundredth of the 6e-3 that six steps can move a weight
        torch.testing.assert_close(ours[name], x, rtol=0, atol=6e-5, msg=name)


@pytest.mark.parametrize("objective", ["nca", "bt"])
def test_every_layout_exports_the_same_bytes(objective, model, data, travelled, tmp_path):
    """From a checkpoint of TP2 x PP2, and from one of DP4 that has gone on from it."""
    for step in (2, 4):
        source = tmp_path / str(step)
        (source / "checkpoints").mkdir(parents=True)
        name = f"step-{step:08d}"
        (source / "checkpoints" / name).symlink_to(travelled[objective] / "checkpoints" / name)
        first: dict[str, torch.Tensor] = {}
        for layout in ("tp2 x pp2", "tp1", "pp2 interleaved", "tp2"):
            size, parallel = LAYOUTS[layout]
            to = {"export": {"path": str(tmp_path / f"{step} {layout}")}, "parallel": parallel}
            recipe = tiny.recipe(objective, model, data, source, training=TRAINING, **to)
            world(size, publish.export_checkpoint, recipe)
            found = exported(tmp_path / f"{step} {layout}")
            first = first or found
            assert found.keys() == first.keys()
            assert all(torch.equal(found[name], first[name]) for name in first), layout
    assert not torch.equal(exported(tmp_path / "2 tp1")["lm_head.weight" if objective == "nca" else "score.weight"],
                           first["lm_head.weight" if objective == "nca" else "score.weight"])  # fmt: skip


def load_and_save(recipe: Recipe, source: Path, target: Path) -> None:
    """Into a model whose weights nobody has set."""
    groups.initialize(recipe.parallel)
    bare = gpt.build(
        hf.read_shape(recipe.model.path), recipe.parallel, head="lm", dtype=getattr(torch, recipe.model.dtype)
    )
    with torch.no_grad():
        for chunk in bare:
            for p in chunk.parameters():
                p.fill_(torch.nan)
    chunks = optimizer.wrap(bare, recipe.parallel)
    made = optimizer.build(chunks, recipe.training, recipe.parallel)
    step = state.load(source, chunks, made)
    for chunk in bare:
        for name, p in chunk.named_parameters():
            assert torch.isfinite(p).all(), name
    Saver(target, keep=9, asynchronous=False).save(step, chunks, made, {})
    groups.shutdown()


def compare(before: Path, after: Path) -> None:
    """Every tensor of two checkpoints, but for the rows that pad a vocabulary."""
    with plain_files.in_use():
        first, last = (dist_checkpointing.load_plain_tensors(str(folder)) for folder in (before, after))
    assert first.keys() == last.keys()
    assert len([name for name in first if "exp_avg_sq" in name]) >= 8
    for saved in (first, last):
        groups_of_state = saved.pop("optimizer")["optimizer"]["param_groups"]
        assert {group["step"] for group in groups_of_state} == {2}
        del saved["content_metadata"]
    for name, x in first.items():
        rows = tuple(slice(0, min(sizes)) for sizes in zip(x.shape, last[name].shape, strict=True))
        assert torch.equal(x[rows], last[name][rows]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_round_over_layouts_keeps_every_bit(dtype, model, data, tmp_path):
    """Weights, main weights and both moments, through layouts with and without the distributed optimizer."""
    route = ("tp2 x pp2", "dp4", "pp2 interleaved", "tp2", "tp1", "dp2 plain optimizer", "dp4")
    settings = {"training": TRAINING, "model": {"dtype": dtype}}
    size, parallel = LAYOUTS[route[0]]
    recipe = tiny.recipe("nca", model, data, tmp_path / "run", parallel=parallel, **settings)
    world(size, run_to, recipe, 2)
    first = here = tmp_path / "run" / "checkpoints" / "step-00000002"
    for layout in route[1:]:
        size, parallel = LAYOUTS[layout]
        recipe = tiny.recipe("nca", model, data, tmp_path / "run", parallel=parallel, **settings)
        target = tmp_path / f"{here.parent.name} to {layout}"
        world(size, load_and_save, recipe, here, target)
        here = target / "step-00000002"
    world(1, compare, first, here)


def read_bytes(recipe: Recipe, source: Path) -> int:
    """How much this process reads, from wherever, to load a checkpoint."""
    groups.initialize(recipe.parallel)
    bare = gpt.build(hf.read_shape(recipe.model.path), recipe.parallel, head="lm", dtype=torch.bfloat16)
    chunks = optimizer.wrap(bare, recipe.parallel)
    made = optimizer.build(chunks, recipe.training, recipe.parallel)
    state.load(source, chunks, made)  # the first time, modules are read too
    before = _characters_read()
    state.load(source, chunks, made)
    found = _characters_read() - before
    groups.shutdown()
    return found


def _characters_read() -> int:
    [line] = [s for s in Path("/proc/self/io").read_text().splitlines() if s.startswith("rchar")]
    return int(line.split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts what a process reads")
def test_processes_write_and_read_their_own_slices(data, tmp_path):
    """Data parallel: 12 of 14 bytes a weight are the optimizer's, and a process owns a fourth of them."""
    model = tiny.checkpoint(tmp_path / "model", hidden_size=256, intermediate_size=1024, num_hidden_layers=6)
    settings = {"training": TRAINING | {"max_steps": 1, "save_every": 1}, "model": {"dtype": "bfloat16"}}
    recipe = tiny.recipe("nca", model, data, tmp_path / "run", **settings)
    world(4, run_to, recipe, 1)
    source = tmp_path / "run" / "checkpoints" / "step-00000001"
    written = [sum(p.stat().st_size for p in source.glob(f"__{rank}_*.distcp")) for rank in range(4)]
    weights = sum(x.numel() for x in load_file(model / "model.safetensors").values())
    slack = 3e5  # indices, and headers of a kilobyte around each piece
    assert 14 * weights < sum(written) < 14 * weights + 4 * slack
    assert max(written[1:]) < 12 * weights / 4 + slack
    assert written[0] < (2 + 12 / 4) * weights + slack  # and the model's own weights
    for amount in world(4, read_bytes, recipe, source):
        # torch seeks around in each of the hundred pieces, which costs it 28 KB a piece, whatever the piece's size
        assert (2 + 12 / 4) * weights <= amount < (2 + 12 / 4) * weights + slack + 4e6
