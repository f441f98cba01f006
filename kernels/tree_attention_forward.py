"""Computes the forward pass of tree attention, and holds what forward and backward kernels share.

    S keys, S_q query rows, H query heads, D head size (D_BLOCK: the next power of two), G query heads per key head
    ROWS rows of a query tile: ROWS / PACK tokens x PACK heads of one group; KEYS keys of a tile

PACK heads of a group are neighbouring rows of one tile: keys and values are read once for all of them, and a tile
spans few tokens, which wastes little at the edges of branches. Tiles that a loop runs over are read through tensor
descriptors (token, head, column) where the GPU has a copy engine for them, as Hopper has, and through pointers, whose
loads are pipelined too, where it has none. Tiles that stay for the whole loop are read through pointers everywhere:
read through a descriptor of packed heads, a product's left operand would be kept in registers. What lies outside of a
tensor reads as zero. Numbers of each (token, head), such as the log-sum-exp, are stored as (H / G, S_q, G), so that a
tile's rows are neighbours.
"""

from __future__ import annotations

import torch

from silva.kernels.dispatch import INTERPRETED, jit, tl

# Triton's interpreter multiplies the bit patterns of bfloat16 operands, and truncates when it narrows to bfloat16
EMULATE = tl.constexpr(INTERPRETED) if tl is not None else None
FLOAT32 = tl.constexpr("ieee" if torch.version.hip else "tf32x3") if tl is not None else None


@jit
def product(a, b, c):
    """Compute c + a @ b in float32.

    Operands in float32 are multiplied as three products of TF32 parts (on AMD as they are), so that nothing is lost.
    """
    if EMULATE:
        c = tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    elif a.dtype == tl.float32:
        c = tl.dot(a, b, c, input_precision=FLOAT32)
    else:
        c = tl.dot(a, b, c)
    return c


@jit
def narrow(x, like):
    """Compute x, in float32, rounded to nearest even in the dtype of `like`."""
    if EMULATE and like.dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        rounded = bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    else:
        rounded = x.to(like.dtype)
    return rounded


@jit
def tile_mask(m_row, o_column, D: tl.constexpr, D_BLOCK: tl.constexpr):
    """Compute which elements of a tile exist, from which of its rows do and from the head size."""
    mask = m_row[:, None]
    if D < D_BLOCK:
        mask = mask & (o_column < D)[None, :]
    return mask


@jit
def resident_tile(
    ptr, stride_token, stride_head, token, head, S, D: tl.constexpr, ROWS: tl.constexpr, PACK: tl.constexpr,
    D_BLOCK: tl.constexpr,
):  # fmt: skip
    """Read a tile of (S, heads, D): tokens from `token` on and heads from `head` on.

    The result is (ROWS, D_BLOCK), heads innermost.
    """
    o_row, o_column = tl.arange(0, ROWS), tl.arange(0, D_BLOCK)
    ptr += token.to(tl.int64) * stride_token + head.to(tl.int64) * stride_head
    ptr += o_row[:, None] // PACK * stride_token + o_row[:, None] % PACK * stride_head + o_column[None, :]
    return tl.load(ptr, mask=tile_mask(token + o_row // PACK < S, o_column, D, D_BLOCK), other=0.0)


@jit
def tile(
    source, stride_token, stride_head, token, head, S, D: tl.constexpr, ROWS: tl.constexpr, PACK: tl.constexpr,
    D_BLOCK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Read the same tile as `resident_tile`, through a tensor descriptor or a pointer."""
    if DESCRIPTORS:
        x = source.load([token, head, 0]).reshape((ROWS, D_BLOCK))
    else:
        x = resident_tile(source, stride_token, stride_head, token, head, S, D, ROWS, PACK, D_BLOCK)
    return x


@jit
def row_tokens(first, S_q, index_ptr, ROWS: tl.constexpr, PACK: tl.constexpr, HAS_INDEX: tl.constexpr):
    """Return (token among the queries, row among the keys) of each row of a tile; the latter is -1 for no token."""
    token = first + tl.arange(0, ROWS) // PACK
    row = tl.where(token < S_q, token, -1)
    if HAS_INDEX:
        row = tl.load(index_ptr + token, mask=token < S_q, other=-1)
    return token, row


@jit
def positions(position_ptr, o_token, m_token, HAS_WINDOW: tl.constexpr):
    """Read the positions of tokens; without a window nothing uses them, and no memory is read."""
    position = o_token
    if HAS_WINDOW:
        position = tl.load(position_ptr + o_token, mask=m_token, other=0)
    return position


@jit
def key_limits(end_ptr, position_ptr, key, S, window, HAS_WINDOW: tl.constexpr):
    """Return what bounds the queries that see a key, for `sees`: (subtree end, first depth out of the window)."""
    end = tl.load(end_ptr + key, mask=key < S, other=0)
    return end, positions(position_ptr, key, key < S, HAS_WINDOW) + window


@jit
def sees(row, depth, key, end, depth_end, HAS_WINDOW: tl.constexpr):
    """Compute the mask: `key <= row < end[key]`, and with a window `depth[row] - depth[key] < window`."""
    visible = (key <= row) & (row < end)
    if HAS_WINDOW:
        visible &= depth < depth_end
    return visible


@jit
def number_offset(token, key_head, member, stride, G: tl.constexpr):
    """Compute where the numbers of a tile begin: a scalar, so that no thread keeps 64-bit offsets.

    `stride` is S_q rounded up to a multiple of 16, so that whole vectors can be read.
    """
    return (key_head.to(tl.int64) * stride + token) * G + member


@jit
def row_offsets(G: tl.constexpr, ROWS: tl.constexpr, PACK: tl.constexpr):
    """Compute the offsets of the numbers of a tile's rows from `number_offset`."""
    o_row = tl.arange(0, ROWS)
    return o_row // PACK * G + o_row % PACK


@jit
def store_rows(
    ptr, x, token, head, S, H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, PACK: tl.constexpr,
    D_BLOCK: tl.constexpr,
):  # fmt: skip
    """Write rows (ROWS, D_BLOCK) of tokens from `token` and heads from `head` on into a contiguous (S, H, D)."""
    o_row, o_column = tl.arange(0, ROWS), tl.arange(0, D_BLOCK)
    ptr += (token.to(tl.int64) * H + head) * D
    ptr += (o_row[:, None] // PACK * H + o_row[:, None] % PACK) * D + o_column[None, :]
    tl.store(ptr, x, mask=tile_mask(token + o_row // PACK < S, o_column, D, D_BLOCK))


@jit(do_not_specialize=["S", "S_q", "list_stride", "window"])
def forward_kernel(
    # pointers: queries, tensor descriptors or pointers of keys and values, then what is written
    q_ptr,
    k_source,
    v_source,
    out_ptr,
    lse_ptr,
    # pointers: the mask and its lists
    end_ptr,
    position_ptr,
    query_position_ptr,
    index_ptr,
    list_ptr,
    full_ptr,
    total_ptr,
    # shapes and strides
    S,
    S_q,
    list_stride,
    number_stride,
    q_stride_token,
    q_stride_head,
    k_stride_token,
    k_stride_head,
    v_stride_token,
    v_stride_head,
    # constants
    window,
    scale2,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PACK: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """Compute out, and lse in base 2, which is +inf for a query that sees no key; scale2 is scale times log2(e)."""
    # a row's last queries have the longest lists, and the longest work is started first
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1) * PACK
    first = block * (ROWS // PACK)
    token, row = row_tokens(first, S_q, index_ptr, ROWS, PACK, HAS_INDEX)
    depth = positions(query_position_ptr, token, token < S_q, HAS_WINDOW)
    q = resident_tile(q_ptr, q_stride_token, q_stride_head, first, head, S_q, D, ROWS, PACK, D_BLOCK)
    out = tl.zeros((ROWS, D_BLOCK), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    full = tl.load(full_ptr + block)
    list_ptr += block.to(tl.int64) * list_stride
    # one loop over both kinds with the loads outside the branch keeps the loads pipelined
    for t in tl.range(0, tl.load(total_ptr + block)):
        key0 = tl.load(list_ptr + t) * KEYS
        k = tile(
            k_source, k_stride_token, k_stride_head, key0, head // G, S, D, KEYS, 1, D_BLOCK, DESCRIPTORS
        )
        v = tile(
            v_source, v_stride_token, v_stride_head, key0, head // G, S, D, KEYS, 1, D_BLOCK, DESCRIPTORS
        )
        score = product(q, k.T, tl.zeros((ROWS, KEYS), tl.float32))
        if t >= full:
            key = key0 + tl.arange(0, KEYS)
            end, depth_end = key_limits(end_ptr, position_ptr, key, S, window, HAS_WINDOW)
            visible = sees(
                row[:, None], depth[:, None], key[None, :], end[None, :], depth_end[None, :], HAS_WINDOW
            )
            score = tl.where(visible, score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 1) * scale2)
        # the maximum is -inf while a row has seen no key; subtracting it would give NaN
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        p = tl.math.exp2(score * scale2 - shift[:, None])
        keep = tl.math.exp2(top - shift)
        total = total * keep + tl.sum(p, 1)
        out = product(narrow(p, v), v, out * keep[:, None])
        top = higher
    seen = total > 0.0
    total = tl.where(seen, total, 1.0)
    out = out / total[:, None]
    lse = tl.where(seen, top + tl.math.log2(total), float("inf"))
    store_rows(out_ptr, narrow(out, q), first, head, S_q, H, D, ROWS, PACK, D_BLOCK)
    o_row = number_offset(first, head // G, head % G, number_stride, G) + row_offsets(G, ROWS, PACK)
    tl.store(lse_ptr + o_row, lse, mask=token < S_q)
