"""Compares TRL's DPOTrainer and RewardTrainer with Silva's trainer.

    python -m benchmarks.vs_trl [DATA ...] [--tokenizer FOLDER]     DATA is path:format[:field=column,...]

Both have the same weights, comparisons, batches and learning rate. Always measured are synthetic trees with
UltraInteract's statistics (all of it, and its interactive lines alone) and synthetic pairs that share only a short
prompt; DATA adds data sets of yours, read with `--tokenizer`.

Both run in one process, in float32, with one thread pool. Silva runs its recipe path (`Trainer.train_step` over its
own packed batches, packing included). TRL gets the token ids and the scored positions of the very same comparisons, in
the same order, through its `data_collator`, which pads on the right as TRL's own collators do. Both have the reference
log-probs of DPO computed beforehand, which is not timed; neither recomputes activations. A repetition runs the same
steps with one, then with the other; the first step of each is not counted.

TRL runs at its best on a CPU. Of several micro-batch sizes the fastest is taken. Without Triton, TRL's output matrix
goes over every position, prompts and padding too; here it goes only over the scored ones, as on a GPU
(`--trl-as-shipped` leaves it as it is). TRL's `padding_free` is disabled in 1.16 ("temporarily unavailable"), so it
pads.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from silva.engine.parallel import groups

import datasets
import torch
import transformers

from benchmarks import common, ultrainteract
from benchmarks.trl_peer import Trl, score_labelled_only
from silva.engine.data.text.chat import ChatTokenizer
from silva.engine.errors import UserError
from silva.engine.recipe.schema import Parallel, Recipe, Source
from silva.engine.training.trainer import Trainer

# largest difference of losses; both compute in float32, and AdamW amplifies rounding from step to step
CLOSE = 1e-4
OBJECTIVES = ("dpo", "bt")


@dataclass(frozen=True)
class Case:
    """Describes one data set.

    Attributes:
        name: of the data set.
        source: where its rows are.
        tokenizer: its folder; None: that of the synthetic data.
        vocabulary: number of token ids.
    """

    name: str
    source: Source
    tokenizer: Path | None
    vocabulary: int


@dataclass(frozen=True)
class Result:
    """Holds what was measured of one data set and objective.

    Attributes:
        parameters: of the model.
        silva: seconds per comparison of each repetition.
        trl: seconds per comparison of each repetition.
        micro_batch: the size that TRL is fastest with.
        loss_difference: the largest one between the losses of the first repetition.
        pair_tokens: tokens of the timed steps, in two sequences per comparison.
        unique_tokens: tokens of the timed steps, in trees.
    """

    parameters: int
    silva: list[float]
    trl: list[float]
    micro_batch: int
    loss_difference: float
    pair_tokens: int
    unique_tokens: int


class Silva:
    """Runs the engine as a recipe does."""

    def __init__(self, case: Case, objective: str, model: Path, work: Path, options: argparse.Namespace):
        raw = {
            "output": str(work / "silva"),
            "objective": {"name": objective} | ({"beta": 0.1} if objective == "dpo" else {}),
            "model": {"path": str(model), "dtype": "float32"},
            "tokenizer": {"path": str(case.tokenizer or work / "tokenizer")}
            | ({"chat_template": options.chat_template} if case.tokenizer else {"append_eos": False}),
            "data": {
                "train": [case.source.model_dump()],
                "row_length": options.row_length,
                "too_long": "drop",
                "on_bad_row": "skip",
                "shuffle": False,
            },
            "training": {
                "global_batch": options.batch,
                "learning_rate": options.learning_rate,
                "schedule": "constant",
                "warmup": 0.0,
                "max_steps": options.steps + 1,
            },
        }
        self.trainer = Trainer(Recipe.model_validate(raw))
        if self.trainer.inputs.steps < options.steps + 1:
            raise UserError(
                f"{case.source.path}: {self.trainer.inputs.data.comparisons} comparisons are too few for "
                f"{options.steps + 1} steps of {options.batch}; lower --steps or --batch"
            )
        self.unique = 0

    def comparisons(self, count: int) -> Iterator[dict[str, list[int]]]:
        """Yield the first `count` comparisons in the order of the data, with the scored positions as a mask."""
        data = self.trainer.inputs.data
        for k in range(len(data)):
            group = data.group(k)
            sequences = [group.sequence(k) for k in range(len(group))]
            for pair in group.comparisons.tolist():
                if count == 0:
                    return
                count -= 1
                chosen, rejected = (sequences[side] for side in pair)
                yield {
                    "chosen_ids": chosen.tokens.tolist(),
                    "rejected_ids": rejected.tokens.tolist(),
                    "chosen_mask": chosen.scored.astype(int).tolist(),
                    "rejected_mask": rejected.scored.astype(int).tolist(),
                }

    def run(self, steps: int) -> tuple[list[float], list[float]]:
        """Train for some steps.

        Returns:
            (losses, seconds of the steps after the first), packing included.
        """
        losses, ends = [], []
        self.unique = 0
        for step, batch in self.trainer.inputs.batches.prefetch(0, steps):
            losses.append(self.trainer.train_step(step, batch)["loss"])
            ends.append(time.perf_counter())
            # the first step is not timed
            self.unique += batch.unique if step else 0
        return losses, common.between(ends)


def measure(case: Case, objective: str, work: Path, options: argparse.Namespace) -> Result:
    """Check the losses, then time both in turns.

    Raises:
        SystemExit: the losses differ by more than CLOSE.
    """
    model = work / "model"
    size = {"vocabulary": case.vocabulary, "hidden": options.hidden, "layers": options.layers}
    parameters = common.save_model(model, reward=objective == "bt", **size)
    ultrainteract.save_tokenizer(work / "tokenizer", case.vocabulary)
    silva = Silva(case, objective, model, work, options)
    steps = options.steps + 1
    pairs = datasets.Dataset.from_list(list(silva.comparisons(options.batch * steps)))
    # no warm-up is needed: TRL's pass over the reference policy has been one
    tried = {size: Trl(objective, pairs, size, model, work, options) for size in options.micro_batches}
    micro_batch = min(tried, key=lambda size: _seconds_of_a_step(tried[size]))
    # a fresh one is needed, because the trials have changed the weights
    peer = Trl(objective, pairs, micro_batch, model, work, options)
    seconds: dict[str, list[float]] = {"silva": [], "trl": []}
    apart = 0.0
    for repetition in range(options.repeats):
        theirs, their_seconds = peer.run(steps)
        ours, our_seconds = silva.run(steps)
        if repetition == 0:
            apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
            if not apart < CLOSE:
                raise SystemExit(f"{case.name}, {objective}: losses differ: silva {ours}, trl {theirs}")
        for name, values in (("silva", our_seconds), ("trl", their_seconds)):
            seconds[name].append(sum(values) / len(values) / options.batch)
    timed = pairs.select(range(options.batch, len(pairs)))
    tokens = sum(len(row) for name in ("chosen_ids", "rejected_ids") for row in timed[name])
    return Result(parameters, seconds["silva"], seconds["trl"], micro_batch, apart, tokens, silva.unique)


def _seconds_of_a_step(peer: Trl) -> float:
    began = time.perf_counter()
    peer.run(1)
    return time.perf_counter() - began


def cases(options: argparse.Namespace, work: Path) -> list[Case]:
    """Return the synthetic data sets and those of the command line.

    Raises:
        UserError: data sets of text are given without a tokenizer.
    """
    needed = options.batch * (options.steps + 1)
    size: Any = {"scale": options.scale, "vocabulary": options.vocabulary}
    makers = {
        "ultrainteract": partial(ultrainteract.trees, **size),
        "interactive": partial(ultrainteract.trees, only="interactive", **size),
        "short_prompt": partial(ultrainteract.short_prompts, **size),
    }
    found = []
    for name, make in makers.items():
        if options.only is None or name in options.only:
            path = common.write_rows(
                work / f"{name}.jsonl", ultrainteract.rows(ultrainteract.enough(make, needed))
            )
            source = Source(path=str(path), format="ultrainteract_pair")
            found.append(Case(name, source, None, options.vocabulary))
    if options.data and options.tokenizer is None:
        raise UserError("data sets of text need --tokenizer FOLDER")
    for text in options.data:
        given = common.source(text, limit=options.limit)
        size = ChatTokenizer.load(str(options.tokenizer), chat_template=options.chat_template).vocab_size
        name = common.label(text, [case.name for case in found])
        found.append(Case(name, given, options.tokenizer, size))
    return found


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="*", metavar="DATA")
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--chat-template", default="eurus")
    parser.add_argument("--only", nargs="*", help="of the synthetic data sets; none named: none")
    parser.add_argument("--objectives", nargs="*", default=list(OBJECTIVES), choices=OBJECTIVES)
    parser.add_argument("--limit", type=int, help="rows read of each DATA")
    parser.add_argument("--batch", type=int, default=8, help="comparisons per step")
    parser.add_argument("--steps", type=int, default=2, help="timed steps per repetition")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--micro-batches", type=int, nargs="*", default=[1, 4], help="TRL's; the best is taken"
    )
    parser.add_argument("--row-length", type=int, default=8192)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096, help="of the synthetic data")
    parser.add_argument("--scale", type=float, default=1.0, help="of the synthetic lengths")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--trl-as-shipped", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and short texts, seconds")
    options = parser.parse_args()
    if options.smoke:
        options.hidden, options.layers, options.scale, options.vocabulary = 32, 2, 0.05, 512
        options.batch, options.steps, options.repeats, options.micro_batches = 4, 1, 1, [1, 4]
        options.row_length = 1024
    try:
        report(options)
    except UserError as error:
        parser.exit(2, f"vs_trl: error: {error}\n")


def report(options: argparse.Namespace) -> None:
    """Run every case and print the results."""
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"
    # transformers and torch warn about functions of their own that they rename
    warnings.simplefilter("ignore", FutureWarning)
    if not options.trl_as_shipped:
        score_labelled_only()
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        found: dict[tuple[str, str], Result] = {}
        for case in cases(options, work):
            for objective in options.objectives:
                place = work / f"{case.name}-{objective}"
                groups.initialize(Parallel())
                try:
                    found[case.name, objective] = measure(case, objective, place, options)
                finally:
                    groups.shutdown()
    lines = [
        (
            *key,
            r.parameters,
            statistics.median(r.trl),
            statistics.median(r.silva),
            common.ratio(r.trl, r.silva),
            r.pair_tokens / r.unique_tokens,
            r.micro_batch,
            r.loss_difference,
        )
        for key, r in found.items()
    ]
    names = (
        "data",
        "objective",
        "parameters",
        "TRL s/comparison",
        "Silva",
        "ratio",
        "tokens/unique",
        "TRL batch",
        "loss diff",
    )
    common.show("seconds per comparison, medians", names, lines)
    common.finish(
        common.environment(
            hidden=options.hidden,
            layers=options.layers,
            global_batch=options.batch,
            row_length=options.row_length,
        )
        | {
            f"{name}_{objective}_ratio": common.ratio(r.trl, r.silva)
            for (name, objective), r in found.items()
        }
        | {"max_loss_diff": max(r.loss_difference for r in found.values())}
    )


if __name__ == "__main__":
    main()
