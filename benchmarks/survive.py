"""Kills runs at random moments, starts them again, and compares their losses with those of undisturbed runs.

    python -m benchmarks.survive [--kills 100] [--seed 0]

One process, two data-parallel ones, and two tensor-parallel ones in each of two pipeline stages, on the CPU. A kill is
SIGKILL to a rank, SIGTERM to a rank (which saves and stops), SIGSTOP to a rank of several (which the others find), or
SIGKILL to torchrun's agent. It comes at any time from the first import to the export; SIGSTOP, once the ranks have met.
A run that is not over a minute and a half after its kill is stuck.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks import common
from silva.engine.recipe.file import to_yaml
from silva.engine.training import output_lock
from silva.recipes.mini.demo import DATA
from silva.recipes.mini.make_model import make

# seconds in which a killed run has to end; torchrun takes 30 to kill a process that is stopped
PATIENCE = 90.0
# minutes after which a stopped process is found
HANG_MINUTES = 0.1
STEPS = 60


@dataclass(frozen=True)
class Mode:
    """Describes a layout.

    Attributes:
        name: of the layout.
        processes: their number.
        parallel: the recipe's section.
    """

    name: str
    processes: int
    parallel: dict[str, int]


MODES = (
    Mode("one process", 1, {}),
    Mode("data parallel", 2, {}),
    Mode("tensor x pipeline", 4, {"tensor": 2, "pipeline": 2}),
)
SIGNALS = {
    "kill a rank": signal.SIGKILL,
    "terminate a rank": signal.SIGTERM,
    "stop a rank": signal.SIGSTOP,
    "kill the agent": signal.SIGKILL,
}
# of a run in one process, which nobody would find if it were stopped
ALONE = ("kill a rank", "terminate a rank")


class Job:
    """Runs a recipe as a user does, in processes of its own."""

    def __init__(self, mode: Mode, recipe: Path, log: Path) -> None:
        command = [sys.executable]
        if mode.processes > 1:
            command += [
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(mode.processes),
            ]
        command += ["-m", "silva.engine.train", str(recipe)]
        self.log = log.open("w+", encoding="utf-8")
        self.process = subprocess.Popen(
            command,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def ranks(self) -> list[psutil.Process]:
        """Return the processes of the ranks: the program itself, or the agent's children."""
        try:
            own = psutil.Process(self.process.pid)
            children = [
                child for child in own.children() if "silva.engine.train" in " ".join(child.cmdline())
            ]
        except psutil.NoSuchProcess:
            return []
        return children or [own]

    def everything(self) -> list[psutil.Process]:
        """Return every process that belongs to the job and lives, orphans included."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return found

    def over(self, seconds: float) -> bool:
        """Wait for the end of every process, and return whether it came in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.process.poll()
            if not self.everything():
                self.process.wait()
                return True
            time.sleep(0.1)
        for process in self.everything():
            process.kill()
        return False

    def said(self) -> str:
        """Return what the job has printed."""
        self.log.flush()
        self.log.seek(0)
        return self.log.read()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the kills and print what came of them.

    Returns:
        The exit code: 1 if a run was stuck, lost more than it may, or has other losses.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.survive", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    names = [mode.name for mode in MODES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="layouts")
    options = parser.parse_args(arguments)
    modes = [mode for mode in MODES if mode.name in options.only]
    chance = random.Random(options.seed)
    total: dict[str, int] = dict.fromkeys(("kills", "resumed", "lost_steps", "different_losses", "stuck"), 0)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        start = make(DATA, work / "start", seed=0)
        for place, mode in enumerate(modes):
            kills = options.kills // len(modes) + (place < options.kills % len(modes))
            found = survive(mode, start, work / str(place), kills, chance)
            rows.append((mode.name, *found.values()))
            total = {key: total[key] + value for key, value in found.items()}
    common.show("killed and started again", ("layout", *(key.replace("_", " ") for key in total)), rows)
    common.finish(total)
    return int(bool(total["different_losses"] or total["stuck"]))


def survive(mode: Mode, start: Path, work: Path, kills: int, chance: random.Random) -> dict[str, int]:
    """Kill runs of one layout, and compare each, once it is over, with an undisturbed one.

    Args:
        mode: the layout.
        start: the checkpoint that is trained.
        work: an empty folder.
        kills: how many.
        chance: draws moments and kinds.

    Returns:
        The figures that `main` sums up.
    """
    work.mkdir()
    began = time.monotonic()
    whole = Job(mode, _recipe(mode, start, work, "whole"), work / "whole.log")
    if not whole.over(600) or whole.process.returncode:
        raise SystemExit(f"the undisturbed run failed: {whole.said()[-2000:]}")
    seconds, expected = time.monotonic() - began, _losses(work / "whole")
    found = {"kills": 0, "resumed": 0, "lost_steps": 0, "different_losses": 0, "stuck": 0}
    number = 0
    while found["kills"] < kills:
        number += 1
        recipe, output = _recipe(mode, start, work, f"run-{number}"), work / f"run-{number}"
        while True:
            before = len(_losses(output))
            job = Job(mode, recipe, work / f"run-{number}.log")
            disturbed, moment, kind = found["kills"] < kills, chance.uniform(0, seconds), ""
            if disturbed:
                time.sleep(moment)
                kind = chance.choice(list(SIGNALS) if mode.processes > 1 else ALONE)
                if kind == "stop a rank":
                    _wait_for_lock(job, output)
                _kill(job, kind, chance)
                found["kills"] += job.process.poll() != 0
            if not job.over(PATIENCE if disturbed else 600):
                found["stuck"] += 1
                print(
                    f"stuck: {mode.name}, {kind} after {moment:.1f} of {seconds:.1f} s\n{job.said()[-1500:]}"
                )
            resumed = re.search(r"resuming   at step (\d+)", job.said())
            if resumed:
                found["resumed"] += 1
                found["lost_steps"] += max(0, before - int(resumed[1]))
            if job.process.returncode == 0:
                break
            if not disturbed:
                raise SystemExit(f"a run that was not killed failed: {job.said()[-2000:]}")
        found["different_losses"] += sum(a != b for a, b in zip(_losses(output), expected, strict=True))
    return found


def _wait_for_lock(job: Job, output: Path) -> None:
    """Wait until the ranks have met, after which the folder's lock is taken, or the job is over."""
    while job.process.poll() is None and not (output / output_lock.NAME).exists():
        time.sleep(0.05)


def _kill(job: Job, kind: str, chance: random.Random) -> None:
    if kind == "stop a rank" and " export=" in job.said():
        # a process that only has to end is no rank any more
        return
    try:
        target = psutil.Process(job.process.pid)
        if kind != "kill the agent":
            target = chance.choice(job.ranks() or [target])
        target.send_signal(SIGNALS[kind])
    except psutil.NoSuchProcess:
        # it was over before the moment came
        return


def _recipe(mode: Mode, start: Path, work: Path, name: str) -> Path:
    rows = DATA / "pair.jsonl.gz"
    raw: dict[str, Any] = {
        "output": str(work / name),
        "objective": {"name": "nca"},
        "model": {"path": str(start), "dtype": "float32"},
        "data": {
            "train": [{"path": str(rows), "format": "ultrainteract_pair", "limit": 60}],
            "row_length": 1024,
            "workers": 1,
        },
        "training": {
            "global_batch": 4,
            "max_steps": STEPS,
            "epochs": 99,
            "learning_rate": 1e-4,
            "save_every": 5,
            "hang_minutes": HANG_MINUTES,
        },
        "parallel": mode.parallel,
    }
    file = work / f"{name}.yaml"
    file.write_text(to_yaml(raw), encoding="utf-8")
    return file


def _losses(output: Path) -> list[float]:
    """Return the losses of the steps that a run has taken; a line that a kill has torn is none."""
    file, found = output / "metrics.jsonl", []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["kind"] == "train":
            found.append(entry["loss"])
    return found


if __name__ == "__main__":
    sys.exit(main())
