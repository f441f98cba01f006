"""Counts the floating-point operations of a Llama-shaped model: one count for planner, balance and benchmarks.

A pair is a token and what it sees, itself included. Norms, rotations, softmax, padding and masked parts of attention
tiles are not counted: they are overhead.
"""

from __future__ import annotations

from dataclasses import dataclass

from silva.engine.data.trees.balance import CostModel
from silva.engine.model.hf_layout import ModelShape


@dataclass(frozen=True)
class Flops:
    """Holds the operations of a forward and a backward pass."""

    token: float  # products with the weights of all layers
    pair: float  # scores and values, of all heads and layers
    scored: float  # products with the output matrix, per scored position

    def of(self, *, tokens: float, pairs: float, scored: float) -> float:
        """Sum over so many tokens, visible pairs and scored positions."""
        return self.token * tokens + self.pair * pairs + self.scored * scored


def needed(shape: ModelShape, head: str) -> Flops:
    """Count what a step needs, whatever computes it: the numerator of a model's FLOPs utilisation (MFU).

    A weight takes 2 operations a token forward and 4 backward; a visible pair 4 x head size per head forward and 8
    backward. Nothing is counted twice: no recomputation, no padding.
    """
    return _counted(shape, head, backward_pair=8, backward_scored=4)


def computed(shape: ModelShape, head: str) -> Flops:
    """Count what this project's kernels compute.

    As `needed`, and in the backward pass the scores of attention (2 x head size) and the logits (2 x hidden size x
    vocabulary) once more, which are not kept.
    """
    return _counted(shape, head, backward_pair=10, backward_scored=6)


def row_cost(shape: ModelShape, head: str, *, scored: float = 0.5) -> CostModel:
    """Return `computed` as what a tree costs, by which data-parallel ranks are balanced.

    Args:
        scored: share of a tree's tokens that is taken to be scored.
    """
    cost = computed(shape, head)
    return CostModel(token=cost.token + scored * cost.scored, pair=cost.pair)


def _counted(shape: ModelShape, head: str, *, backward_pair: int, backward_scored: int) -> Flops:
    attention = shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    weights = shape.layers * (attention + 3 * shape.hidden * shape.ffn)
    output = shape.hidden * shape.vocab if head == "lm" else 0
    return Flops(
        token=6.0 * weights,
        pair=(4.0 + backward_pair) * shape.layers * shape.heads * shape.head_dim,
        scored=(2.0 + backward_scored) * output,
    )
