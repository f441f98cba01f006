"""Whole runs: every layout gives the single process's numbers, and a killed run goes on as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from worlds import world

from silva.engine import checkpoint, publish, trainer
from silva.engine.config import Recipe

TOLERANCE = 1e-5  # float32 sums in another order, over three optimizer steps
# a sequence's log-prob is near -500, where float32's last digit is 3e-5: NCA's and KTO's coefficients carry that
GRADIENT_TOLERANCE = 3e-5
ADAM = {"learning_rate": 1e-3, "epsilon": 1e-4}  # see tiny.recipe
LAYOUTS = {
    "tp2": (2, {"tensor": 2}),
    "tp2 sequence parallel": (2, {"tensor": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline": 2}),
    "dp2": (2, {}),
    "dp2 plain optimizer": (2, {"distributed_optimizer": False}),
    "dp2 overlapped": (2, {"overlap": True}),
    "pp2 interleaved": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "pp2 interleaved x dp2 overlapped": (4, {"pipeline": 2, "virtual_pipeline": 2, "overlap": True}),
    "tp2 x pp2 recomputed": (4, {"tensor": 2, "pipeline": 2, "recompute": "full"}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    return {name: tiny.write(folder / f"{name}.jsonl", tiny.rows(name, 9)) for name in ("sft", "pair")}


def run(recipe: Recipe) -> None:
    trainer.train(recipe)


@pytest.fixture(scope="module")
def single(model, data, tmp_path_factory) -> dict[str, Path]:
    """Each objective's run on one process."""
    found = {}
    for name in ("sft", "nca", "kto", "bt_dr"):
        found[name] = tmp_path_factory.mktemp(f"single-{name}")
        world(1, run, tiny.recipe(name, model, data["sft" if name == "sft" else "pair"], found[name]))
    return found


def weights(output: Path) -> dict[str, torch.Tensor]:
    """The exported tensors of a run; pipelines write several files."""
    files = sorted((output / "export").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("layout", "objective"),
    [
        *(("tp2", name) for name in ("sft", "nca", "kto", "bt_dr")),
        *(("pp2", name) for name in ("sft", "nca", "kto", "bt_dr")),
        *(("dp2", name) for name in ("sft", "nca", "kto", "bt_dr")),
        ("tp2 sequence parallel", "nca"),
        ("tp2 sequence parallel", "bt_dr"),
        ("dp2 plain optimizer", "kto"),
        ("dp2 overlapped", "nca"),
        ("pp2 interleaved x dp2 overlapped", "nca"),
        ("pp2 interleaved", "kto"),
        ("pp2 interleaved", "bt_dr"),
        ("tp2 x pp2 recomputed", "kto"),
    ],
)
def test_layouts_give_the_numbers_of_one_process(layout, objective, model, data, single, tmp_path):
    size, parallel = LAYOUTS[layout]
    source = data["sft" if objective == "sft" else "pair"]
    world(size, run, tiny.recipe(objective, model, source, tmp_path / "run", parallel=parallel))
    found, alone = tiny.history(tmp_path / "run"), tiny.history(single[objective])
    assert len(found) == len(alone) == 3
    for ours, expected in zip(found, alone, strict=True):
        for key in ("loss", "reward_chosen", "reward_margin"):
            if key in expected:
                assert ours[key] == pytest.approx(expected[key], rel=TOLERANCE, abs=TOLERANCE), key
        assert ours["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=GRADIENT_TOLERANCE)
    ours, theirs = weights(tmp_path / "run"), weights(single[objective])
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # a hundredth of the 3e-3 that three steps can move a weight
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=3e-5, msg=name)


def test_another_packing_changes_nothing(model, data, single, tmp_path):
    """Short rows: the same trees in more micro-batches, some of them cut apart."""
    settings = {"row_length": 640, "train": [{"path": str(data["pair"]), "format": "ultrainteract_pair"}]}
    world(1, run, tiny.recipe("nca", model, data["pair"], tmp_path / "run", data=settings))
    for ours, expected in zip(tiny.history(tmp_path / "run"), tiny.history(single["nca"]), strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
        assert ours["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=GRADIENT_TOLERANCE)


def test_bfloat16_stays_near_float32(model, data, single, tmp_path):
    """Weights in bfloat16 with float32 main weights, gradients and log-probs, over two processes."""
    layout = {"model": {"dtype": "bfloat16"}, "parallel": {"tensor": 2, "sequence_parallel": True}}
    world(2, run, tiny.recipe("sft", model, data["sft"], tmp_path / "run", **layout))
    for ours, expected in zip(tiny.history(tmp_path / "run"), tiny.history(single["sft"]), strict=True):
        # bfloat16 keeps 8 bits: 4e-3 per rounding, averaged over some thousand tokens
        assert ours["loss"] == pytest.approx(expected["loss"], rel=4e-3)
        assert ours["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=4e-2)
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.bfloat16}


def until_killed(recipe: Recipe) -> None:
    """Trains slowly, so that the parent's signal finds it between two steps."""
    step = trainer.Trainer.train_step

    def slow(self, number, batch):
        if number >= 3:
            time.sleep(600)
        return step(self, number, batch)

    trainer.Trainer.train_step = slow
    Path(recipe.output).with_suffix(".pid").write_text(str(os.getpid()))
    trainer.train(recipe)


@pytest.mark.parametrize("objective", ["sft", "kto"])
def test_a_killed_run_goes_on_bit_for_bit(objective, model, data, tmp_path):
    source = data["sft" if objective == "sft" else "pair"]
    settings = {
        "training": {
            "global_batch": 4,
            "max_steps": 4,
            "save_every": 2,
            "learning_rate": 1e-3,
            "epsilon": 1e-4,
        }
    }
    whole = tiny.recipe(objective, model, source, tmp_path / "whole", **settings)
    killed = tiny.recipe(objective, model, source, tmp_path / "killed", **settings)
    world(1, run, whole)
    child = os.fork()
    if child == 0:
        try:
            world(1, until_killed, killed)
        finally:
            os._exit(0)
    pid_file = Path(killed.output).with_suffix(".pid")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = _history_so_far(tmp_path / "killed")
        if len(found) >= 3:
            break
        time.sleep(0.1)
    os.kill(int(pid_file.read_text()), signal.SIGKILL)
    os.waitpid(child, 0)
    assert [line["step"] for line in tiny.history(tmp_path / "killed")] == [0, 1, 2]
    assert not (tmp_path / "killed" / "export").exists()

    world(1, run, killed)
    timing = {"seconds", "tokens_per_second", "unrolled_tokens_per_second", "data_wait"}
    for ours, expected in zip(
        tiny.history(tmp_path / "killed"), tiny.history(tmp_path / "whole"), strict=True
    ):
        assert {k: v for k, v in ours.items() if k not in timing} == {
            k: v for k, v in expected.items() if k not in timing
        }
    ours, expected = (
        load_file(tmp_path / name / "export" / "model.safetensors") for name in ("killed", "whole")
    )
    assert all(torch.equal(ours[key], expected[key]) for key in expected)
    kept = sorted(p.name for p in (tmp_path / "killed" / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000004"]


def _history_so_far(output: Path) -> list[dict]:
    whole = (output / "metrics.jsonl").is_file() and (output / "metrics.jsonl").read_text().endswith("\n")
    return tiny.history(output) if whole else []


def test_a_checkpoint_loads_on_another_layout(model, data, tmp_path):
    """Two steps on TP2 x PP2, the rest on DP2 gives the losses of one process."""
    settings = {
        "training": {
            "global_batch": 4,
            "max_steps": 4,
            "save_every": 2,
            "learning_rate": 1e-3,
            "epsilon": 1e-4,
            "keep": 9,
        }
    }
    world(1, run, tiny.recipe("nca", model, data["pair"], tmp_path / "single", **settings))
    layout = {"parallel": {"tensor": 2, "pipeline": 2}}
    world(4, run, tiny.recipe("nca", model, data["pair"], tmp_path / "run", **settings, **layout))
    last = tmp_path / "run" / "checkpoints" / "step-00000004"
    last.rename(tmp_path / "done")  # as if it had stopped after two steps
    world(2, run, tiny.recipe("nca", model, data["pair"], tmp_path / "run", **settings))
    found, expected = tiny.history(tmp_path / "run"), tiny.history(tmp_path / "single")
    assert [line["step"] for line in found] == [0, 1, 2, 3]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=TOLERANCE)


def export(recipe: Recipe) -> None:
    publish.export_checkpoint(recipe)


def test_the_newest_checkpoint_exports_on_any_layout(model, data, single, tmp_path):
    recipe = tiny.recipe("bt_dr", model, data["pair"], single["bt_dr"])
    layout = {"export": {"path": str(tmp_path / "export")}, "parallel": {"tensor": 2}}
    world(2, export, tiny.recipe("bt_dr", model, data["pair"], single["bt_dr"], **layout))
    ours, theirs = weights(tmp_path), weights(Path(recipe.output))
    assert "score.weight" in theirs
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    eurus = load_file(tmp_path / "export-eurus" / "model.safetensors")
    assert torch.equal(eurus["regression_head.weight"], theirs["score.weight"])


def test_a_checkpoint_of_another_run_is_refused(model, data, tmp_path):
    world(1, run, tiny.recipe("nca", model, data["pair"], tmp_path / "run"))
    other = tiny.recipe("nca", model, data["pair"], tmp_path / "run", objective={"name": "nca", "beta": 0.2})
    with pytest.raises(RuntimeError, match="belongs to another run"):
        world(1, run, other)


def test_a_foreign_index_is_not_unpickled(model, data, tmp_path):
    recipe = tiny.recipe("bt", model, data["pair"], tmp_path / "run")
    world(1, run, recipe)
    index = tmp_path / "run" / "checkpoints" / "step-00000003" / ".metadata"
    index.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "pwned").encode() + b"'\ntR.")
    with pytest.raises(RuntimeError, match="does not belong into a checkpoint"):
        world(1, run, recipe)
    assert not (tmp_path / "pwned").exists()


def test_a_run_that_diverges_stops_and_exports_nothing(model, data, tmp_path):
    settings = {"training": {"global_batch": 6, "max_steps": 4, "learning_rate": 1e30, "warmup": 0.0}}
    with pytest.raises(RuntimeError, match=r"lower training\.learning_rate"):
        world(1, run, tiny.recipe("sft", model, data["sft"], tmp_path / "run", **settings))
    assert not (tmp_path / "run" / "export").exists()


def test_results_of_any_size_pass_from_writer_to_saver():
    """A pipe of 64 KiB, which a larger model's write results exceed, would block here for ever."""
    writers = checkpoint._writers_queue()
    writers.put(b"x" * 2**20)
    assert len(writers.get_nowait()) == 2**20


def test_the_reference_cache_is_used_and_never_stale(model, data, tmp_path):
    recipe = tiny.recipe(
        "dpo", model, data["pair"], tmp_path / "a", reference={"cache": str(tmp_path / "cache")}
    )
    world(1, run, recipe)
    (first,) = (tmp_path / "cache").glob("*.safetensors")
    stamp = first.stat().st_mtime_ns
    again = recipe.model_copy(update={"output": str(tmp_path / "b")})
    world(1, run, again)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [first.name]
    assert first.stat().st_mtime_ns == stamp
    assert tiny.history(tmp_path / "a")[0]["loss"] == tiny.history(tmp_path / "b")[0]["loss"]
    changed = tiny.write(
        tmp_path / "changed.jsonl", json.loads(json.dumps(tiny.rows("pair", 9)).replace("Step 1", "Step one"))
    )
    world(
        1,
        run,
        tiny.recipe("dpo", model, changed, tmp_path / "c", reference={"cache": str(tmp_path / "cache")}),
    )
    assert len(list((tmp_path / "cache").iterdir())) == 2
