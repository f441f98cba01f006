"""Whole runs: another packing, killed runs, other layouts halfway, refused checkpoints, the reference cache."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from worlds import world

from silva.engine.recipe.schema import Recipe
from silva.engine.training import publish, trainer

TOLERANCE = 1e-5  # float32 sums in another order, over three optimizer steps
# a sequence's log-prob is near -500, where float32's last digit is 3e-5: NCA's coefficients carry that
GRADIENT_TOLERANCE = 3e-5


@pytest.fixture(scope="module")
def model(runs) -> Path:
    return runs.models["untied"]


@pytest.fixture(scope="module")
def data(runs) -> dict[str, Path]:
    return runs.data


def run(recipe: Recipe) -> None:
    trainer.train(recipe)


def weights(output: Path) -> dict[str, torch.Tensor]:
    """The exported tensors of a run; pipelines write several files."""
    files = sorted((output / "export").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_another_packing_changes_nothing(model, data, runs, tmp_path):
    """Short rows: the same trees in more micro-batches, some of them cut apart."""
    settings = {"row_length": 640, "train": [{"path": str(data["pair"]), "format": "ultrainteract_pair"}]}
    world(1, run, tiny.recipe("nca", model, data["pair"], tmp_path / "run", data=settings))
    for ours, expected in zip(
        tiny.history(tmp_path / "run"), tiny.history(runs.single("nca").output), strict=True
    ):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
        assert ours["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=GRADIENT_TOLERANCE)


def until_killed(recipe: Recipe) -> None:
    """Trains slowly, so that the parent's signal finds it between two steps."""

    @contextlib.contextmanager
    def slow(running, number, batch):
        if number >= 3:
            time.sleep(600)
        yield

    Path(recipe.output).with_suffix(".pid").write_text(str(os.getpid()))
    trainer.train(recipe, around=slow)


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


def test_a_checkpoint_of_context_parallel_processes_goes_on_on_another_layout(model, data, tmp_path):
    """Two steps on CP2 x TP2, the rest on an uneven interleaved pipeline, gives the numbers of one process."""
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
    layout = {"parallel": {"context": 2, "tensor": 2, "sequence_parallel": True}}
    world(4, run, tiny.recipe("nca", model, data["pair"], tmp_path / "run", **settings, **layout))
    last = tmp_path / "run" / "checkpoints" / "step-00000004"
    last.rename(tmp_path / "done")  # as if it had stopped after two steps
    shutil.rmtree(tmp_path / "run" / "export")
    layout = {"parallel": {"pipeline": 2, "virtual_pipeline": 2, "stage_layers": [1, 2, 1, 0]}}
    world(2, run, tiny.recipe("nca", model, data["pair"], tmp_path / "run", **settings, **layout))
    found, expected = tiny.history(tmp_path / "run"), tiny.history(tmp_path / "single")
    assert [line["step"] for line in found] == [0, 1, 2, 3]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=TOLERANCE)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=GRADIENT_TOLERANCE)
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "single")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        # a hundredth of the 4e-3 that four steps can move a weight
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=4e-5, msg=name)


def test_a_resumed_run_does_not_read_the_weights_it_started_from(model, data, tmp_path):
    """They may be 140 GB, and the checkpoint replaces all of them."""
    settings = {"training": {"global_batch": 4, "max_steps": 2, "save_every": 1, "keep": 9}}
    recipe = tiny.recipe("bt", model, data["pair"], tmp_path / "run", **settings)
    world(1, run, recipe)
    expected = weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000002")
    shutil.rmtree(tmp_path / "run" / "export")
    world(1, run_without_reading, recipe)
    assert all(torch.equal(x, expected[name]) for name, x in weights(tmp_path / "run").items())


def run_without_reading(recipe: Recipe) -> None:
    def refuse(*unused: object) -> None:
        raise AssertionError("weights were read")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.hf, "load", refuse)
        trainer.train(recipe)


def export(recipe: Recipe) -> None:
    """An export has no room for an optimizer: of a 7B model it is another 113 GB."""

    def refuse(*unused: object) -> None:
        raise AssertionError("gradients or optimizer state were allocated")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("wrap", "build"):
            patch.setattr(trainer.optimizer, name, refuse)
        publish.export_checkpoint(recipe)


@pytest.mark.parametrize(
    ("size", "parallel"),
    [
        (4, {"context": 2, "tensor": 2}),
        (2, {"pipeline": 2, "stage_layers": [1, 3]}),
    ],
    ids=["cp2 x tp2", "pp2 uneven"],
)
def test_the_newest_checkpoint_exports_on_any_layout(size, parallel, runs, tmp_path):
    trained = runs.single("bt_dr").output
    layout = {"export": {"path": str(tmp_path / "export")}, "parallel": parallel}
    world(size, export, runs.recipe("bt_dr", trained, **layout))
    ours, theirs = weights(tmp_path), weights(trained)
    assert "score.weight" in theirs
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    eurus = {
        k: x for file in (tmp_path / "export-eurus").glob("*.safetensors") for k, x in load_file(file).items()
    }
    assert torch.equal(eurus["regression_head.weight"], theirs["score.weight"])


def test_a_run_that_diverges_stops_and_exports_nothing(model, data, tmp_path):
    settings = {"training": {"global_batch": 6, "max_steps": 4, "learning_rate": 1e30, "warmup": 0.0}}
    with pytest.raises(RuntimeError, match=r"lower training\.learning_rate"):
        world(1, run, tiny.recipe("sft", model, data["sft"], tmp_path / "run", **settings))
    assert not (tmp_path / "run" / "export").exists()


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


def test_damaged_log_probs_are_noticed_and_computed_again(model, data, tmp_path, capfd):
    settings = {"reference": {"cache": str(tmp_path / "cache")}}
    world(1, run, tiny.recipe("dpo", model, data["pair"], tmp_path / "a", **settings))
    [file] = (tmp_path / "cache").glob("*.safetensors")
    for place in (-1, -2, file.stat().st_size // 2, 5):
        changed = bytearray(file.read_bytes())
        changed[place] ^= 16
        file.write_bytes(changed)
        capfd.readouterr()
        output = tmp_path / f"b{place}"
        world(1, run, tiny.recipe("dpo", model, data["pair"], output, **settings))
        assert f"damaged    {file}: is not what was written" in capfd.readouterr().out
        assert tiny.history(output)[0]["loss"] == tiny.history(tmp_path / "a")[0]["loss"]


def test_damaged_data_are_noticed_and_tokenized_again(model, data, tmp_path, capfd):
    settings = {"data": {"cache": str(tmp_path / "cache")}}

    def train(name: str) -> list[float]:
        source = {"train": [{"path": str(data["sft"]), "format": "ultrainteract_sft"}]} | settings["data"]
        world(1, run, tiny.recipe("sft", model, data["sft"], tmp_path / name, data=source))
        return [line["loss"] for line in tiny.history(tmp_path / name)]

    expected = train("a")
    [folder] = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    for number, file in enumerate(sorted(folder.iterdir())):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        capfd.readouterr()
        assert train(f"b{number}") == expected
        said = capfd.readouterr().out
        assert f"damaged    {file}: is not what was written; the source is tokenized again" in said or (
            file.name == "digests.json" and "damaged    " in said
        )
    next(folder.glob("*.arrow")).unlink()
    assert train("c") == expected
