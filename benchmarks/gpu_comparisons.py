"""Makes what the part "step" of `gpu.py` computes: UltraInteract-shaped comparisons and answers, as rows and as pairs.

Operations are counted as those that a layout's own tokens need (`silva.engine.model.flops.needed`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

# this import comes first, because it prepares megatron-core
from silva.engine.parallel import groups  # noqa: F401

import numpy as np
import torch
from torch import Tensor

from benchmarks import common, ultrainteract
from benchmarks.tree_step import tree_rows, unrolled_rows
from silva.engine.data.dataset import DataSet
from silva.engine.data.loader import BatchLoader
from silva.engine.data.trees.group import TokenGroup, TokenSequence
from silva.engine.data.trees.packing import Piece, TreeBatch, pack_row
from silva.engine.data.trees.tree import merge
from silva.engine.model import flops, gpt
from silva.engine.model.families.shape import ModelShape
from silva.engine.objectives import OBJECTIVES
from silva.engine.planning.named_models import NAMED

# standard deviation of a random model's logits: that of weights drawn with 0.02, at a hidden size of 4,096
SPREAD = 1.28


class Size(NamedTuple):
    """Holds the sizes of the model and of the data.

    Attributes:
        shape: of the model.
        row_length: most tokens of a row.
        trees: trees of NCA, drawn from UltraInteract's interactive lines.
        answers: trees of SFT, drawn from all of its lines.
        scale: of all lengths.
        repeats: timed steps of each layout.
    """

    shape: ModelShape
    row_length: int
    trees: int
    answers: int
    scale: float
    repeats: int


# This is Mistral-7B from its second version on, which has no window. With 8 of 32 layers it has 2.0e9 parameters. They
# take 34 GiB with float32 gradients, main weights and moments, and the activations of a row take some 10 GiB.
FULL = Size(replace(NAMED["mistral-7b"], layers=8, window=None, rope_theta=1e6), 8192, 16, 24, 1.0, repeats=3)
SMOKE = Size(
    ModelShape(
        layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128, vocab=512, rope_theta=1e6,
        norm_eps=1e-5, tied=False, window=None, architecture="mistral", max_position=32768,
    ),
    512, 3, 2, 0.05, repeats=1,
)  # fmt: skip


class Counts(NamedTuple):
    """Holds the counts of one layout, without padding.

    Attributes:
        tokens: of all rows or sequences.
        pairs: of a token and one that it sees, itself included.
        scored: positions whose logits are needed.
    """

    tokens: int
    pairs: int
    scored: int

    def operations(self, shape: ModelShape) -> float:
        """Count the floating-point operations of a forward and a backward pass."""
        return flops.needed(shape, "lm").of(**self._asdict())

    @classmethod
    def of_rows(cls, rows: Sequence[TreeBatch]) -> Counts:
        """Count what packed rows hold."""
        # the last token that is not padding ends a sequence
        real = [int(row.last.max()) + 1 for row in rows]
        pairs = sum(int((row.position[:n].long() + 1).sum()) for row, n in zip(rows, real, strict=True))
        return cls(sum(real), pairs, sum(len(row.target) for row in rows))

    @classmethod
    def of_sequences(cls, sequences: Sequence[TokenSequence]) -> Counts:
        """Count what sequences hold, each computed alone."""
        lengths = [len(each.tokens) for each in sequences]
        return cls(
            sum(lengths),
            sum(n * (n + 1) // 2 for n in lengths),
            sum(int(each.scored.sum()) for each in sequences),
        )


@dataclass
class Case:
    """Holds one objective's step: the same comparisons (or answers) as rows of the engine and as pairs of sequences.

    Attributes:
        objective: its name.
        rows: by layout.
        pairs: sequences that are padded together, and their reference log-probs.
        units: comparisons, or sequences for SFT.
        sequences: the number of all sequences.
        scored: scored tokens of all sequences.
        unrolled: tokens of all sequences, each once.
    """

    objective: str
    rows: dict[str, list[TreeBatch]]
    pairs: list[tuple[list[TokenSequence], Tensor]]
    units: int
    sequences: int
    scored: int
    unrolled: int

    def counts(self, layout: str) -> Counts:
        """Return the counts of a layout of `rows`, or of the sequences as they are padded together."""
        if layout in self.rows:
            return Counts.of_rows(self.rows[layout])
        return Counts.of_sequences([each for pair, _ in self.pairs for each in pair])

    def passes(self, layout: str) -> list[int]:
        """Return the tokens of every forward pass, padding included."""
        if layout in self.rows:
            return [len(row.tokens) for row in self.rows[layout]]
        return [len(pair) * max(len(each.tokens) for each in pair) for pair, _ in self.pairs]

    @property
    def count(self) -> int:
        """Return the number that the loss is divided by."""
        return self.units if OBJECTIVES[self.objective].pairwise else self.scored


def nca(size: Size) -> Case:
    """Make NCA's step, from interactive trees."""
    data = common.synthetic(
        ultrainteract.trees(size.trees, vocabulary=size.shape.vocab, scale=size.scale, only="interactive"),
        size.row_length,
    )
    members = [data.group(k) for k in range(len(data))]
    scored = np.concatenate([each.scored for each in members])
    # The reference log-probs are those that a random model gives on average, so that no loss is saturated. Its logits
    # are normally distributed, and the mean of their log-sum-exp is above log V by half their variance.
    expected = math.log(size.shape.vocab) + SPREAD**2 / 2
    reference = (-expected * scored).astype(np.float32)
    pairs = []
    for each in members:
        for sides in each.comparisons.tolist():
            there = torch.from_numpy(reference[[each.first_sequence + side for side in sides]])
            pairs.append(([each.sequence(side) for side in sides], there))
    rows = {
        "trees": tree_rows(data, size.row_length, reference),
        "unrolled": unrolled_rows(data, size.row_length, reference),
    }
    return _case("nca", data, rows, pairs, data.comparisons)


def sft(size: Size) -> Case:
    """Make SFT's step: correct actions as answers to their instructions, without what was tried before."""
    found = []
    for tree in ultrainteract.trees(size.answers, vocabulary=size.shape.vocab, scale=size.scale):
        answers = tuple(((chosen[0], chosen[-1]), rejected) for chosen, rejected in tree.pairs)
        group = ultrainteract.group(replace(tree, pairs=answers))
        found.append(replace(group.subset(np.unique(group.comparisons[:, 0])), instruction=group.instruction))
    data = DataSet.of(found)
    plan = BatchLoader(data, unit="sequence", global_batch=data.sequences, row_length=size.row_length)
    sequences = [each for k in range(len(data)) for each in data.group(k).paths()]
    rows = {"trees": _packed(plan[0].rows), "unrolled": _packed(_documents(sequences, size.row_length))}
    pairs = [(sequences[k : k + 2], torch.zeros(0)) for k in range(0, len(sequences), 2)]
    return _case("sft", data, rows, pairs, data.sequences)


CASES: dict[str, Callable[[Size], Case]] = {"sft": sft, "nca": nca}


def _case(objective: str, data: DataSet, rows: Any, pairs: Any, units: int) -> Case:
    members = [data.group(k) for k in range(len(data))]
    scored, unrolled = (
        sum(int(total.sum()) for total in each)
        for each in ([m.scored for m in members], [m.length for m in members])
    )
    return Case(objective, rows, pairs, units, data.sequences, scored, unrolled)


def _packed(rows: Sequence[Sequence[Piece]]) -> list[TreeBatch]:
    return [pack_row(row, multiple=gpt.ROW_MULTIPLE, pad_id=0) for row in rows]


def _documents(sequences: Sequence[TokenSequence], row_length: int) -> list[list[Piece]]:
    """Put sequences into rows, every one as a document of its own; rows are filled first-fit decreasing."""
    rows: list[list[Piece]] = []
    used: list[int] = []
    for each in sorted(sequences, key=lambda each: -len(each.tokens)):
        place = next((r for r, n in enumerate(used) if n + len(each.tokens) <= row_length), len(rows))
        if place == len(rows):
            rows.append([])
            used.append(0)
        used[place] += len(each.tokens)
        none = np.zeros(1, np.int64), np.zeros((0, 2), np.int32), np.zeros(0, bool)
        rows[place].append(Piece(merge(TokenGroup.of([each])), *none))
    return rows
