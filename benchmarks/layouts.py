"""Compares every layout with one process: how far its numbers are, how long a step takes, and what it sends.

    python -m benchmarks.layouts [--smoke] [--only NAME ...]

Every layout takes the same three steps of the engine's own training, on synthetic trees and a random model in float32,
on worlds of gloo processes that share this machine's cores. So the seconds tell what a layout adds here, not how it
would scale. The vocabulary is odd, so that tensor parallelism pads it.

- difference: for losses and gradient norms, the largest relative difference over the steps; for the exported weights,
  the norm of the difference over the norm of the weights. More than TOLERANCE is an error.
- sent: bytes of the last step, of the rank that sends most, by kind of collective. Every operation of
  torch.distributed's process groups is counted, whoever calls it, as what a ring over n ranks sends for it:
  all-reduce 2 (n - 1) / n of the tensor, all-gather and reduce-scatter (n - 1) / n of the whole, broadcast
  (n - 1) / n, a send all of it. Receiving is not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from silva.engine.parallel.forked import world

import numpy as np
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import common, ultrainteract
from silva.engine.objectives import OBJECTIVES
from silva.engine.recipe.schema import Recipe
from silva.engine.training import trainer

# float32 sums are taken in another order, over three optimizer steps
TOLERANCE = 1e-5
STEPS = 3
VPP = {"pipeline": 2, "virtual_pipeline": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor": 2}),
    "tp2 sp": (2, {"tensor": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline": 2}),
    "pp2 uneven": (2, {"pipeline": 2, "stage_layers": [3, 1]}),
    "pp2 recomputed": (2, {"pipeline": 2, "recompute": "full"}),
    "pp4": (4, {"pipeline": 4}),
    "vpp": (2, VPP),
    "vpp uneven": (2, VPP | {"stage_layers": [1, 2, 1, 0]}),
    "cp2": (2, {"context": 2}),
    "cp2 recomputed": (2, {"context": 2, "recompute": "selective"}),
    "cp4": (4, {"context": 4}),
    "cp2 x tp2": (4, {"context": 2, "tensor": 2}),
    "cp2 x tp2 sp": (4, {"context": 2, "tensor": 2, "sequence_parallel": True}),
    "cp2 x pp2": (4, {"context": 2, "pipeline": 2}),
    "cp2 x dp2": (4, {"context": 2}),
    "dp2 plain": (2, {"distributed_optimizer": False}),
    "dp2": (2, {}),
    "dp2 overlapped": (2, {"overlap": True}),
    "tp2 x pp2": (4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}),
    "vpp x dp2 overlapped": (4, VPP | {"overlap": True}),
    "tp2 x pp2 x dp2": (8, {"tensor": 2, "pipeline": 2, "sequence_parallel": True, "recompute": "full"}),
}
SMOKE = ("tp2 sp", "pp2 uneven", "cp2", "dp2 plain", "dp2")
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "broadcast", "send")


class Run(NamedTuple):
    """Holds what one layout's run leaves behind.

    Attributes:
        history: the metrics of each step.
        weights: the exported weights.
        sent: bytes of the last step, of the rank that sends most, by kind of collective.
    """

    history: list[dict[str, float]]
    weights: dict[str, Tensor]
    sent: Counter[str]


# ---------------------------------------------------------------- what is sent


def _bytes(tensors: Any) -> int:
    """Return the bytes of a tensor, or of tensors in lists in lists."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(each) for each in tensors) if isinstance(tensors, list | tuple) else 0


def _twice(ranks: int) -> float:
    return 2 * (ranks - 1) / ranks


def _once(ranks: int) -> float:
    return (ranks - 1) / ranks


# For each method of a process group: its kind, how often one of n ranks sends the whole, and which argument that is.
# Releases of torch name the methods differently.
OPERATIONS: dict[str, tuple[str, Callable[[int], float], int]] = {
    "allreduce": ("all-reduce", _twice, 0),
    "allreduce_coalesced": ("all-reduce", _twice, 0),
    "allgather": ("all-gather", _once, 0),
    "_allgather_base": ("all-gather", _once, 0),
    "all_gather_single": ("all-gather", _once, 0),
    "all_gather_single_coalesced": ("all-gather", _once, 0),
    "allgather_into_tensor_coalesced": ("all-gather", _once, 0),
    "reduce_scatter": ("reduce-scatter", _once, 1),
    "_reduce_scatter_base": ("reduce-scatter", _once, 1),
    "reduce_scatter_single": ("reduce-scatter", _once, 1),
    "reduce_scatter_single_coalesced": ("reduce-scatter", _once, 1),
    "reduce_scatter_tensor_coalesced": ("reduce-scatter", _once, 1),
    "broadcast": ("broadcast", _once, 0),
    "send": ("send", lambda ranks: 1.0, 0),
}


def count_sent(sent: Counter[str]) -> None:
    """Add every operation of this process's groups to `sent` from now on, one of no known kind as "other"."""

    def counted(name: str) -> Callable[..., Any]:
        kind, share, whole = OPERATIONS.get(name, ("other", lambda ranks: 1.0, 0))
        operation = getattr(dist.ProcessGroup, name)

        def call(group: Any, *arguments: Any, **options: Any) -> Any:
            sent[kind] += round(share(group.size()) * _bytes(arguments[whole])) if arguments else 0
            return operation(group, *arguments, **options)

        return call

    words = ("gather", "reduce", "scatter", "broadcast", "send", "all_to_all", "alltoall")
    for name in dir(dist.ProcessGroup):
        if not name.startswith("__") and any(word in name for word in words):
            setattr(dist.ProcessGroup, name, counted(name))


# ---------------------------------------------------------------- running


def on_processes(size: int, recipe: Recipe) -> Counter[str]:
    """Train `recipe` on a gloo world of forked processes.

    Returns:
        The bytes of the last step, of the rank that sends most, by kind.

    Raises:
        SystemExit: a process failed.
    """
    try:
        found = world(size, _train, recipe, timeout=1800)
    except RuntimeError as error:
        raise SystemExit(str(error)) from None
    return max(found, key=lambda counter: counter.total())


def _train(recipe: Recipe) -> Counter[str]:
    """Make a whole run.

    Returns:
        The bytes that this process sends in its last step, by kind.
    """
    sent: Counter[str] = Counter()
    last: Counter[str] = Counter()
    count_sent(sent)

    @contextlib.contextmanager
    def counted(*unused: Any) -> Iterator[None]:
        sent.clear()
        yield
        last.clear()
        last.update(sent)

    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        trainer.train(recipe, around=counted)
    return last


def measure(size: int, recipe: Recipe) -> Run:
    """Train `recipe` and read what its run leaves behind.

    Raises:
        SystemExit: a process failed, or a step called a collective of a kind that is not counted.
    """
    sent = on_processes(size, recipe)
    if sent["other"]:
        raise SystemExit("a collective of a kind that is not counted was called in a step")
    output = Path(recipe.output)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    files = sorted((output / "export").glob("*.safetensors"))
    return Run(lines, {name: x for file in files for name, x in load_file(file).items()}, sent)


# ---------------------------------------------------------------- comparing


def differences(found: Run, alone: Run) -> tuple[float, float, float]:
    """Return the largest relative differences of losses and of gradient norms, and that of all weights together.

    Raises:
        SystemExit: the two have not run the same steps of the same model.
    """
    if found.weights.keys() != alone.weights.keys() or len(found.history) != len(alone.history):
        raise SystemExit("the layouts have not run the same steps of the same model")

    def largest(key: str) -> float:
        pairs = zip(found.history, alone.history, strict=True)
        return max(abs(ours[key] - theirs[key]) / abs(theirs[key]) for ours, theirs in pairs)

    def norm(tensors: Iterable[Tensor]) -> float:
        return float(np.sqrt(sum(float(x.double().square().sum()) for x in tensors)))

    apart = norm(found.weights[name] - x for name, x in alone.weights.items())
    return largest("loss"), largest("gradient_norm"), apart / norm(alone.weights.values())


def recipe_for(work: Path, options: argparse.Namespace, name: str, parallel: dict[str, Any]) -> Recipe:
    """Return the recipe of one layout."""
    # no other objective reads it
    absolute = options.objective == "bt_dr"
    source = {"path": str(work / "rows.jsonl"), "format": "ultrainteract_pair", "absolute": absolute}
    return Recipe.model_validate(
        {
            "output": str(work / "runs" / name.replace(" ", "-")),
            "objective": {"name": options.objective},
            "model": {"path": str(work / "model"), "dtype": "float32"},
            "tokenizer": {"path": str(work / "tokenizer")},
            "data": {
                "train": [source],
                "row_length": options.row_length,
                "too_long": "drop",
                "cache": str(work / "cache"),
            },
            # with an epsilon of 1e-8, Adam moves a weight whose gradient is only rounding error by the whole learning
            # rate, in the direction of the error
            "training": {
                "global_batch": options.comparisons,
                "learning_rate": 1e-3,
                "max_steps": STEPS,
                "warmup": 0.0,
                "epsilon": 1e-4,
            },
            "parallel": parallel,
        }
    )


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(LAYOUTS), metavar="NAME", help="these layouts")
    preferences = [name for name, row in OBJECTIVES.items() if row.pairwise]
    parser.add_argument("--objective", default="nca", choices=preferences)
    parser.add_argument("--comparisons", type=int, default=12, help="of a step")
    parser.add_argument("--row-length", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4, help="4, for the uneven layouts")
    parser.add_argument("--vocabulary", type=int, default=2047)
    parser.add_argument("--scale", type=float, default=0.15, help="of the trees' lengths")
    parser.add_argument("--smoke", action="store_true", help="five layouts of a tiny model, seconds")
    options = parser.parse_args()
    if options.smoke:
        options.hidden, options.vocabulary, options.scale = 64, 511, 0.05
        options.comparisons, options.row_length = 8, 512
        options.only = options.only or list(SMOKE)
    with tempfile.TemporaryDirectory() as folder:
        report(options, Path(folder))


def report(options: argparse.Namespace, work: Path) -> None:
    """Run every layout, compare it with one process, and print the results.

    Raises:
        SystemExit: a layout differs by more than TOLERANCE.
    """
    size = {"vocabulary": options.vocabulary, "hidden": options.hidden, "layers": options.layers}
    reward = OBJECTIVES[options.objective].head == "reward"
    parameters = common.save_model(work / "model", reward=reward, **size)
    ultrainteract.save_tokenizer(work / "tokenizer", options.vocabulary)
    needed = STEPS * options.comparisons
    trees = ultrainteract.enough(
        lambda count: ultrainteract.trees(count, vocabulary=options.vocabulary, scale=options.scale), needed
    )
    common.write_rows(work / "rows.jsonl", ultrainteract.rows(trees))

    alone = measure(1, recipe_for(work, options, "one process", {}))
    lines = [_line("one process", 1, (0.0, 0.0, 0.0), alone)]
    worst = {}
    for name in options.only or LAYOUTS:
        processes, parallel = LAYOUTS[name]
        found = measure(processes, recipe_for(work, options, name, parallel))
        apart = differences(found, alone)
        worst[name] = max(apart)
        lines.append(_line(name, processes, apart, found))
    columns = ["layout", "processes", "loss", "gradient norm", "weights", "s/step", *KINDS]
    title = f"relative difference to one process after {STEPS} steps; KB sent a step"
    common.show(title, columns, lines)
    common.finish(common.environment(parameters=parameters, objective=options.objective, **size))
    slug = {name: name.replace(" ", "_") for name in worst}
    common.finish({f"{slug[line[0]]}_seconds": line[5] for line in lines[1:]})
    common.finish({f"{slug[line[0]]}_kilobytes": sum(line[6:]) for line in lines[1:]})
    largest = max(worst.values())
    print(f"max_difference={largest:.3g} tolerance={TOLERANCE:g} layouts={len(worst)}")
    wrong = [f"{name} {difference:.3g}" for name, difference in worst.items() if not difference <= TOLERANCE]
    if wrong:
        raise SystemExit(f"not equal to one process: {', '.join(wrong)}")


def _line(name: str, processes: int, apart: tuple[float, float, float], run: Run) -> tuple[Any, ...]:
    # the first step warms up
    seconds = statistics.median(line["seconds"] for line in run.history[1:])
    return (name, processes, *apart, seconds, *(run.sent[kind] / 1e3 for kind in KINDS))


if __name__ == "__main__":
    main()
