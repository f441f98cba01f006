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

if __name__ == "__main__":
    # so that a plan is the same on a machine that has GPUs
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from silva.engine.parallel.forked import isolated

from rich.console import Console

from silva.engine.cli import run
from silva.engine.errors import UserError
from silva.engine.planning import built, report
from silva.engine.planning.hardware import GPUS
from silva.engine.planning.named_models import NAMED, resolve
from silva.engine.planning.predict import Setting, build_stages, predict
from silva.engine.planning.search import measure_layers, search, smallest_cluster
from silva.engine.planning.workload import Workload, assumed, of_data
from silva.engine.recipe.file import packaged
from silva.engine.recipe.loading import load
from silva.engine.recipe.schema import Recipe

# columns of the tables where the output is no terminal
WIDTH = 150


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan that the command line asks for.

    Args:
        arguments: of the command line; None for those of this process.

    Returns:
        The exit code: 0, or 2 after one line that says what is wrong with the input.
    """
    options = _parser().parse_intermixed_args(arguments)
    return run(lambda: plan(options))


def plan(options: argparse.Namespace) -> None:
    """Print a prediction, a search or a dry run; the last line holds `key=value` pairs.

    Args:
        options: the parsed command line.

    Raises:
        UserError: recipe, shape, data or rank are unusable.
    """
    console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    recipe = load(options.recipe, options.override)
    shape, source = resolve(options.shape, recipe.model.path)
    layout = recipe.parallel
    gpus = options.gpus or layout.tensor * layout.pipeline * layout.context
    setting = Setting(recipe, shape, _workload(recipe, options), GPUS[options.gpu], gpus)
    report.show_setting(console, setting, source)
    if options.rank is not None:
        _dry_run(console, setting, options.rank)
    elif options.search:
        _search(console, setting, options.top)
    else:
        job = setting.job(recipe.parallel)
        prediction = predict(setting, job, build_stages(job))
        report.show_prediction(console, setting, prediction)
        report.show_assumptions(console, setting)
        print(report.closing_line(prediction))


def _workload(recipe: Recipe, options: argparse.Namespace) -> Workload:
    if options.data:
        return of_data(recipe, options.data)
    return assumed(recipe, length=options.sequence_length, ratio=options.data_ratio)


def _search(console: Console, setting: Setting, top: int) -> None:
    print("building layers in every way of splitting and recomputing them, about a minute", file=sys.stderr)
    probes = measure_layers(setting)
    found = search(setting, probes, top)
    if not found:
        count = smallest_cluster(setting, probes)
        console.print(f"no layout fits {setting.gpus} x {setting.gpu.name}")
        if count:
            console.print(f"  - the fewest GPUs on which one does: {count}")
        report.show_assumptions(console, setting)
        print(f"fits=false fewest_gpus={count or 'none'}")
        return
    report.show_search(console, setting, found)
    report.show_assumptions(console, setting)
    best = report.describe_layout(found[0], setting.recipe)
    print(f"{report.closing_line(found[0])} {best}")


def _dry_run(console: Console, setting: Setting, rank: int) -> None:
    if not 0 <= rank < setting.gpus:
        raise UserError(
            f"--dry-run: found rank {rank}; allowed: 0 to {setting.gpus - 1}, or more with --gpus"
        )
    job = setting.job(setting.recipe.parallel)
    stage = isolated(built.measure, job, rank)
    report.show_rank(console, job, rank, stage)
    parameters = sum(chunk.parameters for chunk in stage.chunks)
    print(f"rank={rank} parameters={parameters} forward=ok backward=ok")


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
        "--shape", help=f"a folder with a config.json, or one of: {', '.join(NAMED)}; default: model.path"
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
