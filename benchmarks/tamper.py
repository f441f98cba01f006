"""Damages or exchanges every file that a run reads, starts the run again, and looks at what comes of it.

    python -m benchmarks.tamper [--places 3] [--share 1.0] [--seed 0]

A small DPO run has stopped after two of four steps. Of every file in its folder (checkpoints, tokenized data,
log-probs of the reference, metrics, recipe) and of every input (weights as the model hub gave them, config, tokenizer,
chat template, rows, recipe) one bit is flipped, a part is cut off or overwritten with zeros, the whole is exchanged for
another file of its kind, or for a pickle or a template that would run a program. The run is started again in a process
of its own. It may refuse in one line, or say what it has repaired, or give the very weights of an undisturbed run; an
input without a digest may also be another input, if the run says so or is a new one. Anything else counts as loaded
silently.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import pickle
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from silva.engine.parallel import forked

import torch
from safetensors.torch import load_file

from benchmarks import common
from silva.engine.errors import UserError
from silva.engine.recipe.file import to_yaml
from silva.engine.recipe.loading import load
from silva.engine.training import trainer
from silva.recipes.mini.demo import DATA
from silva.recipes.mini.make_model import make

STEPS, STOP = 4, 2
FAULTS = ("silent", "traceback", "ran a program")
EXPLOIT = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% include '/etc/passwd' %}"


class Stop(Exception):
    """Ends a run between two steps, as a kill does."""


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Damage files, one at a time, and print what came of it.

    Returns:
        The exit code: 1 if damage was read silently, ended in a traceback, or ran a program.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tamper", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--places", type=int, default=3, help="of every file, for each kind of damage")
    parser.add_argument("--share", type=float, default=1.0, help="of all tries, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        recipe = prepare(work / "whole")
        other = prepare(work / "other", seed=1)
        expected = weights(again(work, recipe, lambda folder: None)[0])
        tries = [
            (file, kind, damage)
            for file in files(recipe.parent)
            for kind, damage in kinds(file, other.parent, work / "marker")
            for _ in range(1 if kind in ("swap", "foreign") else options.places)
        ]
        tries = [each for each in tries if chance.random() < options.share]
        found: dict[str, Counter[str]] = {}
        bad: list[str] = []
        for file, kind, damage in tries:
            relative = file.relative_to(recipe.parent)
            outcome, said = judge(work, recipe, relative, damage, expected, chance)
            if (work / "marker").exists():
                outcome = "ran a program"
                (work / "marker").unlink()
            found.setdefault(label(relative), Counter())[outcome] += 1
            if outcome in FAULTS:
                bad.append(f"{kind} of {relative}: {outcome}\n{said[-800:]}")
    columns = (
        "refused",
        "repaired, and said",
        "no difference",
        "another input",
        "silent",
        "traceback",
        "ran a program",
    )
    common.show(
        "files that were tampered with",
        ("file", *columns),
        [(name, *(counts[column] for column in columns)) for name, counts in sorted(found.items())],
    )
    for each in bad:
        print(each)
    total = sum(found.values(), Counter())
    common.finish(
        {
            "tried": total.total(),
            "refused": total["refused"],
            "loaded_silently": total["silent"],
            "tracebacks": total["traceback"],
            "code_executed": total["ran a program"],
        }
    )
    return int(bool(bad))


# ---------------------------------------------------------------- the run


def prepare(folder: Path, *, seed: int = 0) -> Path:
    """Make the inputs of a run in a folder, run it up to the step at which it stops, and return its recipe file."""
    make(DATA, folder / "made", seed=seed)
    # as the hub's client lays a model out: links to files that are named by their digests
    blobs, model = folder / "blobs", folder / "model"
    blobs.mkdir()
    model.mkdir()
    for file in sorted((folder / "made").iterdir()):
        if file.suffix == ".safetensors":
            name = hashlib.sha256(file.read_bytes()).hexdigest()
            file.rename(blobs / name)
            (model / file.name).symlink_to(Path("..") / "blobs" / name)
        else:
            file.rename(model / file.name)
    (folder / "made").rmdir()
    shutil.copy(DATA / "pair.jsonl.gz", folder / "pair.jsonl.gz")
    template = "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] }}{% endfor %}{% if seed %}{% endif %}"
    (folder / "template.jinja").write_text(template.replace("seed", str(seed)), encoding="utf-8")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        to_yaml(
            {
                "seed": seed,
                "output": "run",
                "objective": {"name": "dpo"},
                "model": {"path": "model", "dtype": "float32"},
                "tokenizer": {"chat_template": "template.jinja"},
                "data": {
                    "train": [{"path": "pair.jsonl.gz", "format": "ultrainteract_pair", "limit": 24}],
                    "row_length": 1024,
                    "workers": 1,
                },
                "training": {
                    "global_batch": 4,
                    "max_steps": STEPS,
                    "learning_rate": 1e-4,
                    "save_every": 1,
                    "async_save": False,
                },
                "export": {"verify": False},
            }
        ),
        encoding="utf-8",
    )
    with contextlib.suppress(Stop):
        in_process(folder, stop=True)
    return recipe


def in_process(folder: Path, *, stop: bool = False) -> str:
    """Start the run of a folder in a process of its own.

    Returns:
        What it has printed.

    Raises:
        UserError: the run has refused.
        RuntimeError: it has ended in a traceback.
    """
    log = folder.with_name(f"{folder.name}.log")
    log.write_text("")
    try:
        forked.isolated(_run, folder, log, stop)
    finally:
        said = log.read_text(encoding="utf-8", errors="replace")
    return said


def _run(folder: Path, log: Path, stop: bool) -> None:
    number = os.open(log, os.O_WRONLY)
    os.dup2(number, 1)
    os.dup2(number, 2)
    sys.stdout = sys.stderr = os.fdopen(number, "w", buffering=1)
    os.chdir(folder)

    @contextlib.contextmanager
    def around(running: Any, step: int, batch: Any) -> Iterator[None]:
        if step == STOP:
            raise Stop
        yield

    try:
        trainer.train(load("./recipe.yaml", []), around=around if stop else None)
    except Stop:
        return


def again(work: Path, recipe: Path, damage: Callable[[Path], None]) -> tuple[Path, str]:
    """Start a damaged copy of the run."""
    folder = work / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(recipe.parent, folder, symlinks=True)
    damage(folder)
    return folder, in_process(folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the exported model."""
    return load_file(folder / "run" / "export" / "model.safetensors")


# ---------------------------------------------------------------- the damage


def files(folder: Path) -> list[Path]:
    """List the files of a run and of its inputs; of the model's weights the one that the link leads to."""
    found = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sorted(path for path in found if path.suffix != ".lock" and "tensorboard" not in path.parts)


def label(relative: Path) -> str:
    """Name the kind of a file in the table."""
    parts = relative.parts
    if parts[:2] in (("run", "checkpoints"), ("run", "data"), ("run", "reference")):
        return f"run/{parts[1]}: {relative.suffix or relative.name}"
    return "weights" if parts[0] == "blobs" else str(relative)


def kinds(file: Path, other: Path, marker: Path) -> list[tuple[str, Callable[[Path, random.Random], None]]]:
    """List what can be done to a file; an empty one can only be exchanged.

    Args:
        file: of the run.
        other: the folder of another run, from which files of the same kind are taken.
        marker: is made by what is run.
    """
    twin = next(
        (
            path
            for path in files(other)
            if path.suffix == file.suffix and path.parent.name == file.parent.name and path.name == file.name
        ),
        next((path for path in files(other) if path.suffix == file.suffix), None),
    )

    def flip(path: Path, chance: random.Random) -> None:
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)

    def cut(path: Path, chance: random.Random) -> None:
        path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])

    def zero(path: Path, chance: random.Random) -> None:
        content = bytearray(path.read_bytes())
        begin = chance.randrange(len(content))
        end = min(begin + 64, len(content))
        content[begin:end] = bytes(end - begin)
        path.write_bytes(content)

    def swap(path: Path, chance: random.Random) -> None:
        assert twin is not None
        shutil.copyfile(twin, path)

    def foreign(path: Path, chance: random.Random) -> None:
        if path.suffix == ".jinja":
            path.write_text(EXPLOIT, encoding="utf-8")
        elif path.suffix == ".yaml":
            path.write_text(f"seed: !!python/object/apply:os.system ['touch {marker}']\n", encoding="utf-8")
        else:
            path.write_bytes(pickle.dumps(Payload(marker)))

    found: list[tuple[str, Callable[[Path, random.Random], None]]] = [("foreign", foreign)]
    if file.stat().st_size:
        found += [("flip", flip), ("truncate", cut), ("zero", zero)]
    if twin is not None and twin.read_bytes() != file.read_bytes():
        found.append(("swap", swap))
    return found


def judge(
    work: Path,
    recipe: Path,
    relative: Path,
    damage: Callable[[Path, random.Random], None],
    expected: dict[str, torch.Tensor],
    chance: random.Random,
) -> tuple[str, str]:
    """Damage one file, start the run, and say in a word what came of it, with what the run has said.

    Args:
        work: an empty place for the copy.
        recipe: of the whole run.
        relative: the file, in the run's folder.
        damage: what is done to it.
        expected: the weights of an undisturbed run.
        chance: draws places.
    """
    before = (recipe.parent / relative).read_bytes()

    def apply(folder: Path) -> None:
        while (folder / relative).read_bytes() == before:
            damage(folder / relative, chance)

    try:
        folder, said = again(work, recipe, apply)
    except UserError as error:
        return ("refused" if len(str(error)) < 1000 else "traceback"), str(error)
    except RuntimeError as error:
        return "traceback", str(error)
    found = weights(folder)
    same = found.keys() == expected.keys() and all(
        torch.equal(found[each], expected[each]) for each in expected
    )
    whole = [line["step"] for line in _metrics(folder)] == list(range(STEPS))
    if same and (whole or "damaged    " in said):
        return ("repaired, and said" if "damaged    " in said else "no difference"), said
    # a new run, of other inputs or settings, that has said so by its name
    return ("another input" if "resuming" not in said and relative.parts[0] != "run" else "silent"), said


def _metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


if __name__ == "__main__":
    sys.exit(main())
