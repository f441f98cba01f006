"""Runs the whole path on a laptop, from preference trees to exported models.

`python -m silva.recipes.mini.demo` makes a tokenizer and a small Llama from the shipped trees, and then trains it with
SFT, with NCA on top of that (with its reference log-probs), and as a reward model with BT + DR. Everything is seeded,
and an earlier demo's folder is replaced.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from silva.engine.cli import run
from silva.engine.errors import UserError

# torch takes seconds to import: a mistake on the command line is told before
if TYPE_CHECKING:
    from silva.engine.training.trainer import Summary

DATA = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code: 0, or 2 after one line that says what is wrong."""
    parser = argparse.ArgumentParser(prog="silva.recipes.mini.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/mini"), help="folder of everything it makes")
    parser.add_argument("override", nargs="*", help="key.path=value, given to all three recipes")
    options = parser.parse_args(arguments)
    return run(lambda: demo(options.out, options.override))


def demo(out: Path, overrides: Sequence[str] = ()) -> None:
    """Make the model, train it three times, and print the results.

    Args:
        out: folder of everything that is made.
        overrides: `key.path=value`, given to all three recipes.

    Raises:
        UserError: `out` exists and is not an earlier demo's.
    """
    from silva.engine.recipe.loading import load
    from silva.engine.training.trainer import train
    from silva.recipes.mini.make_model import make

    began = time.perf_counter()
    if out.exists() and any(out.iterdir()):
        if not (out / "start" / "config.json").is_file():
            raise UserError(f"{out}: exists and was not made by this demo; name another folder with --out")
        shutil.rmtree(out)
    print("== a tokenizer and a small Llama, made from the training trees")
    make(DATA, out / "start", seed=0)
    done: dict[str, Summary] = {}
    for name, start in (("sft", out / "start"), ("nca", out / "sft/export"), ("rm", out / "sft/export")):
        print(f"\n== mini-{name}")
        own = [f"model.path={start}", f"output={out / name}"]
        done[name] = train(load(f"mini-{name}", [*own, *overrides]))
    seconds = time.perf_counter() - began
    _show(done, seconds)


def _show(done: dict[str, Summary], seconds: float) -> None:
    table = Table(title="held-out trees, before and after", title_justify="left")
    table.add_column("run")
    for column in ("loss before", "after", "reward chosen", "rejected", "accuracy", "tokens shared"):
        table.add_column(column, justify="right")
    for name, summary in done.items():
        after = summary.after
        rewards = [
            f"{after[key]:.3f}" if key in after else "-"
            for key in ("reward_chosen", "reward_rejected", "reward_accuracy")
        ]
        shared = 1 - summary.unique_tokens / summary.unrolled_tokens
        table.add_row(
            name, f"{summary.before['loss']:.3f}", f"{after['loss']:.3f}", *rewards, f"{shared:.0%}"
        )
    Console().print(table)
    for name, summary in done.items():
        print(f"{name:<4} {summary.export}")
    trees = [done["nca"], done["rm"]]
    ratio = sum(s.unique_tokens for s in trees) / sum(s.unrolled_tokens for s in trees)
    print(f"sft_loss_before={done['sft'].before['loss']:.4f}")
    print(f"sft_loss_after={done['sft'].after['loss']:.4f}")
    print(f"nca_accuracy={done['nca'].after['reward_accuracy']:.4f}")
    print(f"rm_accuracy={done['rm'].after['reward_accuracy']:.4f}")
    print(f"unique_over_unrolled={ratio:.4f}")
    print(f"seconds={seconds:.0f}")


if __name__ == "__main__":
    sys.exit(main())
