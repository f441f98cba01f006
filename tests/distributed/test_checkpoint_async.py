"""Checkpoints written behind training: the same bytes as at once, whole or not there, whatever is killed when."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from worlds import world

from silva.engine import parents
from silva.engine.checkpoint import index, writer
from silva.engine.errors import UserError
from silva.engine.recipe.schema import Recipe
from silva.engine.training import trainer

TRAINING = {"global_batch": 4, "max_steps": 4, "learning_rate": 1e-3, "epsilon": 1e-4, "keep": 9}
EVERY_STEP = {"training": TRAINING | {"save_every": 1}}
TP2 = {"parallel": {"tensor": 2}}  # both ranks have something to write
TIMING = {"seconds", "tokens_per_second", "unrolled_tokens_per_second", "data_wait"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("data") / "pair.jsonl", tiny.rows("pair", 9))


def run(recipe: Recipe) -> None:
    trainer.train(recipe)


def run_ahead_of_the_writers(recipe: Recipe) -> None:
    """Trains with writers that wait until the step behind their checkpoint is done."""
    own, gates = os.getpid(), Path(recipe.output)

    def slow(transforms: Any, rank: int, buckets: Any, results: Any) -> None:
        number = int(Path(buckets[0][0]).parent.name.removeprefix(index.PREFIX)[:8])
        behind = os.getpid() != own and number < recipe.training.max_steps  # the last one is waited for
        while behind and not (gates / f"done-{number}").exists():
            time.sleep(0.01)
        writer.write_files(transforms, rank, buckets, results)

    @contextlib.contextmanager
    def ahead(running: trainer.Trainer, number: int, batch: Any) -> Iterator[None]:
        running.saver.write = slow
        yield
        assert not (gates / "checkpoints" / f"step-{number:08d}").exists()
        (gates / f"done-{number}").touch()

    trainer.train(recipe, around=ahead)


@pytest.mark.parametrize(
    "layout",
    [{"tensor": 2}, {"distributed_optimizer": True}, {"distributed_optimizer": False, "overlap": True}],
    ids=["tp2", "dp2", "dp2 plain optimizer"],
)
def test_a_checkpoint_holds_the_state_of_its_own_step(layout, model, data, tmp_path):
    """Weights have changed before a byte was written, and the files are those of a save that nothing passed by."""
    for name, work in (("sync", run), ("async", run_ahead_of_the_writers)):
        settings = {"training": EVERY_STEP["training"] | {"async_save": name == "async"}}
        recipe = tiny.recipe("nca", model, data, tmp_path / name, parallel=layout, **settings)
        (tmp_path / name).mkdir()
        world(2, work, recipe)
    assert [line["loss"] for line in tiny.history(tmp_path / "async")] == [
        line["loss"] for line in tiny.history(tmp_path / "sync")
    ]
    expected = _files(tmp_path / "sync" / "checkpoints")
    assert len(expected) >= 3 * 4  # data, an index and what the run is, of four checkpoints at least
    assert _files(tmp_path / "async" / "checkpoints") == expected


def _files(folder: Path) -> dict[str, bytes]:
    """Every file's content; the index aside, which holds the path and a random number of the save, and the recipe."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".metadata")
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    for name in found:
        if name.endswith("run.json"):
            run = json.loads(found[name])
            # the recipe says whether saving is asynchronous, and the digests of the rest are its and the index's
            del run["recipe"], run["digest"], run["files"][".metadata"]
            found[name] = json.dumps(run).encode()
    return found


def run_until_killed(recipe: Recipe) -> None:
    """Rank 0 kills itself a step after it began to save step 3, whose writers never get ready."""
    own = os.getpid()

    def stuck(transforms: Any, rank: int, buckets: Any, results: Any) -> None:
        if "00000003" in buckets[0][0]:
            Path(buckets[0][0]).write_bytes(b"half a file")
            while os.getppid() == own:
                time.sleep(0.01)
            os._exit(1)
        writer.write_files(transforms, rank, buckets, results)

    @contextlib.contextmanager
    def dying(running: trainer.Trainer, number: int, batch: Any) -> Iterator[None]:
        running.saver.write = stuck
        yield
        if number == 3 and running.first:
            folder = Path(recipe.output) / "checkpoints"
            while len(list(folder.glob("step-00000003.*/*.distcp"))) < 2:  # a writer of each rank is at work
                time.sleep(0.01)
            os.kill(own, signal.SIGKILL)

    trainer.train(recipe, around=dying)


def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(model, data, tmp_path):
    whole, killed = (
        tiny.recipe("nca", model, data, tmp_path / name, **EVERY_STEP, **TP2) for name in ("whole", "killed")
    )
    world(2, run, whole)
    with pytest.raises(RuntimeError, match="died without a word"):
        world(2, run_until_killed, killed)
    folder = tmp_path / "killed" / "checkpoints"
    assert [path.name for path in index.checkpoints(folder)] == ["step-00000001", "step-00000002"]
    assert len(list(folder.glob(f"*{index.PARTIAL}"))) == 1
    world(2, run, killed)
    assert sorted(path.name for path in folder.iterdir()) == [f"step-{n:08d}" for n in (1, 2, 3, 4)]
    ours, expected = (
        [{k: v for k, v in line.items() if k not in TIMING} for line in tiny.history(tmp_path / name)]
        for name in ("killed", "whole")
    )
    assert ours == expected
    assert _files(folder) == _files(tmp_path / "whole" / "checkpoints")


def run_with_a_broken_writer(recipe: Recipe, how: str, rank: int) -> str:
    """What the run says when the writer of one rank fails at step 2."""

    def broken(transforms: Any, own: int, buckets: Any, results: Any) -> None:
        if own == rank and "00000002" in buckets[0][0]:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            folder = Path(buckets[0][0]).parent
            buckets = [(str(folder / "absent" / name), name, content) for _, name, content in buckets]
        writer.write_files(transforms, own, buckets, results)

    @contextlib.contextmanager
    def broken_down(running: trainer.Trainer, number: int, batch: Any) -> Iterator[None]:
        running.saver.write = broken
        yield

    try:
        trainer.train(recipe, around=broken_down)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("how", "rank", "reason", "asynchronous"),
    [
        ("killed", 1, "the process that wrote it was killed", True),
        ("unwritable", 0, "No such file or directory", True),
        ("unwritable", 1, "No such file or directory", False),
    ],
)
def test_a_writer_that_fails_ends_the_run_in_one_line(how, rank, reason, asynchronous, model, data, tmp_path):
    settings = {"training": EVERY_STEP["training"] | {"async_save": asynchronous}}
    recipe = tiny.recipe("nca", model, data, tmp_path / "run", **settings, **TP2)
    said = world(2, run_with_a_broken_writer, recipe, how, rank)
    assert "step-00000002: the checkpoint could not be written" in said[0]
    assert f"rank {rank}: " in said[0]
    assert reason in said[0]
    assert "see rank 0" in said[1]
    assert "\n" not in said[0]
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in index.checkpoints(folder)] == ["step-00000001"]
    world(2, run, recipe)  # the cause is gone
    assert [line["step"] for line in tiny.history(tmp_path / "run")] == [0, 1, 2, 3]
    assert json.loads((folder / "step-00000004" / "run.json").read_text())["step"] == 4
    assert not list(folder.glob(f"*{index.PARTIAL}"))


def test_results_of_any_size_pass_from_writer_to_saver():
    """A pipe of 64 KiB, which a larger model's write results exceed, would block here for ever."""
    results = writer.Results()
    process = multiprocessing.get_context("fork").Process(target=results.put, args=(b"x" * 2**20,))
    process.start()
    process.join()
    assert len(results.get_nowait()) == 2**20


def test_results_of_a_killed_writer_are_an_error():
    results = writer.Results()
    assert isinstance(results.get_nowait(), RuntimeError)
    results._file.write(b"\x80\x04")  # the beginning of a pickle
    assert isinstance(results.get_nowait(), RuntimeError)


def test_a_writer_ends_with_the_process_that_trains():
    """However that one ends; else it would hold the GPU's memory against the run that is started again."""
    read, write = os.pipe()
    training = os.fork()
    if training == 0:
        owner = os.getpid()
        if os.fork() == 0:
            parents.end_with(owner)
            os.write(write, b"at work")
            time.sleep(600)
        os.read(read, 7)
        os.kill(owner, signal.SIGKILL)
    os.close(write)
    os.waitpid(training, 0)
    began = time.monotonic()
    assert os.read(read, 7) == b""  # nobody is left who could write
    assert time.monotonic() - began < 60
    os.close(read)
