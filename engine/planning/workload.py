"""Determines what one optimizer step has to compute: tokens per unit of the global batch, as trees and unrolled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from silva.engine.data import store
from silva.engine.data.trees.tree import merge
from silva.engine.errors import UserError
from silva.engine.objectives import OBJECTIVES
from silva.engine.recipe.schema import Recipe

# tokens of a sequence, assumed where no data is given and the recipe allows sequences as long
SEQUENCE_LENGTH = 1024


@dataclass(frozen=True)
class Workload:
    """Holds the work of one unit, which is what `training.global_batch` counts: a comparison, or a sequence for sft.

    Attributes:
        unrolled: tokens of a unit's sequences, each alone.
        unique: tokens of a unit's share of its tree.
        depth: keys that a token sees on average, itself included.
        scored: scored positions of a unit's share of its tree.
        source: where the numbers come from, for a reader of the plan.
    """

    unrolled: float
    unique: float
    depth: float
    scored: float
    source: str

    @property
    def sharing(self) -> float:
        """Return the ratio of unique to unrolled tokens."""
        return self.unique / self.unrolled

    def rows(self, units: int, row_length: int, fill: float) -> int:
        """Return the number of packed rows of a global batch.

        Args:
            units: of the global batch.
            row_length: tokens of a row.
            fill: share of a row that is not padding.
        """
        return max(1, math.ceil(units * self.unique / (row_length * fill)))


def assumed(recipe: Recipe, *, length: int | None, ratio: float | None) -> Workload:
    """Estimate the workload from a mean sequence length and a ratio of unique to unrolled tokens.

    The mean depth is length x (1 - ratio / 2): half the length without sharing. With sharing it is nearer to the whole
    length, because the shared tokens are the shallow ones.

    Args:
        recipe: of the run.
        length: tokens of a sequence; None: `SEQUENCE_LENGTH`, or less where the recipe allows less.
        ratio: unique tokens per unrolled token; None: 1, where nothing is shared.
    """
    length = length or min(SEQUENCE_LENGTH, recipe.data.max_length or recipe.data.row_length)
    ratio = ratio or 1.0
    unrolled = length * _sequences(recipe)
    return Workload(
        unrolled,
        unrolled * ratio,
        length * (1 - ratio / 2),
        unrolled * ratio,
        f"assumed: sequences of {length} tokens, {ratio:g} of them unique, every token scored",
    )


def of_data(recipe: Recipe, folder: Path) -> Workload:
    """Measure the workload on tokenized data.

    Args:
        recipe: of the run.
        folder: a run's data cache, or one source's folder in it.

    Raises:
        UserError: the folder holds no tokenized data, or nothing of the recipe's unit.
    """
    unrolled = unique = depth = scored = units = 0
    for path in sorted(folder.rglob("*.arrow")):
        shard = store.Shard.open(path)
        units += int((shard.sequences if _sequences(recipe) == 1 else shard.comparisons).sum())
        unique += int(shard.tokens.sum())
        for k in range(len(shard)):
            group = shard[k]
            length, shared = group.length.astype(int), group.shared.astype(int)
            unrolled += int(length.sum())
            scored += len(merge(group).target)
            # a path adds its tokens at the depths shared + 1 .. length
            depth += int((length * (length + 1) - shared * (shared + 1)).sum()) // 2
    if not units:
        raise UserError(
            f"--data: {folder} holds no tokenized trees for {recipe.objective.name}; give a run's data cache"
        )
    source = f"{folder}: {units:,} units"
    return Workload(unrolled / units, unique / units, depth / unique, scored / units, source)


def _sequences(recipe: Recipe) -> int:
    """Return the number of sequences in a unit."""
    return 2 if OBJECTIVES[recipe.objective.name].pairwise else 1
