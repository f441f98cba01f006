"""Computes the backward pass of tree attention: one kernel for the queries' gradient, one for the keys' and values'.

Each gradient element is summed by one program in a fixed order, without atomics: the same inputs give the same
bits. Names and layouts are those of the forward kernel.
"""

from __future__ import annotations

from silva.kernels.dispatch import jit, tl
from silva.kernels.tree_attention_forward import (
    key_limits,
    narrow,
    number_offset,
    positions,
    product,
    resident_tile,
    row_offsets,
    row_tokens,
    sees,
    store_rows,
    tile,
)


@jit(do_not_specialize=["S", "S_q", "list_stride", "window"])
def query_gradient_kernel(
    # pointers: what is read once, tensor descriptors or pointers, then what is written
    q_ptr,
    out_ptr,
    grad_ptr,
    k_source,
    v_source,
    lse_ptr,
    delta_ptr,
    dq_ptr,
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
    grad_stride_token,
    grad_stride_head,
    k_stride_token,
    k_stride_head,
    v_stride_token,
    v_stride_head,
    # constants
    window,
    scale,
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
    """Compute dq, and delta = sum(out * grad) of every (token, head), which the other kernel needs too."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1) * PACK
    first = block * (ROWS // PACK)
    token, row = row_tokens(first, S_q, index_ptr, ROWS, PACK, HAS_INDEX)
    depth = positions(query_position_ptr, token, token < S_q, HAS_WINDOW)
    o_row = number_offset(first, head // G, head % G, number_stride, G) + row_offsets(G, ROWS, PACK)
    lse = tl.load(lse_ptr + o_row, mask=token < S_q, other=float("inf"))
    grad = resident_tile(
        grad_ptr, grad_stride_token, grad_stride_head, first, head, S_q, D, ROWS, PACK, D_BLOCK
    )
    out = resident_tile(out_ptr, H * D, D, first, head, S_q, D, ROWS, PACK, D_BLOCK)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(delta_ptr + o_row, delta, mask=token < S_q)
    q = resident_tile(q_ptr, q_stride_token, q_stride_head, first, head, S_q, D, ROWS, PACK, D_BLOCK)
    dq = tl.zeros((ROWS, D_BLOCK), tl.float32)
    full = tl.load(full_ptr + block)
    list_ptr += block.to(tl.int64) * list_stride
    for t in tl.range(0, tl.load(total_ptr + block)):
        key0 = tl.load(list_ptr + t) * KEYS
        k = tile(
            k_source, k_stride_token, k_stride_head, key0, head // G, S, D, KEYS, 1, D_BLOCK, DESCRIPTORS
        )
        v = tile(
            v_source, v_stride_token, v_stride_head, key0, head // G, S, D, KEYS, 1, D_BLOCK, DESCRIPTORS
        )
        score = product(q, k.T, tl.zeros((ROWS, KEYS), tl.float32))
        p = tl.math.exp2(score * scale2 - lse[:, None])
        if t >= full:
            key = key0 + tl.arange(0, KEYS)
            end, depth_end = key_limits(end_ptr, position_ptr, key, S, window, HAS_WINDOW)
            visible = sees(
                row[:, None], depth[:, None], key[None, :], end[None, :], depth_end[None, :], HAS_WINDOW
            )
            p = tl.where(visible, p, 0.0)
        dp = product(grad, v.T, tl.zeros((ROWS, KEYS), tl.float32))
        dq = product(narrow(p * (dp - delta[:, None]), k), k, dq)
    store_rows(dq_ptr, narrow(dq * scale, q), first, head, S_q, H, D, ROWS, PACK, D_BLOCK)


@jit
def _key_step(
    dk, dv, k, v, key, end, depth_end, t, head, S_q, number_stride, scale2,
    q_source, grad_source, q_stride_token, q_stride_head, grad_stride_token, grad_stride_head,
    lse_ptr, delta_ptr, query_position_ptr, index_ptr, list_ptr,
    G: tl.constexpr, D: tl.constexpr, D_BLOCK: tl.constexpr, ROWS: tl.constexpr, PACK: tl.constexpr,
    MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_INDEX: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Compute what one query tile adds to dk and dv.

    Everything is transposed, so that keys are the rows: p and its gradient go from registers into the products with
    grad and q.
    """
    first = tl.load(list_ptr + t // (G // PACK)) * (ROWS // PACK)
    member = t % (G // PACK) * PACK
    q_head = head * G + member
    q = tile(q_source, q_stride_token, q_stride_head, first, q_head, S_q, D, ROWS, PACK, D_BLOCK, DESCRIPTORS)
    grad = tile(
        grad_source,
        grad_stride_token,
        grad_stride_head,
        first,
        q_head,
        S_q,
        D,
        ROWS,
        PACK,
        D_BLOCK,
        DESCRIPTORS,
    )
    o_first = number_offset(first, head, member, number_stride, G)
    o_row = row_offsets(G, ROWS, PACK)
    if MASKED:
        exists = first + tl.arange(0, ROWS) // PACK < S_q
        lse = tl.load(lse_ptr + o_first + o_row, mask=exists, other=float("inf"))
        delta = tl.load(delta_ptr + o_first + o_row, mask=exists, other=0.0)
    else:
        lse, delta = tl.load(lse_ptr + o_first + o_row), tl.load(delta_ptr + o_first + o_row)
    score = product(k, q.T, tl.zeros((key.shape[0], ROWS), tl.float32))
    p = tl.math.exp2(score * scale2 - lse[None, :])
    if MASKED:
        token, row = row_tokens(first, S_q, index_ptr, ROWS, PACK, HAS_INDEX)
        depth = positions(query_position_ptr, token, token < S_q, HAS_WINDOW)
        visible = sees(
            row[None, :], depth[None, :], key[:, None], end[:, None], depth_end[:, None], HAS_WINDOW
        )
        p = tl.where(visible, p, 0.0)
    dp = product(v, grad.T, tl.zeros((key.shape[0], ROWS), tl.float32))
    dv = product(narrow(p, v), grad, dv)
    dk = product(narrow(p * (dp - delta[None, :]), k), q, dk)
    return dk, dv


@jit(do_not_specialize=["S", "S_q", "list_stride", "window"])
def key_gradient_kernel(
    # pointers: what is read once, tensor descriptors or pointers, numbers of each row, then what is written
    k_ptr,
    v_ptr,
    q_source,
    grad_source,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
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
    grad_stride_token,
    grad_stride_head,
    k_stride_token,
    k_stride_head,
    v_stride_token,
    v_stride_head,
    # constants
    window,
    scale,
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
    """Compute dk and dv, summed over the G query heads of a key head."""
    block, head = tl.program_id(0), tl.program_id(1)
    key0 = block * KEYS
    key = key0 + tl.arange(0, KEYS)
    k = resident_tile(k_ptr, k_stride_token, k_stride_head, key0, head, S, D, KEYS, 1, D_BLOCK)
    v = resident_tile(v_ptr, v_stride_token, v_stride_head, key0, head, S, D, KEYS, 1, D_BLOCK)
    dk = tl.zeros((KEYS, D_BLOCK), tl.float32)
    dv = tl.zeros((KEYS, D_BLOCK), tl.float32)
    list_ptr += block.to(tl.int64) * list_stride
    # one flat loop runs over query tiles and, innermost, over the packs of heads of the group
    full = tl.load(full_ptr + block) * (G // PACK)
    total = tl.load(total_ptr + block) * (G // PACK)
    for t in tl.range(0, full):
        dk, dv = _key_step(
            dk, dv, k, v, key, key, key, t, head, S_q, number_stride, scale2,
            q_source, grad_source, q_stride_token, q_stride_head, grad_stride_token, grad_stride_head,
            lse_ptr, delta_ptr, query_position_ptr, index_ptr, list_ptr,
            G, D, D_BLOCK, ROWS, PACK, False, HAS_WINDOW, HAS_INDEX, DESCRIPTORS,
        )  # fmt: skip
    # loaded only here, because the first loop has no register to spare
    end, depth_end = key_limits(end_ptr, position_ptr, key, S, window, HAS_WINDOW)
    for t in tl.range(full, total):
        dk, dv = _key_step(
            dk, dv, k, v, key, end, depth_end, t, head, S_q, number_stride, scale2,
            q_source, grad_source, q_stride_token, q_stride_head, grad_stride_token, grad_stride_head,
            lse_ptr, delta_ptr, query_position_ptr, index_ptr, list_ptr,
            G, D, D_BLOCK, ROWS, PACK, True, HAS_WINDOW, HAS_INDEX, DESCRIPTORS,
        )  # fmt: skip
    H_KV: tl.constexpr = H // G
    store_rows(dk_ptr, narrow(dk * scale, k), key0, head, S, H_KV, D, KEYS, 1, D_BLOCK)
    store_rows(dv_ptr, narrow(dv, v), key0, head, S, H_KV, D, KEYS, 1, D_BLOCK)
