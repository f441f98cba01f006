"""Compares packed trees with packed but unrolled sequences and with one padded pair at a time.

    python -m benchmarks.tree_step [DATA --format F --tokenizer FOLDER]

All three hold the same comparisons. Without DATA these are synthetic trees with UltraInteract's statistics (its
interactive lines). The model, its weights and the code that runs them are the same for all three:

- tree: rows are as the engine packs them;
- unrolled: every sequence is a document of its own; the sequences of as many comparisons of a tree as fit are in one
  row, each once, and rows are filled first-fit decreasing;
- pairs: there is one row per comparison, with its two sequences and padding to twice the longer one.

Losses and gradients are compared first, in float64. Then a forward and a backward pass over all rows is timed in
float32, in turns. Operations are counted by `silva.engine.model.flops.computed`: 6 for a weight and token; 14 x head
size per head for a visible pair of tokens (the backward pass computes scores again); 8 for a weight of the output
matrix and scored position (the backward pass computes logits again).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from silva.engine.parallel import groups, optimizer

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import common, ultrainteract
from silva.engine.data.dataset import DataSet
from silva.engine.data.loader import BatchLoader
from silva.engine.data.text.chat import ChatTokenizer
from silva.engine.data.trees.group import ABSENT, TokenGroup
from silva.engine.data.trees.packing import Piece, TreeBatch, pack_row
from silva.engine.data.trees.tree import merge
from silva.engine.errors import UserError
from silva.engine.model import flops, gpt, hf
from silva.engine.objectives import OBJECTIVES
from silva.engine.recipe.schema import Data, Objective, Parallel, Source, Training
from silva.engine.training.step import Step, StepSettings

# relative; float64 sums are taken in another order
EQUAL = 1e-9
# some comparisons, each as (tree, chosen, rejected)
Bundle = list[tuple[int, int, int]]


def tree_rows(data: DataSet, row_length: int, reference: NDArray[np.float32]) -> list[TreeBatch]:
    """Pack rows as the engine does."""
    plan = BatchLoader(data, unit="comparison", global_batch=data.comparisons, row_length=row_length)
    return [
        pack_row(row, multiple=gpt.ROW_MULTIPLE, pad_id=0, reference_logprob=reference)
        for row in plan[0].rows
    ]


def unrolled_rows(data: DataSet, row_length: int, reference: NDArray[np.float32]) -> list[TreeBatch]:
    """Pack rows in which nothing is shared and each sequence of a row is there once."""
    bundles: list[tuple[int, Bundle]] = []
    for k in range(len(data)):
        group = data.group(k)
        held: set[int] = set()
        bundle: Bundle = []
        for chosen, rejected in group.comparisons.tolist():
            wider = held | {chosen, rejected}
            if bundle and int(group.length[list(wider)].sum()) > row_length:
                bundles.append((int(group.length[list(held)].sum()), bundle))
                wider, bundle = {chosen, rejected}, []
            held = wider
            bundle.append((k, chosen, rejected))
        bundles.append((int(group.length[list(held)].sum()), bundle))
    rows: list[tuple[int, Bundle]] = []
    for length, bundle in sorted(bundles, key=lambda item: -item[0]):
        place = next((r for r, (used, _) in enumerate(rows) if used + length <= row_length), len(rows))
        if place == len(rows):
            rows.append((0, []))
        rows[place] = (rows[place][0] + length, rows[place][1] + bundle)
    return [_documents(data, bundle, gpt.ROW_MULTIPLE, reference) for _, bundle in rows]


def pair_rows(data: DataSet, reference: NDArray[np.float32]) -> list[TreeBatch]:
    """Make one row per comparison, padded to twice its longer sequence."""
    found = []
    for k in range(len(data)):
        group = data.group(k)
        for chosen, rejected in group.comparisons.tolist():
            size = 2 * int(group.length[[chosen, rejected]].max())
            found.append(_documents(data, [(k, chosen, rejected)], size, reference))
    return found


def _documents(data: DataSet, bundle: Bundle, multiple: int, reference: NDArray[np.float32]) -> TreeBatch:
    """Make one row in which every sequence of some comparisons is a document of its own."""
    place: dict[tuple[int, int], int] = {}
    pairs = [[place.setdefault((k, side), len(place)) for side in sides] for k, *sides in bundle]
    by_tree = {k: data.group(k) for k, _ in place}
    none = np.zeros((0, 2), np.int32), np.zeros(0, bool)
    pieces = [
        Piece(
            merge(TokenGroup.of([by_tree[k].sequence(side)])),
            np.array([by_tree[k].first_sequence + side]),
            *none,
        )
        for k, side in place
    ]
    row = pack_row(pieces, multiple=multiple, pad_id=0, reference_logprob=reference)
    row.comparisons = torch.tensor(pairs, dtype=torch.int32)
    absolute = [
        bool(by_tree[k].absolute[(by_tree[k].comparisons == sides).all(1)][0]) for k, *sides in bundle
    ]
    row.absolute = torch.tensor(absolute)
    return row


class Model:
    """Holds one copy of the checkpoint in one float type."""

    def __init__(self, folder: Path, objective: str, dtype: torch.dtype, comparisons: int) -> None:
        self.objective, self.comparisons = OBJECTIVES[objective], comparisons
        layout = Parallel(distributed_optimizer=False)
        self.shape = hf.read_shape(folder)
        bare = gpt.build(self.shape, layout, head=self.objective.head, dtype=dtype)
        hf.load(bare, folder, self.shape)
        chunks = optimizer.wrap(bare, layout)
        made = optimizer.build(chunks, Training(global_batch=1, learning_rate=1.0), layout)
        settings = StepSettings(Objective(name=objective), gpt.ROW_MULTIPLE, pad_id=0)
        self.step = Step(chunks, made, self.objective, settings)

    def run(self, rows: list[TreeBatch]) -> float:
        """Compute the loss; gradients are left in the model's buffers."""
        self.step.clear_gradients()
        return float(self.step.pass_over(rows, self.comparisons, training=True)[0]) / self.comparisons

    def gradients(self) -> list[Tensor]:
        """Return copies of all gradients."""
        return [p.main_grad.clone() for p in self.step.chunks[0].parameters()]

    def operations(self, rows: list[TreeBatch]) -> float:
        """Count the floating-point operations of a forward and a backward pass (`flops.computed`)."""
        tokens = sum(len(row.tokens) for row in rows)
        # a token at depth d sees d + 1 tokens
        pairs = sum(int((row.position.long() + 1).sum()) for row in rows)
        scored = sum(len(row.target) for row in rows)
        return flops.computed(self.shape, self.objective.head).of(tokens=tokens, pairs=pairs, scored=scored)


def apart(model: Model, rows: dict[str, list[TreeBatch]]) -> tuple[float, float]:
    """Return how far the other layouts are from the trees.

    Returns:
        The largest relative difference of the loss, and that of any parameter's gradient, over the layouts.
    """
    loss = model.run(rows["tree"])
    gradients = model.gradients()
    losses, norms = [], []
    for name in ("unrolled", "pairs"):
        losses.append(abs(model.run(rows[name]) - loss) / abs(loss))
        norms += [
            float((a - b).norm() / b.norm())
            for a, b in zip(model.gradients(), gradients, strict=True)
            if b.any() or a.any()
        ]
    return max(losses), max(norms)


def read(options: argparse.Namespace, cache: Path) -> DataSet:
    """Read or draw the comparisons to run.

    Raises:
        UserError: text is given without a tokenizer, or holds unpaired feedback.
    """
    if options.data is None:
        size = {"scale": options.scale, "vocabulary": options.vocabulary}
        trees = ultrainteract.trees(options.trees, only="interactive", **size)
        return common.synthetic(trees, options.row_length)
    if options.tokenizer is None:
        raise UserError(f"{options.data}: text needs --tokenizer FOLDER")
    # no other objective reads it
    absolute = options.objective == "bt_dr"
    source = Source(path=options.data, format=options.format, limit=options.limit, absolute=absolute)
    settings = Data(train=[source], row_length=options.row_length, too_long="drop", on_bad_row="skip")
    tokenizer = ChatTokenizer.load(options.tokenizer, chat_template=options.chat_template)
    data = common.read([source], tokenizer, settings, unit="comparison", cache=cache)
    options.vocabulary = tokenizer.vocab_size
    taken = DataSet.of(_first(data.group(k), options.per_tree) for k in range(min(options.trees, len(data))))
    print(f"{taken.comparisons} of {data.comparisons} comparisons are taken (--trees, --per-tree)")
    if any((taken.group(k).comparisons == ABSENT).any() for k in range(len(taken))):
        raise UserError(f"{options.data}: holds unpaired feedback; this benchmark needs pairs")
    return taken


def _first(group: TokenGroup, count: int) -> TokenGroup:
    """Return a tree of the first comparisons of a tree."""
    pairs = group.comparisons[:count]
    used = np.unique(pairs[pairs != ABSENT])
    renumbered = np.where(pairs == ABSENT, ABSENT, np.searchsorted(used, pairs))
    return TokenGroup.of([group.sequence(k) for k in used.tolist()], renumbered, group.absolute[:count])


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="?", metavar="DATA")
    parser.add_argument("--format", default="ultrainteract_pair")
    parser.add_argument("--tokenizer")
    parser.add_argument("--chat-template", help="default: the tokenizer's own")
    parser.add_argument("--limit", type=int, help="rows of DATA that are read")
    parser.add_argument("--trees", type=int, default=8, help="trees that are taken")
    parser.add_argument(
        "--per-tree", type=int, default=8, help="comparisons of DATA that are taken of each tree"
    )
    parser.add_argument(
        "--objective",
        default="dpo",
        choices=[n for n, row in OBJECTIVES.items() if row.pairwise and not row.needs_kl],
    )
    parser.add_argument("--row-length", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=4096, help="of the synthetic data")
    parser.add_argument("--scale", type=float, default=1.0, help="of the synthetic lengths")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--smoke", action="store_true", help="a tiny model and short texts, seconds")
    options = parser.parse_args()
    if options.smoke:
        options.hidden, options.layers, options.vocabulary = 32, 2, 512
        options.scale, options.trees, options.repeats, options.row_length = 0.05, 6, 1, 512
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            groups.initialize(Parallel(distributed_optimizer=False))
            try:
                report(options, Path(folder))
            finally:
                groups.shutdown()
    except UserError as error:
        parser.exit(2, f"tree_step: error: {error}\n")


def report(options: argparse.Namespace, work: Path) -> None:
    """Check the results, time the layouts and print the figures.

    Raises:
        SystemExit: losses or gradients differ.
    """
    data = read(options, work / "cache")
    reward = OBJECTIVES[options.objective].head == "reward"
    size = {"vocabulary": options.vocabulary, "hidden": options.hidden, "layers": options.layers}
    parameters = common.save_model(work / "model", reward=reward, **size)
    scored = np.concatenate([data.group(k).scored for k in range(len(data))])
    # the reference is near the policy's own scale, so that no loss is saturated
    noise = np.random.default_rng(0).normal(size=len(scored))
    reference = (noise - scored * np.log(options.vocabulary)).astype(np.float32)
    rows = {
        "tree": tree_rows(data, options.row_length, reference),
        "unrolled": unrolled_rows(data, options.row_length, reference),
        "pairs": pair_rows(data, reference),
    }

    exact = Model(work / "model", options.objective, torch.float64, data.comparisons)
    loss_difference, gradient_difference = apart(exact, rows)
    if not max(loss_difference, gradient_difference) < EQUAL:
        raise SystemExit(
            f"not equal: loss {loss_difference:.3g}, gradient {gradient_difference:.3g} relative"
        )
    operations = {name: exact.operations(part) for name, part in rows.items()}
    del exact

    model = Model(work / "model", options.objective, torch.float32, data.comparisons)

    def runs(part: list[TreeBatch]) -> Callable[[], object]:
        return lambda: model.run(part)

    timed = {name: runs(part) for name, part in rows.items()}
    for part in rows.values():
        # this is the warm-up
        model.run(part[:1])
    seconds = common.in_turns(timed, options.repeats)
    faster = {name: common.ratio(seconds[name], seconds["tree"]) for name in rows}
    fewer = {name: operations[name] / operations["tree"] for name in rows}
    lines = [
        (
            name,
            len(part),
            sum(len(row.tokens) for row in part),
            operations[name] / 1e9,
            statistics.median(seconds[name]) / data.comparisons,
            operations[name] / 1e9 / statistics.median(seconds[name]),
            faster[name],
            faster[name] / fewer[name],
        )
        for name, part in rows.items()
    ]
    columns = ("rows", "tokens", "GFLOP", "s/comparison", "GFLOP/s", "x tree's time", "over FLOP ratio")
    common.show(f"{data.comparisons} comparisons, {len(data)} trees", ("layout", *columns), lines)
    environment = common.environment(parameters=parameters, objective=options.objective, **size)
    common.finish(environment | {"row_length": options.row_length, "comparisons": data.comparisons})
    common.finish({"ratio_over_pairs": faster["pairs"], "flop_ratio": fewer["unrolled"]})
    print(
        f"ratio={faster['unrolled']:.4g} ratio_over_flops={faster['unrolled'] / fewer['unrolled']:.4g} "
        f"max_loss_diff={loss_difference:.3g} max_grad_diff={gradient_difference:.3g}"
    )


if __name__ == "__main__":
    main()
