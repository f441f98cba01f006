"""Defines every operation in plain torch, for any float type and any device.

The kernels are judged by these definitions.

S tokens of a row, S_q query rows, H_q query heads, H_kv key-value heads, D head size, L scored positions,
V vocabulary, H hidden size, N sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# rows per block: the mask of a block is at most 256 x S, however long the row is
QUERY_BLOCK = 256
# (query, key) pairs up to which autograd may keep the masks of all blocks, as float32, for every layer: 32 MiB
LARGEST_KEPT = 1 << 23


class QueryBlock(NamedTuple):
    """Holds a run of query rows and what they see.

    The mask is made where it is used: kept, it would be half S x S.

    Attributes:
        rows: the run of query rows.
        keys: the keys that at least one of the rows sees.
        row: (rows,) int, the row of each query among the keys.
        key: (keys,) int, the row of each key.
        end: (keys,) int, where the subtree of each key ends.
        window: as in `tree_attention`.
        depth: positions of the rows and of the keys; only with a window.
    """

    rows: slice
    keys: slice | Tensor
    row: Tensor
    key: Tensor
    end: Tensor
    window: int | None
    depth: tuple[Tensor, Tensor] | None

    def visible(self) -> Tensor:
        """Return the mask, (rows, keys) bool."""
        seen = (self.key[None] <= self.row[:, None]) & (self.row[:, None] < self.end[None])
        if self.window is not None and self.depth is not None:
            seen &= self.depth[0][:, None] - self.depth[1][None] < self.window
        return seen


def query_blocks(
    subtree_end: Tensor,
    *,
    position: Tensor | None = None,
    window: int | None = None,
    query_index: Tensor | None = None,
) -> list[QueryBlock]:
    """Build what `tree_attention` needs to know of the mask; it is the same for every layer, so built once per row.

    Keys that no query of a block sees are left out, so that the cost follows the trees and not the row.

    Args:
        subtree_end: as in `tree_attention`.
        position: as in `tree_attention`.
        window: as in `tree_attention`.
        query_index: as in `tree_attention`.

    Returns:
        The blocks, whose rows follow one another and are together all query rows.

    Raises:
        ValueError: a window without positions.
    """
    if window is not None and position is None:
        raise ValueError("tree_attention: a sliding window needs `position`")
    rows = torch.arange(subtree_end.shape[0], device=subtree_end.device)
    queries = rows if query_index is None else query_index.long()
    blocks = []
    for start in range(0, queries.shape[0], QUERY_BLOCK):
        i = queries[start : start + QUERY_BLOCK]
        j = rows[(rows <= i.max()) & (subtree_end > i.min())]
        # attention to no key at all is not defined, so one key stays, which is masked for all of them
        j = j if len(j) else rows[:1]
        first, last = int(j[0]), int(j[-1])
        # a slice is not copied
        keys = slice(first, last + 1) if last - first + 1 == len(j) else j
        depth = None if window is None or position is None else (position[i], position[keys])
        part = slice(start, start + len(i))
        blocks.append(QueryBlock(part, keys, i, rows[keys], subtree_end[keys], window, depth))
    return blocks


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    subtree_end: Tensor,
    *,
    scale: float | None = None,
    position: Tensor | None = None,
    window: int | None = None,
    query_index: Tensor | None = None,
    blocks: list[QueryBlock] | None = None,
) -> Tensor:
    """Compute the attention of every token to its ancestors: token i sees j iff `j <= i < subtree_end[j]`.

    Memory grows with S, not with its square: of long rows each block is computed again in the backward pass, since
    torch's attention keeps its mask until then.

    Args:
        q: (S_q, H_q, D), with H_q a multiple of H_kv.
        k: (S, H_kv, D).
        v: (S, H_kv, D).
        subtree_end: (S,) int, one past the last token of the subtree under each token.
        scale: softmax scale, default `D ** -0.5`.
        position: (S,) int, depth of each token in its tree; needed with `window`.
        window: token i sees j only if also `position[i] - position[j] < window` (Mistral's sliding window).
        query_index: (S_q,) int, the row of each query among the S keys; default `arange(S)`.
        blocks: of `query_blocks` with the same arguments, if they are at hand.

    Returns:
        (S_q, H_q, D) in the dtype of `q`; zero for a query that sees no key.

    Raises:
        ValueError: a window without positions.
    """
    if blocks is None:
        blocks = query_blocks(subtree_end, position=position, window=window, query_index=query_index)
    pairs = sum(len(block.row) * len(block.key) for block in blocks)
    if pairs > LARGEST_KEPT and torch.is_grad_enabled():
        parts = [
            checkpoint(_attend, q, k, v, block, scale, use_reentrant=False, preserve_rng_state=False)
            for block in blocks
        ]
    else:
        parts = [_attend(q, k, v, block, scale) for block in blocks]
    return torch.cat(parts) if parts else q.clone()


def _attend(q: Tensor, k: Tensor, v: Tensor, block: QueryBlock, scale: float | None) -> Tensor:
    """Compute the attention of one block's queries, (rows, H_q, D)."""
    out = F.scaled_dot_product_attention(
        q[block.rows].transpose(0, 1)[None],
        k[block.keys].transpose(0, 1)[None],
        v[block.keys].transpose(0, 1)[None],
        attn_mask=block.visible()[None, None],
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out[0].transpose(0, 1)


def linear_logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Compute log softmax(hidden @ weight.T)[target].

    Args:
        hidden: (L, H).
        weight: (V, H).
        target: (L,) int.

    Returns:
        (L,); the softmax is taken in float32 at least.
    """
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(logits, -1).gather(-1, target[:, None]).squeeze(-1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute x / sqrt(mean(x^2) + eps) * weight over the last dimension, the mean in float32 at least.

    The normalised value is rounded to x's dtype before the weight is applied, as Llama's definition does.

    Args:
        x: (..., H).
        weight: (H,).
        eps: is added to the mean.

    Returns:
        (..., H).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotary(x: Tensor, position: Tensor, inverse_frequency: Tensor, scale: float = 1.0) -> Tensor:
    """Compute the rotary position embedding in Llama's non-interleaved form (arXiv 2104.09864).

    Angles are computed in float32 at least and the rotation in x's dtype, as transformers does.

    Args:
        x: (S, heads, D).
        position: (S,), the depth of each token in its tree.
        inverse_frequency: (D / 2,).
        scale: what cosine and sine are multiplied by.

    Returns:
        (S, heads, D), in x's dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    angle = position.to(wide)[:, None] * inverse_frequency.to(wide)[None]
    cos, sin = (
        (f(torch.cat([angle, angle], -1)) * scale).to(x.dtype)[:, None] for f in (torch.cos, torch.sin)
    )
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def sequence_sums(values: Tensor, span: Tensor, span_pointer: Tensor, span_index: Tensor) -> Tensor:
    """Sum per-position values to sequences through the spans they share.

    A position is added to its span once; a span is added to every sequence that runs through it.

    Args:
        values: (L,) float, one per scored position.
        span: (L,) int, the span of each position, ascending.
        span_pointer: (N + 1,) int, CSR row pointer over sequences.
        span_index: (entries,) int, the spans of each sequence.

    Returns:
        (N,) in the dtype of `values`, summed in float64.
    """
    # The sum is taken in float64: in float32 a log-prob near -500, summed token by token, is off by more than its last
    # digit, and an unrolled sequence is off by another amount than the same sequence in a tree.
    wide = values.double()
    # Segments are summed in a fixed order; `index_add` would add by atomics on a GPU, in any order. L bounds the number
    # of spans, so no size has to be read back from the device.
    spans = torch.arange(len(span) + 1, device=span.device, dtype=span.dtype)
    per_span = _segment_sums(wide, torch.searchsorted(span, spans))
    return _segment_sums(per_span[span_index.long()], span_pointer.long()).to(values.dtype)


def _segment_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """Return (n,) sums of the segments of `values` that begin at (n + 1,) offsets."""
    found: Tensor = torch.segment_reduce(values, "sum", offsets=offsets, initial=0.0, unsafe=True)
    return found
