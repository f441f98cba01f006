"""Counts the floating-point operations of a Llama-shaped model, for the planner, the balance and the benchmarks alike.

A pair is a token and a token that it sees, itself included. Norms, rotations, softmax, padding and masked parts of
attention tiles are not counted: they are overhead.
"""

from __future__ import annotations

from dataclasses import dataclass

from silva.engine.data.trees.balance import CostModel
from silva.engine.model.families.shape import ModelShape


@dataclass(frozen=True)
class Flops:
    """Holds the operations of a forward and a backward pass.

    Attributes:
        token: per token, of the products with the weights of all layers.
        pair: per visible pair, of attention's scores and values, in all heads and layers.
        scored: per scored position, of the products with the output matrix.
    """

    token: float
    pair: float
    scored: float

    def of(self, *, tokens: float, pairs: float, scored: float) -> float:
        """Return the operations for these numbers of tokens, visible pairs and scored positions."""
        return self.token * tokens + self.pair * pairs + self.scored * scored


def needed(shape: ModelShape, head: str) -> Flops:
    """Count the operations that a step needs: the numerator of the model FLOPs utilisation (MFU).

    The count does not depend on what computes the step. A weight takes 2 operations per token forward and 4 backward;
    a visible pair takes 4 x head size per head forward and 8 x head size backward. Nothing is counted twice: neither
    recomputation nor padding is included.

    Args:
        shape: of the model.
        head: "lm" or "reward".
    """
    return _counted(shape, head, backward_pair=8, backward_scored=4)


def computed(shape: ModelShape, head: str) -> Flops:
    """Count the operations that this project's kernels compute.

    These are those of `needed` and, in the backward pass, the scores of attention (2 x head size) and the logits
    (2 x hidden size x vocabulary) once more, because they are not kept.

    Args:
        shape: of the model.
        head: "lm" or "reward".
    """
    return _counted(shape, head, backward_pair=10, backward_scored=6)


def row_cost(shape: ModelShape, head: str, *, scored: float = 0.5) -> CostModel:
    """Return `computed` as the cost of a tree, by which data-parallel ranks are balanced.

    Args:
        shape: of the model.
        head: "lm" or "reward".
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
