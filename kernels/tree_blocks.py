"""Lists the tiles of the attention matrix that hold a visible pair, full and partial ones, from `subtree_end` alone.

    S keys, S_q query rows, n_q and n_k blocks of query rows and of keys

A tile (query block, key block) is *skipped* when no query of it can see a key of it, *full* when every query sees
every key, so that no mask has to be computed, and *partial* otherwise. Where queries are consecutive rows and there is
no window, every tile that is not skipped holds a visible pair. With a window, or queries picked by `query_index`, the
test uses bounds of a block: it may keep a tile without a visible pair as partial, but never skips one that has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from silva.kernels.build import Build
from silva.kernels.dispatch import jit, runs_kernels, tl, triton

# sorting by these numbers gives the order of a list
FULL, PARTIAL, SKIPPED = 0, 1, 2
# beyond any row and any position
FAR = 1 << 30
# blocks that one step of the list kernel looks at
STEP = 256


class TileShape(NamedTuple):
    """Holds the tokens of a tile, and what its lists are indexed by.

    Attributes:
        queries: tokens of a query block.
        keys: tokens of a key block.
        by_key: False lists the key blocks of each query block, True the query blocks of each key block.
    """

    queries: int
    keys: int
    by_key: bool = False


class BlockLists(NamedTuple):
    """Holds one list of blocks per row: row r's is `entries[r, :total[r]]`.

    The full blocks come first, up to `full[r]`, then the partial ones, each ascending. The rows have the stride of the
    longest list there can be: a compact form would have to read its size back from the device, or take a prefix sum
    and a second pass, to save at most half.
    """

    entries: Tensor  # (n_rows, n_columns) int32
    full: Tensor  # (n_rows,) int32
    total: Tensor  # (n_rows,) int32


class TreeBlocks(NamedTuple):
    """Holds the lists of one row for every tile shape that was asked for, and what the mask of a partial tile needs.

    Attributes:
        lists: by tile shape.
        subtree_end: (S,) int32, as in `tree_attention`.
        window: as in `tree_attention`.
        position: (S,) int32, of the keys; only with a window.
        query_position: (S_q,) int32, of the queries; only with a window.
        query_index: (S_q,) int32, the key row of each query; None: `arange(S)`.
    """

    lists: dict[TileShape, BlockLists]
    subtree_end: Tensor
    window: int | None
    position: Tensor | None
    query_position: Tensor | None
    query_index: Tensor | None


def blocks_without_lists(
    subtree_end: Tensor, position: Tensor | None, window: int | None, query_index: Tensor | None
) -> TreeBlocks:
    """Build the mask alone, without lists; the arguments are those of `tree_blocks`.

    Raises:
        ValueError: a window without positions.
    """
    if window is not None and position is None:
        raise ValueError("tree_attention: a sliding window needs `position`")
    keys = position.int().contiguous() if position is not None and window is not None else None
    rows = None if query_index is None else query_index.int().contiguous()
    queries = keys if keys is None or rows is None else keys[rows.long()]
    return TreeBlocks({}, subtree_end.int().contiguous(), window, keys, queries, rows)


def tree_blocks(
    subtree_end: Tensor,
    shapes: Sequence[TileShape],
    *,
    position: Tensor | None = None,
    window: int | None = None,
    query_index: Tensor | None = None,
) -> TreeBlocks:
    """Build the lists of every shape on the device of `subtree_end`, without synchronising it with the host.

    Args:
        subtree_end: (S,) int.
        shapes: of the tiles that kernels visit; equal ones are built once.
        position: as in `tree_attention`.
        window: as in `tree_attention`.
        query_index: (S_q,) int, the key row of each query, within 0 .. S - 1, in any order. The nearer the rows
            of a block, the fewer tiles are kept.

    Raises:
        ValueError: a window without positions.
    """
    blocks = blocks_without_lists(subtree_end, position, window, query_index)
    build = _lists_on_device if runs_kernels(subtree_end) else _lists
    for shape in shapes:
        if shape not in blocks.lists:
            blocks.lists[shape] = build(blocks, shape)
    return blocks


# ---------------------------------------------------------------- plain torch


def classify(blocks: TreeBlocks, shape: TileShape) -> Tensor:
    """Compute what the lists say as a matrix, (n_q, n_k) int8 of FULL, PARTIAL and SKIPPED."""
    end, rows = blocks.subtree_end, _query_rows(blocks)
    first_row, last_row = _lowest(rows, shape.queries)[:, None], _highest(rows, shape.queries)[:, None]
    first_key = torch.arange(0, end.shape[0], shape.keys, device=end.device)
    last_key = first_key + shape.keys - 1
    skipped = (first_key > last_row) | (_highest(end, shape.keys) <= first_row)
    # keys past the last one get an end before every row, so that their tile is never full
    nearest_end = _lowest(F.pad(end, (0, -end.shape[0] % shape.keys), value=0), shape.keys)
    full = (last_key <= first_row) & (nearest_end > last_row)
    if rows.shape[0] % shape.queries:
        full[-1] = False
    depth, query_depth = blocks.position, blocks.query_position
    if blocks.window is not None and depth is not None and query_depth is not None:
        skipped |= _lowest(query_depth, shape.queries)[:, None] - _highest(depth, shape.keys) >= blocks.window
        full &= _highest(query_depth, shape.queries)[:, None] - _lowest(depth, shape.keys) < blocks.window
    return torch.where(full, FULL, PARTIAL).masked_fill(skipped, SKIPPED).to(torch.int8)


def _query_rows(blocks: TreeBlocks) -> Tensor:
    if blocks.query_index is not None:
        return blocks.query_index
    return torch.arange(blocks.subtree_end.shape[0], dtype=torch.int32, device=blocks.subtree_end.device)


def _lowest(x: Tensor, size: int) -> Tensor:
    """Compute the minimum of each run of `size` values; the last run may be shorter."""
    count = -(-x.shape[0] // size)
    return F.pad(x, (0, count * size - x.shape[0]), value=FAR).view(count, size).amin(1)


def _highest(x: Tensor, size: int) -> Tensor:
    return -_lowest(-x, size)


def _lists(blocks: TreeBlocks, shape: TileShape) -> BlockLists:
    kind = classify(blocks, shape)
    if shape.by_key:
        kind = kind.T
    return BlockLists(
        entries=torch.argsort(kind, dim=1, stable=True).int(),
        full=(kind == FULL).sum(1).int(),
        total=(kind != SKIPPED).sum(1).int(),
    )


# ---------------------------------------------------------------- kernels


@jit(do_not_specialize=["S", "S_q", "n_q", "n_k"])
def _bounds_kernel(
    # pointers
    end_ptr,
    position_ptr,
    query_position_ptr,
    index_ptr,
    query_ptr,
    key_ptr,
    # shapes
    S,
    S_q,
    n_q,
    n_k,
    # constants
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    FAR: tl.constexpr,
):
    """Compute the bounds of every block, one program per block of queries, then one per block of keys.

    The rows of the (4, n_q) bounds are first and last row, then smallest and largest position. Those of the (4, n_k)
    bounds are smallest and largest subtree end, then smallest and largest position.
    """
    block = tl.program_id(0)
    if block < n_q:
        o_row = block * QUERIES + tl.arange(0, QUERIES)
        m_row = o_row < S_q
        row = o_row
        if HAS_INDEX:
            row = tl.load(index_ptr + o_row, mask=m_row, other=0)
        tl.store(query_ptr + block, tl.min(tl.where(m_row, row, FAR), 0))
        tl.store(query_ptr + n_q + block, tl.max(tl.where(m_row, row, -FAR), 0))
        if HAS_WINDOW:
            query_depth = tl.load(query_position_ptr + o_row, mask=m_row, other=0)
            tl.store(query_ptr + 2 * n_q + block, tl.min(tl.where(m_row, query_depth, FAR), 0))
            tl.store(query_ptr + 3 * n_q + block, tl.max(tl.where(m_row, query_depth, -FAR), 0))
    else:
        block -= n_q
        o_key = block * KEYS + tl.arange(0, KEYS)
        m_key = o_key < S
        # keys past the last one get an end before every row, so that their tile is never full
        end = tl.load(end_ptr + o_key, mask=m_key, other=0)
        tl.store(key_ptr + block, tl.min(end, 0))
        tl.store(key_ptr + n_k + block, tl.max(end, 0))
        if HAS_WINDOW:
            depth = tl.load(position_ptr + o_key, mask=m_key, other=0)
            tl.store(key_ptr + 2 * n_k + block, tl.min(tl.where(m_key, depth, FAR), 0))
            tl.store(key_ptr + 3 * n_k + block, tl.max(tl.where(m_key, depth, -FAR), 0))


@jit
def _tile_kinds(
    query_ptr,
    key_ptr,
    query,
    key,
    m_pair,
    S_q,
    n_q,
    n_k,
    window,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Compute (full, partial) of tiles (query, key) exactly as `classify` does."""
    first_row = tl.load(query_ptr + query, mask=m_pair, other=0)
    last_row = tl.load(query_ptr + n_q + query, mask=m_pair, other=0)
    nearest_end = tl.load(key_ptr + key, mask=m_pair, other=0)
    farthest_end = tl.load(key_ptr + n_k + key, mask=m_pair, other=0)
    seen = m_pair & (key * KEYS <= last_row) & (farthest_end > first_row)
    full = (key * KEYS + KEYS - 1 <= first_row) & (nearest_end > last_row) & ((query + 1) * QUERIES <= S_q)
    if HAS_WINDOW:
        shallowest = tl.load(query_ptr + 2 * n_q + query, mask=m_pair, other=0)
        deepest = tl.load(query_ptr + 3 * n_q + query, mask=m_pair, other=0)
        lowest = tl.load(key_ptr + 2 * n_k + key, mask=m_pair, other=0)
        highest = tl.load(key_ptr + 3 * n_k + key, mask=m_pair, other=0)
        seen &= shallowest - highest < window
        full &= deepest - lowest < window
    return seen & full, seen & (full == 0)


@jit(do_not_specialize=["S_q", "n_q", "n_k", "window"])
def _lists_kernel(
    # pointers
    query_ptr,
    key_ptr,
    list_ptr,
    full_ptr,
    total_ptr,
    # shapes
    S_q,
    n_q,
    n_k,
    # constants
    window,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    BY_KEY: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    STEP: tl.constexpr,
):
    """Compute one list per program: count its full blocks, then write both kinds, the partial ones last."""
    row = tl.program_id(0)
    lane = tl.arange(0, STEP)
    same = row + lane * 0
    columns = n_q if BY_KEY else n_k
    full_count = tl.zeros((), tl.int32)
    for start in range(0, columns, STEP):
        column = start + lane
        if BY_KEY:
            query, key = column, same
        else:
            query, key = same, column
        full, partial = _tile_kinds(
            query_ptr, key_ptr, query, key, column < columns, S_q, n_q, n_k, window, QUERIES, KEYS, HAS_WINDOW
        )
        full_count += tl.sum(full.to(tl.int32), 0)
    list_ptr += row.to(tl.int64) * columns
    next_full, next_partial = tl.zeros((), tl.int32), full_count
    for start in range(0, columns, STEP):
        column = start + lane
        if BY_KEY:
            query, key = column, same
        else:
            query, key = same, column
        full, partial = _tile_kinds(
            query_ptr, key_ptr, query, key, column < columns, S_q, n_q, n_k, window, QUERIES, KEYS, HAS_WINDOW
        )
        o_full, o_partial = tl.cumsum(full.to(tl.int32), 0), tl.cumsum(partial.to(tl.int32), 0)
        tl.store(list_ptr + next_full + o_full - 1, column, mask=full)
        tl.store(list_ptr + next_partial + o_partial - 1, column, mask=partial)
        next_full += tl.sum(full.to(tl.int32), 0)
        next_partial += tl.sum(partial.to(tl.int32), 0)
    tl.store(full_ptr + row, full_count)
    tl.store(total_ptr + row, next_partial)


# ---------------------------------------------------------------- launch


def _lists_on_device(blocks: TreeBlocks, shape: TileShape) -> BlockLists:
    end, index = blocks.subtree_end, blocks.query_index
    S, S_q = end.shape[0], (end if index is None else index).shape[0]
    n_q, n_k = triton.cdiv(S_q, shape.queries), triton.cdiv(S, shape.keys)
    rows, columns = (n_k, n_q) if shape.by_key else (n_q, n_k)
    lists = BlockLists(end.new_empty(rows, columns), end.new_empty(rows), end.new_empty(rows))
    if not rows:
        return lists
    query_bounds, key_bounds = end.new_empty(4, n_q), end.new_empty(4, n_k)
    masks: dict[str, Any] = {"HAS_WINDOW": blocks.window is not None}
    masks |= {"QUERIES": shape.queries, "KEYS": shape.keys}
    with torch.cuda.device_of(end):
        _bounds_kernel[(n_q + n_k,)](
            end, blocks.position, blocks.query_position, index, query_bounds, key_bounds, S, S_q, n_q, n_k,
            HAS_INDEX=index is not None, FAR=FAR, **masks,
        )  # fmt: skip
        _lists_kernel[(rows,)](
            query_bounds, key_bounds, *lists, S_q, n_q, n_k, blocks.window or 0,
            BY_KEY=shape.by_key, STEP=STEP, **masks,
        )  # fmt: skip
    return lists


def aot_builds(capability: int) -> list[Build]:
    """List one build of each direction, with and without everything a mask can have."""
    builds = []
    numbers = dict.fromkeys(("S", "S_q", "n_q", "n_k"), "i32")
    for every in (False, True):
        optional = dict.fromkeys(("position_ptr", "query_position_ptr", "index_ptr"), "*i32")
        constants: dict[str, Any] = {"HAS_WINDOW": every, "QUERIES": 16, "KEYS": 64}
        if not every:
            constants |= dict.fromkeys(optional)
        signature = dict.fromkeys(("end_ptr", "query_ptr", "key_ptr"), "*i32") | optional | numbers
        bounds = constants | {"HAS_INDEX": every, "FAR": FAR}
        suffix = " with window and index" if every else ""
        builds.append(_build(f"tree_blocks bounds{suffix}", _bounds_kernel, signature, bounds))
        signature = dict.fromkeys(("query_ptr", "key_ptr", "list_ptr", "full_ptr", "total_ptr"), "*i32")
        signature |= numbers | {"window": "i32"}
        for by_key in (False, True):
            lists = constants | {"BY_KEY": by_key, "STEP": STEP}
            name = f"tree_blocks lists by {'key' if by_key else 'query'}{suffix}"
            builds.append(_build(name, _lists_kernel, signature, lists))
    return builds


def _build(name: str, kernel: Any, signature: dict[str, str], constants: dict[str, Any]) -> Build:
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else signature[n] for n in names}
    constants = {n: value for n, value in constants.items() if n in names}
    return Build(name, kernel, signature, constants, aligned=tuple(n for n in names if n.endswith("_ptr")))
