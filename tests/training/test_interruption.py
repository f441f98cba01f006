"""Runs that are asked to stop, and runs that find another one in their folder."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from worlds import world

from silva.engine.errors import Stopped, UserError
from silva.engine.recipe.schema import Recipe
from silva.engine.training import interruption, output_lock, trainer
from silva.engine.training.output_lock import OutputLock


def recipe(model: Path, rows: Path, output: Path, **sections: Any) -> Recipe:
    training = {"global_batch": 4, "max_steps": 4, "save_minutes": 0.0}
    sections["training"] = training | sections.get("training", {})
    return tiny.recipe("sft", model, rows, output, **sections)


def train(made: Recipe, number: int | None = None, rank: int = 0, step: int = 1) -> str:
    """Trains; one rank gets a signal during a step."""

    @contextlib.contextmanager
    def signalled(running: trainer.Trainer, at: int, batch: Any) -> Iterator[None]:
        if at == step and number is not None and trainer.groups.rank() == rank:
            os.kill(os.getpid(), number)
        yield

    try:
        trainer.train(made, around=signalled)
    except Stopped as stopped:
        return str(stopped)
    return ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(("size", "parallel"), [(1, {}), (2, {}), (2, {"pipeline": 2})], ids=str)
def test_a_signal_to_one_rank_stops_all_after_a_checkpoint(size, parallel, number, model, rows, tmp_path):
    made = recipe(model, rows, tmp_path / "run", parallel=parallel)
    said = world(size, train, made, number, size - 1)
    assert said == [f"{tmp_path / 'run'}: stopped after step 2 of 4, as asked, and saved"] * size
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert not (tmp_path / "run" / "export").exists()
    assert not (tmp_path / "run" / output_lock.NAME).exists()
    world(size, train, made)
    world(size, train, made.model_copy(update={"output": str(tmp_path / "whole")}))
    ours, expected = (
        {
            k: x
            for file in (tmp_path / name / "export").glob("*.safetensors")
            for k, x in load_file(file).items()
        }
        for name in ("run", "whole")
    )
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_a_signal_during_the_last_step_leaves_the_export_to_the_next_start(model, rows, tmp_path):
    made = recipe(model, rows, tmp_path / "run")
    [said] = world(1, train, made, signal.SIGTERM, 0, 3)
    assert "stopped after step 4 of 4, as asked, and saved" in said
    assert not (tmp_path / "run" / "export").exists()
    assert world(1, train, made) == [""]
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()


def test_checkpoints_are_written_by_time(model, rows, tmp_path):
    made = recipe(model, rows, tmp_path / "run", training={"save_minutes": 1e-9, "keep": 9})
    world(2, train, made)
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in (1, 2, 3, 4)]


SLOW = """
import sys, time, contextlib, os, signal
from silva.engine import cli
from silva.engine.recipe.loading import load
from silva.engine.training import trainer

# a shell has a program that it starts in the background ignore it
signal.signal(signal.SIGINT, signal.default_int_handler)

@contextlib.contextmanager
def slow(running, number, batch):
    print("step", number, flush=True)
    if number == 2:
        time.sleep(float(sys.argv[2]))
    yield

sys.exit(cli.run(lambda: print(trainer.train(load(sys.argv[1]), around=slow).steps)))
"""


@pytest.fixture
def slow(model, rows, tmp_path):
    """Starts a run as a program that waits in its third step, and returns once it is there."""
    file, program = tmp_path / "recipe.yaml", tmp_path / "program.py"
    file.write_text(recipe(model, rows, tmp_path / "run", training={"save_every": 1}).dump())
    program.write_text(SLOW)
    started: list[subprocess.Popen[str]] = []

    def start(seconds: float) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(program), str(file), str(seconds)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            if line == "step 2\n":
                break
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("number", "code", "told"),
    [
        (signal.SIGTERM, 75, "stopped after step 3 of 4, as asked, and saved; start it again to go on"),
        (signal.SIGINT, 130, "interrupted; started again, a run goes on from its newest checkpoint"),
    ],
)
def test_the_exit_code_tells_a_script_that_the_run_goes_on(number, code, told, slow):
    process = slow(3 if number == signal.SIGTERM else 60)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    [line] = [line for line in error.splitlines() if line.startswith("silva")]
    assert line.endswith(told)
    assert "Traceback" not in error


def test_a_second_signal_ends_the_process_at_once(slow):
    process = slow(60)
    for _ in range(3):
        # the same request, by another way
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert process.poll() is None
    time.sleep(interruption.TOGETHER)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == -signal.SIGTERM


def test_two_runs_in_one_folder(slow, model, rows, tmp_path):
    process = slow(60)
    made = recipe(model, rows, tmp_path / "run", training={"save_every": 1})
    with pytest.raises(RuntimeError, match=rf"is used by another run \(process {process.pid} on "):
        world(1, train, made)
    process.kill()
    # not waited for: its entry among the processes is still there
    time.sleep(0.5)
    world(1, train, made)
    assert [line["step"] for line in tiny.history(tmp_path / "run")] == [0, 1, 2, 3]


# ---------------------------------------------------------------- the lock alone


def test_a_lock_is_held_and_given_back(tmp_path):
    with OutputLock(tmp_path):
        with pytest.raises(UserError, match="is used by another run"), OutputLock(tmp_path):
            pass
        assert json.loads((tmp_path / output_lock.NAME).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ['{"host": "elsewhere", "pid": 1, "began": "now"}', "", "[]", '{"host'])
def test_a_lock_that_is_not_renewed_is_taken_over(content, tmp_path, monkeypatch):
    monkeypatch.setattr(output_lock, "RENEWED", 0.2)
    monkeypatch.setattr(output_lock, "STALE", 1.5)
    file = tmp_path / output_lock.NAME
    file.write_text(content)
    with pytest.raises(UserError, match="is used by another run"), OutputLock(tmp_path):
        pass
    os.utime(file, (time.time() - 1, time.time() - 1))
    began = time.monotonic()
    with OutputLock(tmp_path):
        assert time.monotonic() - began < 5
        assert json.loads(file.read_text())["pid"] == os.getpid()


def test_a_lock_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(output_lock, "RENEWED", 0.1)
    with OutputLock(tmp_path):
        file = tmp_path / output_lock.NAME
        os.utime(file, (0, 0))
        time.sleep(0.5)
        assert time.time() - file.stat().st_mtime < 10


def test_of_many_only_one_gets_a_stale_lock(tmp_path):
    (tmp_path / output_lock.NAME).write_text(
        json.dumps({"host": output_lock.socket.gethostname(), "pid": 2**22 + 1})
    )
    children = []
    for _ in range(8):
        child = os.fork()
        if child == 0:
            try:
                with OutputLock(tmp_path):
                    time.sleep(1.5)
                os._exit(0)
            except UserError:
                os._exit(3)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(codes) == [0] + [3] * 7
