"""Runs the planner's command: a prediction, a search, or one rank's dry run."""

from __future__ import annotations

import argparse
import sys

from silva.engine.parallel.forked import isolated

from rich.console import Console

from silva.engine.errors import UserError
from silva.engine.planning import built, report
from silva.engine.planning.hardware import GPUS
from silva.engine.planning.named_models import resolve
from silva.engine.planning.predict import Setting, build_stages, predict
from silva.engine.planning.search import measure_layers, search, smallest_cluster
from silva.engine.planning.workload import Workload, assumed, of_data
from silva.engine.recipe.loading import load
from silva.engine.recipe.schema import Recipe

# columns of the tables where the output is no terminal
WIDTH = 150


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
