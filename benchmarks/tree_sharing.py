"""Measures what merging, packing and balancing make of a data set.

    python -m benchmarks.tree_sharing DATA ... --tokenizer FOLDER     DATA is path:format[:field=column,...]
    python -m benchmarks.tree_sharing RECIPE.yaml ...
    python -m benchmarks.tree_sharing --synthetic ultrainteract --synthetic ultrainteract-rm

- unrolled: tokens of all sequences, each once; sides: tokens of all comparisons' sequences, as pair trainers compute
  them; unique: tokens of the merged trees; ratio: unrolled / unique and sides / unique. They count whole trees,
  however long these are.
- tile ratio: 128 x 128 tiles of the attention matrix that hold a visible pair, unrolled sequences over packed trees.
- row fill: tokens over rows x row length, for the rows of one rank.
- imbalance: cost of the slowest of so many data-parallel ranks over their mean, averaged over the global batches.

Row fill and imbalance are of global batches in shuffled order, as a run draws them (`--global-batch`, `--row-length`,
or a recipe's own); costs are those of a 7B model.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import common, ultrainteract
from silva.engine.data.dataset import DataSet
from silva.engine.data.encoding import Unit
from silva.engine.data.loader import BatchLoader
from silva.engine.data.reading.formats import FORMATS
from silva.engine.data.text.chat import ChatTokenizer
from silva.engine.data.trees.group import ABSENT, TokenGroup
from silva.engine.data.trees.tree import Tree, merge
from silva.engine.errors import UserError
from silva.engine.model import flops
from silva.engine.objectives import OBJECTIVES
from silva.engine.planning.named_models import NAMED
from silva.engine.recipe import loading
from silva.engine.recipe.schema import Data
from silva.kernels.tree_blocks import SKIPPED, TileShape, blocks_without_lists, classify

TILE = 128
RANKS = (1, 8, 64)
COST = flops.row_cost(NAMED["mistral-7b"], "lm", scored=0.3)
SYNTHETIC: dict[str, Callable[..., list[ultrainteract.Tree]]] = {
    "ultrainteract": ultrainteract.trees,
    "ultrainteract-interactive": partial(ultrainteract.trees, only="interactive"),
    "ultrainteract-rm": ultrainteract.reward_trees,
}


@dataclass
class Sharing:
    """Holds the figures of one data set.

    Attributes:
        trees: number of trees.
        sequences: number of sequences.
        comparisons: number of comparisons.
        unrolled: tokens of all sequences, each once.
        sides: tokens of all comparisons' sequences.
        unique: tokens of the merged trees.
        tile_ratio: visited tiles of unrolled sequences over those of packed trees.
        row_fill: tokens over rows x row length.
        imbalance: cost of the slowest rank over the mean, by number of ranks.
        row_length: most tokens of a row.
        global_batch: units of a global batch.
        steps: global batches that row fill and imbalance were measured over.
    """

    trees: int
    sequences: int
    comparisons: int
    unrolled: int
    sides: int
    unique: int
    tile_ratio: float
    row_fill: float
    imbalance: dict[int, float]
    row_length: int
    global_batch: int
    steps: int


def measure(data: DataSet, unit: Unit, *, row_length: int, global_batch: int, steps: int) -> Sharing:
    """Merge every tree, then lay out the first `steps` global batches for each number of ranks.

    Raises:
        SystemExit: a merged tree does not hold its sequences.
    """
    unrolled = sides = unique = 0
    trees, plain = _Tiles(row_length), _Tiles(row_length)
    for k in range(len(data)):
        group = data.group(k)
        tree = merge(group)
        _check(tree, group)
        unrolled += int(group.length.sum())
        sides += int(group.length[group.comparisons[group.comparisons != ABSENT]].sum())
        unique += len(tree)
        trees.add(tree.subtree_end)
        for length in group.length.tolist():
            plain.add(np.full(length, length, np.int32))
    units = int(data.units(unit).sum())
    plans = {
        ranks: BatchLoader(
            data,
            unit=unit,
            global_batch=min(global_batch, units),
            row_length=row_length,
            shuffle=True,
            ranks=ranks,
            cost=COST,
        )
        for ranks in RANKS
    }
    # only whole batches are laid out, if there is one
    count = min(steps, max(1, units // global_batch))
    batches = {ranks: [plan[step] for step in range(count)] for ranks, plan in plans.items()}
    alone = batches[1]
    return Sharing(
        trees=len(data),
        sequences=data.sequences,
        comparisons=data.comparisons,
        unrolled=unrolled,
        sides=sides,
        unique=unique,
        tile_ratio=plain.total() / trees.total(),
        row_fill=sum(b.unique for b in alone) / (sum(b.tokens.size for b in alone) * row_length),
        imbalance={r: float(np.mean([b.imbalance for b in found])) for r, found in batches.items()},
        row_length=row_length,
        global_batch=min(global_batch, units),
        steps=count,
    )


class _Tiles:
    """Counts the tiles visited by documents that fill rows one after the other."""

    def __init__(self, row_length: int) -> None:
        self.row_length = row_length
        self.row: list[NDArray[np.int32]] = []
        self.used = self.visited = 0

    def add(self, subtree_end: NDArray[np.int32]) -> None:
        """Put a document into the row, or into a new one where it does not fit."""
        if self.used + len(subtree_end) > self.row_length:
            self.total()
        self.row.append(subtree_end + np.int32(self.used))
        self.used += len(subtree_end)

    def total(self) -> int:
        """Close the row and return the number of tiles so far."""
        if self.row:
            ends = torch.from_numpy(np.concatenate(self.row))
            kinds = classify(blocks_without_lists(ends, None, None, None), TileShape(TILE, TILE))
            self.visited += int((kinds != SKIPPED).sum())
        self.row, self.used = [], 0
        return self.visited


def _check(tree: Tree, group: TokenGroup) -> None:
    """Check that the tokens that a sequence's last token sees are the sequence."""
    index = np.arange(len(tree))
    for last, sequence in zip(tree.last, group.paths(), strict=True):
        seen = tree.tokens[(index <= last) & (tree.subtree_end > last)]
        if not np.array_equal(seen, sequence.tokens):
            raise SystemExit("a merged tree does not hold its sequences")


def data_sets(options: argparse.Namespace, work: Path) -> Iterator[tuple[str, DataSet, Unit, int, int]]:
    """Read or draw every data set of the command line.

    Yields:
        (what it was called, data, unit, row length, global batch).

    Raises:
        UserError: a data set of text is given without a tokenizer.
    """
    row_length, global_batch = options.row_length, options.global_batch
    for name in options.synthetic or []:
        trees = SYNTHETIC[name](options.trees, scale=options.scale)
        yield name, common.synthetic(trees, row_length), "comparison", row_length, global_batch
    for text in options.data:
        print(text)
        if text.endswith((".yaml", ".yml")):
            recipe = loading.load(text)
            tokenizer = ChatTokenizer.load(
                recipe.tokenizer_path,
                chat_template=recipe.tokenizer.chat_template,
                add_bos=recipe.tokenizer.add_bos,
                append_eos=recipe.tokenizer.append_eos,
            )
            unit: Unit = "comparison" if OBJECTIVES[recipe.objective.name].pairwise else "sequence"
            settings, batch = recipe.data, recipe.training.global_batch
        else:
            source = common.source(text, limit=options.limit)
            if options.tokenizer is None:
                raise UserError(f"{text}: text needs --tokenizer FOLDER")
            tokenizer = ChatTokenizer.load(options.tokenizer, chat_template=options.chat_template)
            unit = "comparison" if "comparison" in FORMATS[source.format].kinds else "sequence"
            settings = Data(train=[source], row_length=row_length, too_long="drop", on_bad_row="skip")
            batch = global_batch
        data = common.read(settings.train, tokenizer, settings, unit=unit, cache=work / "cache")
        yield text, data, unit, settings.row_length, batch


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="*", metavar="DATA")
    parser.add_argument("--synthetic", action="append", choices=list(SYNTHETIC), help="may be repeated")
    parser.add_argument("--tokenizer")
    parser.add_argument("--chat-template", help="default: the tokenizer's own")
    parser.add_argument("--limit", type=int, help="rows of each DATA that are read")
    parser.add_argument("--trees", type=int, default=2000, help="synthetic trees")
    parser.add_argument("--scale", type=float, default=1.0, help="of the synthetic lengths")
    parser.add_argument("--row-length", type=int, default=8192)
    parser.add_argument("--global-batch", type=int, default=512, help="comparisons (sequences) per step")
    parser.add_argument("--steps", type=int, default=4, help="global batches that are laid out")
    parser.add_argument("--smoke", action="store_true", help="a few short synthetic trees")
    options = parser.parse_args()
    if options.smoke:
        options.trees, options.scale, options.steps, options.row_length = 40, 0.1, 1, 2048
        options.synthetic = options.synthetic or list(SYNTHETIC)
    if not options.data and not options.synthetic:
        parser.error("give a data set, a recipe, or --synthetic")
    try:
        with tempfile.TemporaryDirectory() as folder:
            report(options, Path(folder))
    except UserError as error:
        parser.exit(2, f"tree_sharing: error: {error}\n")


def report(options: argparse.Namespace, work: Path) -> None:
    """Measure every data set and print the results."""
    found: dict[str, Sharing] = {}
    for text, data, unit, row_length, global_batch in data_sets(options, work):
        found[common.label(text, found)] = measure(
            data, unit, row_length=row_length, global_batch=global_batch, steps=options.steps
        )
    lines = [
        (
            name,
            s.trees,
            s.sequences,
            s.comparisons,
            s.unrolled,
            s.unique,
            s.unrolled / s.unique,
            s.sides / s.unique,
            s.tile_ratio,
            s.row_fill,
            *s.imbalance.values(),
        )
        for name, s in found.items()
    ]
    columns = (
        "trees",
        "sequences",
        "comparisons",
        "unrolled",
        "unique",
        "ratio",
        "sides",
        "tiles",
        "row fill",
    )
    common.show("sharing", ("data", *columns, *(f"{ranks} ranks" for ranks in RANKS)), lines)
    common.finish(common.environment(tile=TILE))
    for name, s in found.items():
        figures: dict[str, object] = {
            "ratio": s.unrolled / s.unique,
            "sides_ratio": s.sides / s.unique,
            "tile_ratio": s.tile_ratio,
            "row_fill": s.row_fill,
            "row_length": s.row_length,
            "global_batch": s.global_batch,
            "batches": s.steps,
        }
        common.finish({f"{name}_{figure}": value for figure, value in figures.items()})
        common.finish({f"{name}_imbalance_{ranks}": value for ranks, value in s.imbalance.items()})


if __name__ == "__main__":
    main()
