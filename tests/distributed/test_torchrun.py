"""The command of the README, as a user types it."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
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


KILLED_ONCE = """
import os, signal, sys
from pathlib import Path
import contextlib
from silva.engine import cli
from silva.engine.recipe.loading import load
from silva.engine.training import trainer

@contextlib.contextmanager
def killed(running, number, batch):
    if number == 2 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    yield

def work():
    trainer.train(load(sys.argv[1]), around=killed)

sys.exit(cli.run(work))
"""


@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_starts_a_run_again_whose_rank_was_killed(nodes, tmp_path):
    """One agent, or two that meet on loopback, as on two nodes; the losses are those of an undisturbed run."""
    model = tiny.checkpoint(tmp_path / "model")
    rows = tiny.write(tmp_path / "pairs.jsonl", tiny.rows("pair", 6))
    settings = {"training": {"global_batch": 6, "max_steps": 4, "epochs": 9, "save_every": 1}}
    file, program = tmp_path / "recipe.yaml", tmp_path / "program.py"
    file.write_text(tiny.recipe("nca", model, rows, tmp_path / "two", **settings).dump())
    program.write_text(KILLED_ONCE)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "2", "--nnodes", str(nodes)]
    torchrun += ["--nproc-per-node", str(2 // nodes), "--rdzv-backend", "c10d", "--rdzv-id", "test"]
    torchrun += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    agents = [
        subprocess.Popen(
            [*torchrun, str(program), str(file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for _ in range(nodes)
    ]
    said = [agent.communicate(timeout=240)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0] * nodes, said[0][-3000:]
    assert not any("FutureWarning" in each for each in said)
    # the checkpoint of the step before may have been in the writing
    assert any(re.search("resuming   at step [12] of 4", each) for each in said), said[0][-3000:]
    world(1, run, tiny.recipe("nca", model, rows, tmp_path / "one", **settings))
    for ours, expected in zip(tiny.history(tmp_path / "two"), tiny.history(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-5)  # float32 sums in another order


ORPHANED = """
import contextlib, os, sys, time
from pathlib import Path
from silva.engine import cli
from silva.engine.recipe.loading import load
from silva.engine.training import trainer

@contextlib.contextmanager
def slow(running, number, batch):
    Path(sys.argv[2], os.environ["RANK"]).write_text(str(os.getpid()))
    time.sleep(600)
    yield

sys.exit(cli.run(lambda: print(trainer.train(load(sys.argv[1]), around=slow))))
"""


def test_processes_end_with_their_agent(tmp_path):
    model = tiny.checkpoint(tmp_path / "model")
    rows = tiny.write(tmp_path / "pairs.jsonl", tiny.rows("pair", 6))
    file, program, pids = tmp_path / "recipe.yaml", tmp_path / "program.py", tmp_path / "pids"
    file.write_text(tiny.recipe("nca", model, rows, tmp_path / "run").dump())
    program.write_text(ORPHANED)
    pids.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    agent = subprocess.Popen(
        [*torchrun, str(program), str(file), str(pids)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        found = _until(lambda: sorted(int(path.read_text() or 0) for path in pids.iterdir()), 120, size=2)
        assert all(map(_lives, found))
    finally:
        agent.kill()
        agent.wait()
    _until(lambda: [pid for pid in found if not _lives(pid)], 10, size=2)


def _until(ask, seconds, *, size):
    """What `ask` returns once it has `size` entries that are not 0."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = ask()
        if len(found) == size and all(found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"still {found} after {seconds} seconds")


def _lives(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_processes_end_with_their_agent_before_they_have_met(tmp_path):
    """They are importing torch: without an agent, they would look for its store for minutes."""
    model = tiny.checkpoint(tmp_path / "model")
    rows = tiny.write(tmp_path / "pairs.jsonl", tiny.rows("pair", 6))
    file = tmp_path / "recipe.yaml"
    file.write_text(tiny.recipe("nca", model, rows, tmp_path / "run").dump())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    agent = subprocess.Popen(
        [*torchrun, "-m", "silva.engine.train", str(file)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        own = psutil.Process(agent.pid)
        found = _until(lambda: [child.pid for child in own.children()], 120, size=2)
        # long enough for the first line of the program, and too short for the last of its imports
        time.sleep(1)
        assert all(map(_lives, found))
        assert not (tmp_path / "run").exists()
    finally:
        agent.kill()
        agent.wait()
    _until(lambda: [pid for pid in found if not _lives(pid)], 3, size=2)
