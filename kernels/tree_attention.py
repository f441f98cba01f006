"""Computes the attention of every token to its ancestors over packed trees, in Triton, with a deterministic backward.

    S keys, S_q query rows, H query heads, H_kv key heads, D head size, G = H / H_kv

Plain documents, shared prompts and whole trees are one case: the mask is `subtree_end`, and block lists built once
per row tell the kernels which tiles to visit. Where the kernels cannot run, the definition in plain torch does, in
blocks of queries: on CPU tensors (except with `TRITON_INTERPRET=1`, where the kernels are interpreted), in float64,
and for head sizes the kernels do not take: the copy engine moves rows in units of 16 bytes, and beyond 256 columns a
tile's accumulators do not fit into registers.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from silva.kernels import reference
from silva.kernels.build import Build
from silva.kernels.dispatch import runs_kernels, triton
from silva.kernels.reference import QueryBlock
from silva.kernels.tree_attention_backward import key_gradient_kernel, query_gradient_kernel
from silva.kernels.tree_attention_forward import forward_kernel
from silva.kernels.tree_attention_tiles import Problem, Tile, Tiles, problem, shipped_tiles, tiles
from silva.kernels.tree_blocks import TileShape, TreeBlocks, tree_blocks

if triton is not None:
    from triton.tools.tensor_descriptor import TensorDescriptor

Blocks = TreeBlocks | list[QueryBlock]

LOG2_E = math.log2(math.e)
SMALLEST_HEAD, LARGEST_HEAD = 16, 256
# Elements. With strides below this, offsets within a tile of 128 rows fit into 32 bits; the tile's own offset has 64.
LARGEST_STRIDE = 1 << 24


def attention_blocks(
    subtree_end: Tensor,
    *,
    group: int,
    size: int,
    dtype: torch.dtype,
    position: Tensor | None = None,
    window: int | None = None,
    query_index: Tensor | None = None,
) -> Blocks:
    """Build what `tree_attention` needs to know of the mask; it is the same for every layer, so built once per row.

    On the GPU this is a few small kernels and no synchronisation with the host.

    Args:
        subtree_end: as in `tree_attention`.
        group: query heads per key head.
        size: of a head.
        dtype: of the queries.
        position: as in `tree_attention`.
        window: as in `tree_attention`.
        query_index: as in `tree_attention`.

    Raises:
        ValueError: a window without positions.
    """
    masks: dict[str, Any] = {"position": position, "window": window, "query_index": query_index}
    if not _kernels_take(subtree_end, size, dtype):
        return reference.query_blocks(subtree_end, **masks)
    return tree_blocks(subtree_end, tile_shapes(problem(subtree_end.device, size, dtype, group)), **masks)


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
    blocks: Blocks | None = None,
) -> Tensor:
    """Compute the attention of every token to its ancestors: token i sees j iff `j <= i < subtree_end[j]`.

    It is differentiable in q, k and v, and the gradients are the same bits every time. Tensors whose heads are
    contiguous, with strides that are multiples of 16 bytes and below `LARGEST_STRIDE`, are read as they are; others
    are copied.

    Args:
        q: (S_q, H, D), with H a multiple of H_kv.
        k: (S, H_kv, D), in the dtype of `q`.
        v: (S, H_kv, D), in the dtype of `q`.
        subtree_end: (S,) int, one past the last token of the subtree under each token.
        scale: softmax scale, above 0, default `D ** -0.5`.
        position: (S,) int, depth of each token in its tree; needed with `window`.
        window: token i sees j only if also `position[i] - position[j] < window` (Mistral's sliding window).
        query_index: (S_q,) int, the row of each query among the S keys, in any order; default `arange(S)`.
        blocks: of `attention_blocks` with the same arguments, if they are at hand; position, window and query_index
            are then taken from them.

    Returns:
        (S_q, H, D) in the dtype of `q`; zero for a query that sees no key.

    Raises:
        ValueError: shapes or dtypes that do not fit together, a scale that is not above 0, a window without positions,
            or blocks that were built for other shapes.
    """
    _check_shapes(q, k, v, subtree_end)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if scale <= 0:
        raise ValueError(f"tree_attention: the scale is {scale}, which must be above 0")
    if blocks is None:
        blocks = attention_blocks(
            subtree_end,
            group=q.shape[1] // k.shape[1],
            size=q.shape[2],
            dtype=q.dtype,
            position=position,
            window=window,
            query_index=query_index,
        )
    queries, keys = _extent(blocks, subtree_end)
    if (queries, keys) != (q.shape[0], k.shape[0]):
        raise ValueError(
            f"tree_attention: {q.shape[0]} queries and {k.shape[0]} keys, but the blocks are of {queries} and {keys}"
        )
    if isinstance(blocks, list):
        return reference.tree_attention(q, k, v, subtree_end, scale=scale, blocks=blocks)
    return _TreeAttention.apply(q, k, v, blocks, scale)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, subtree_end: Tensor) -> None:
    """Check what the kernels rely on: they would read a tensor with too few rows beyond its end."""
    fit = q.dim() == k.dim() == 3 and k.shape == v.shape and q.shape[2] == k.shape[2]
    fit = fit and q.shape[1] % k.shape[1] == 0 and subtree_end.shape == k.shape[:1]
    if not fit or not q.dtype == k.dtype == v.dtype:
        given = ", ".join(
            f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}" for x in (q, k, v, subtree_end)
        )
        raise ValueError(f"tree_attention: q, k, v and subtree_end do not fit together: {given}")


def _extent(blocks: Blocks, subtree_end: Tensor) -> tuple[int, int]:
    """Return for how many query rows and keys the blocks were built; those of the CPU know only the number of rows."""
    if isinstance(blocks, list):
        return blocks[-1].rows.stop if blocks else 0, len(subtree_end)
    keys = len(blocks.subtree_end)
    return keys if blocks.query_index is None else len(blocks.query_index), keys


def _kernels_take(x: Tensor, size: int, dtype: torch.dtype) -> bool:
    sizes = SMALLEST_HEAD <= size <= LARGEST_HEAD and size * dtype.itemsize % 16 == 0
    return runs_kernels(x) and sizes and dtype in (torch.bfloat16, torch.float16, torch.float32)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: TreeBlocks, scale: float) -> Tensor:
        q, k, v = _readable(q), _readable(k), _readable(v)
        out, lse = _forward(q, k, v, blocks, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.blocks, ctx.scale = blocks, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        return *_backward(q, k, v, out, lse, grad, ctx.blocks, ctx.scale), None, None


# ---------------------------------------------------------------- launch


def tile_shapes(what: Problem) -> tuple[TileShape, TileShape, TileShape]:
    """Return the shapes of the tiles whose lists the forward kernel and the two backward kernels read."""
    forward, query_gradient, key_gradient = tiles(what)
    return (
        TileShape(forward.rows // what.pack, forward.keys),
        TileShape(query_gradient.rows // what.pack, query_gradient.keys),
        TileShape(key_gradient.rows // what.pack, key_gradient.keys, by_key=True),
    )


class _Launcher:
    """Launches the three kernels of one call, and holds what they share."""

    def __init__(self, q: Tensor, k: Tensor, blocks: TreeBlocks) -> None:
        self.S_q, self.H, self.D = q.shape
        self.S, self.H_kv, _ = k.shape
        self.G = self.H // self.H_kv
        # the stride of the numbers of each row, such as lse
        self.number_stride = -(-self.S_q // 16) * 16
        self.what = problem(q.device, self.D, q.dtype, self.G)
        self.tiles, self.shapes = tiles(self.what), tile_shapes(self.what)
        self.blocks = blocks
        if not set(self.shapes) <= blocks.lists.keys():
            raise ValueError("tree_attention: `blocks` were built for other heads or another dtype")

    def queries(self, x: Tensor, tile: Tile) -> Any:
        """Return what a loop reads tiles of tokens by packed heads through, from (S_q, H, D)."""
        box = [tile.rows // self.what.pack, self.what.pack, self.what.columns]
        return self._source(x, box)

    def keys(self, x: Tensor, tile: Tile) -> Any:
        """Return what a loop reads tiles of tokens of one head through, from (S, H_kv, D)."""
        return self._source(x, [tile.keys, 1, self.what.columns])

    def _source(self, x: Tensor, box: list[int]) -> Any:
        return TensorDescriptor(x, list(x.shape), list(x.stride()), box) if self.what.descriptors else x

    def __call__(self, kernel: Any, number: int, *arguments: Any, **constants: Any) -> None:
        """Run one kernel.

        Args:
            kernel: the function.
            number: 0 for the forward kernel, 1 and 2 for the gradients of queries and of keys.
            *arguments: its first arguments, the tensors.
            **constants: its strides and scales.
        """
        tile, shape, blocks = self.tiles[number], self.shapes[number], self.blocks
        lists = blocks.lists[shape]
        by_query = (triton.cdiv(self.S_q, shape.queries), self.H // self.what.pack)
        grid = (triton.cdiv(self.S, shape.keys), self.H_kv) if shape.by_key else by_query
        with torch.cuda.device_of(blocks.subtree_end):
            kernel[grid](
                *arguments,
                blocks.subtree_end, blocks.position, blocks.query_position, blocks.query_index, *lists,
                S=self.S, S_q=self.S_q, list_stride=lists.entries.stride(0), number_stride=self.number_stride,
                window=blocks.window or 0, **constants, H=self.H, G=self.G, D=self.D, D_BLOCK=self.what.columns,
                ROWS=tile.rows, PACK=self.what.pack, KEYS=tile.keys,
                HAS_WINDOW=blocks.window is not None, HAS_INDEX=blocks.query_index is not None,
                DESCRIPTORS=self.what.descriptors, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip


def _strides(**tensors: Tensor) -> dict[str, int]:
    return {
        f"{name}_stride_{step}": stride
        for name, tensor in tensors.items()
        for step, stride in zip(("token", "head"), tensor.stride(), strict=False)
    }


def _forward(q: Tensor, k: Tensor, v: Tensor, blocks: TreeBlocks, scale: float) -> tuple[Tensor, Tensor]:
    """Compute out (S_q, H, D), and lse (H_kv, S_q rounded up, G) float32 to base 2."""
    launch = _Launcher(q, k, blocks)
    out = q.new_empty(q.shape)
    lse = q.new_empty(launch.H_kv, launch.number_stride, launch.G, dtype=torch.float32)
    if q.numel():
        tile = launch.tiles.forward
        tensors = q, launch.keys(k, tile), launch.keys(v, tile), out, lse
        launch(forward_kernel, 0, *tensors, scale2=scale * LOG2_E, **_strides(q=q, k=k, v=v))
    return out, lse


def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad: Tensor, blocks: TreeBlocks, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    launch = _Launcher(q, k, blocks)
    delta, grad = torch.empty_like(lse), _readable(grad)
    scales: dict[str, Any] = {"scale": scale, "scale2": scale * LOG2_E}
    tile = launch.tiles.query_gradient
    tensors = q, out, grad, launch.keys(k, tile), launch.keys(v, tile), lse, delta, dq
    launch(query_gradient_kernel, 1, *tensors, **scales, **_strides(q=q, grad=grad, k=k, v=v))
    tile = launch.tiles.key_gradient
    tensors = k, v, launch.queries(q, tile), launch.queries(grad, tile), lse, delta, dk, dv
    launch(key_gradient_kernel, 2, *tensors, **scales, **_strides(q=q, grad=grad, k=k, v=v))
    return dq, dk, dv


def _readable(x: Tensor) -> Tensor:
    """Return `x`, or a copy where the copy engine could not read it in place."""
    *steps, last = (stride * x.itemsize for stride in x.stride())
    in_place = last == x.itemsize and x.data_ptr() % 16 == 0
    in_place = in_place and all(0 < step < LARGEST_STRIDE * x.itemsize and step % 16 == 0 for step in steps)
    return x if in_place else x.clone(memory_format=torch.contiguous_format)


# ---------------------------------------------------------------- ahead of time


def aot_builds(capability: int) -> list[Build]:
    """List the builds: the shipped tiles of common groups of heads and every head size, and all masks on one of them.

    Args:
        capability: 90 for sm_90; 0 for a GPU that is not NVIDIA's.
    """
    architecture = f"sm_{capability}"
    builds = []
    for size, group in [(128, 4), (128, 1), (128, 8), (128, 2), (64, 4), (64, 1), (96, 1), (256, 2)]:
        builds += _builds(Problem(architecture, 1 << (size - 1).bit_length(), "bfloat16", group), size)
    main = Problem(architecture, 128, "bfloat16", 4)
    for window, index in [(True, False), (False, True), (True, True)]:
        builds += _builds(main, 128, window=window, index=index)
    builds += _builds(main._replace(dtype="float16"), 128)
    # elsewhere float32 products are chosen by the GPU at hand
    if capability:
        # float32 with 256 columns spills, whatever the tile
        for columns in (64, 128):
            builds += _builds(main._replace(dtype="float32", columns=columns), columns)
    return builds


def _products(what: Problem, field: str) -> Literal["any", "hgmma"]:
    """Tell which tensor-core products a kernel must have.

    Hopper's take no transposed operands of 32 bits, and they take at least 64 rows, with which a key gradient of 256
    columns spills in every form tried.
    """
    without = what.dtype == "float32" or (field == "key_gradient" and what.columns == 256)
    return "any" if without else "hgmma"


def _builds(what: Problem, size: int, *, window: bool = False, index: bool = False) -> list[Build]:
    element = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[what.dtype]
    kernels = (forward_kernel, query_gradient_kernel, key_gradient_kernel)
    builds = []
    for kernel, field, tile in zip(kernels, Tiles._fields, shipped_tiles(what), strict=True):
        constants: dict[str, Any] = {
            "H": 8 * what.group, "G": what.group, "D": size, "D_BLOCK": what.columns, "ROWS": tile.rows,
            "PACK": what.pack, "KEYS": tile.keys, "HAS_WINDOW": window, "HAS_INDEX": index,
            "DESCRIPTORS": what.descriptors,
        }  # fmt: skip
        constants |= {} if window else {"position_ptr": None, "query_position_ptr": None}
        constants |= {} if index else {"index_ptr": None}
        by_query = f"tensordesc<{element}[{tile.rows // what.pack}, {what.pack}, {what.columns}]>"
        by_key = f"tensordesc<{element}[{tile.keys}, 1, {what.columns}]>"
        if not what.descriptors:
            by_query = by_key = f"*{element}"
        types = dict.fromkeys(("q_source", "grad_source"), by_query)
        types |= dict.fromkeys(("k_source", "v_source"), by_key)
        types |= dict.fromkeys(("lse_ptr", "delta_ptr"), "*fp32")
        values = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "grad_ptr", "dq_ptr", "dk_ptr", "dv_ptr")
        types |= dict.fromkeys(values, f"*{element}")
        types |= dict.fromkeys(("scale", "scale2"), "fp32")
        types |= dict.fromkeys(("S", "S_q", "list_stride", "window"), "i32")
        names = kernel.arg_names
        strides = [name for name in names if "_stride_" in name or name == "number_stride"]
        types |= dict.fromkeys(strides, "i32")
        signature = {name: "constexpr" if name in constants else types.get(name, "*i32") for name in names}
        shape = f"{tile.rows}x{tile.keys} w{tile.warps} s{tile.stages}"
        masks = " window" * window + " index" * index
        title = f"D{size} G{what.group} {element}{masks} {shape}"
        builds.append(
            Build(
                f"tree_attention {field} {title}",
                kernel,
                signature,
                {name: value for name, value in constants.items() if name in names},
                aligned=(*strides, *(name for name in names if signature[name].startswith("*"))),
                warps=tile.warps,
                stages=tile.stages,
                products=_products(what, field),
            )
        )
    return builds
