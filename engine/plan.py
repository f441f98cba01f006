"""Predicts memory and time of a recipe on a cluster, or searches the best layout.

    python -m silva.engine.plan RECIPE [key.path=value ...] [--gpus N] [--gpu NAME] [--search]

No GPU is needed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from silva.engine.cli import run
from silva.engine.planning.hardware import GPUS
from silva.engine.recipe.file import packaged

if __name__ == "__main__":
    # so that a plan is the same on a machine that has GPUs
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan that the command line asks for.

    Args:
        arguments: of the command line; None for those of this process.

    Returns:
        The exit code: 0, or 2 after one line that says what is wrong with the input.
    """
    options = _parser().parse_intermixed_args(arguments)

    def work() -> None:
        # torch takes seconds to import: a mistake on the command line is told before
        from silva.engine.planning.command import plan

        plan(options)

    return run(work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="silva.engine.plan",
        description="Predict memory and time of a recipe on a cluster, or search the best layout; no GPU needed.",
    )
    parser.add_argument("recipe", help=f"a .yaml file, or one of: {', '.join(packaged())}")
    parser.add_argument("override", nargs="*", help="key.path=value, e.g. parallel.tensor=8")
    parser.add_argument(
        "--gpus", type=_count, help="GPUs of the whole job; default: as few as the layout takes"
    )
    parser.add_argument("--gpu", choices=[*GPUS], default="h100-80g", help="default: h100-80g")
    parser.add_argument(
        "--search", action="store_true", help="rank the layouts that fit, as recipe overrides"
    )
    parser.add_argument("--top", type=_count, default=5, help="layouts that --search shows; default: 5")
    parser.add_argument(
        "--dry-run", type=int, metavar="RANK", dest="rank", help="build and step this rank alone, shapes only"
    )
    parser.add_argument(
        "--shape",
        help="a folder with a config.json, or a known model, such as mistral-7b; default: model.path",
    )
    parser.add_argument(
        "--data", type=Path, help="a run's data cache: takes lengths and sharing from its trees"
    )
    parser.add_argument("--sequence-length", type=_count, help="without --data: mean tokens of a sequence")
    parser.add_argument(
        "--data-ratio",
        type=_ratio,
        help="without --data: unique over unrolled tokens; default: 1, no sharing",
    )
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def _ratio(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
