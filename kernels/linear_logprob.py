"""Computes log-probs of chosen tokens from hidden states and the output matrix, exactly, with logits a tile at a time.

    L scored positions, H hidden size, V vocabulary, R rows of the output matrix on this process (V / tp),
    P x C a tile of logits: P positions, C rows of the output matrix

The products are cuBLAS's: without warp specialisation, Triton's are much slower on Hopper. A tile of logits in float32
goes from the product to one elementwise kernel, which reduces it (forward) or turns it into the slope (backward). A
tile is long on the side of which there is more, rows or positions: the gradient of the other side is then complete
after one product, and only one of the two gradients is summed in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from silva.kernels.build import Build
from silva.kernels.dispatch import jit, runs_kernels, tl, triton
from silva.kernels.products import product

# positions or rows of a tile: more make no product faster
LONGEST = 8192
# A tile has 1/16 of all logits, within these bounds: 16 to 256 MiB in float32, and half of it for a bfloat16 slope.
SMALLEST_TILE, LARGEST_TILE = 1 << 22, 1 << 26
# columns per step of the kernels: eight per thread of four warps
COLUMN_BLOCK = 1024


# ---------------------------------------------------------------- kernels: one tile of logits


# The numbers of a tile's positions are slices that begin anywhere, so their alignment is no reason to compile again.
@jit(
    do_not_specialize=["first_column"],
    do_not_specialize_on_alignment=["target_ptr", "highest_ptr", "total_ptr", "chosen_ptr"],
)
def _reduce_kernel(
    # pointers
    logits_ptr,
    target_ptr,
    highest_ptr,
    total_ptr,
    chosen_ptr,
    # shapes and strides
    columns,
    stride,
    first_column,
    # constants
    scale,
    BLOCK: tl.constexpr,
):
    """Compute the online log-sum-exp: one program folds one position's columns of the tile into its running values."""
    i = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + i * stride
    # every lane keeps its own running maximum, so that the threads are reduced once at the end and not in every step
    top = tl.full((BLOCK,), -1e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        o_column = start + tl.arange(0, BLOCK)
        m_column = o_column < columns
        x = tl.load(row_ptr + o_column, mask=m_column, other=-float("inf")) * scale
        higher = tl.maximum(top, x)
        keep = tl.exp(top - higher)
        total = total * keep + tl.exp(x - higher)
        top = higher
    before = tl.load(highest_ptr + i)
    highest = tl.maximum(tl.max(top, 0), before)
    lane, kept = tl.exp(top - highest), tl.exp(before - highest)
    tl.store(highest_ptr + i, highest)
    tl.store(total_ptr + i, tl.load(total_ptr + i) * kept + tl.sum(total * lane, 0))
    target = tl.load(target_ptr + i) - first_column
    if (target >= 0) & (target < columns):
        tl.store(chosen_ptr + i, tl.load(row_ptr + target) * scale)


@jit(
    do_not_specialize=["first_column"],
    do_not_specialize_on_alignment=["target_ptr", "normaliser_ptr", "coefficient_ptr"],
)
def _slope_kernel(
    # pointers
    logits_ptr,
    slope_ptr,
    target_ptr,
    normaliser_ptr,
    coefficient_ptr,
    # shapes and strides
    columns,
    stride,
    first_column,
    # constants
    scale,
    BLOCK: tl.constexpr,
):
    """Compute coefficient * d log-prob / d logit, elementwise; logits and slope may be the same memory."""
    i = tl.program_id(0).to(tl.int64)
    o_column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_column = o_column < columns
    x = tl.load(logits_ptr + i * stride + o_column, mask=m_column, other=0.0) * scale
    target = tl.load(target_ptr + i) - first_column
    slope = tl.where(o_column == target, 1.0, 0.0) - tl.exp(x - tl.load(normaliser_ptr + i))
    slope *= tl.load(coefficient_ptr + i) * scale
    tl.store(slope_ptr + i * stride + o_column, slope.to(slope_ptr.dtype.element_ty), mask=m_column)


def aot_builds(capability: int) -> list[Build]:
    """List the shipped builds, which depend on neither the hidden size nor the vocabulary."""
    shapes = {"columns": "i32", "stride": "i32", "first_column": "i32", "scale": "fp32"}
    values = dict.fromkeys(("logits", "highest", "total", "chosen"), "*fp32")
    pointers = {f"{name}_ptr": kind for name, kind in (values | {"target": "*i64"}).items()}
    builds = [
        Build(
            "linear_logprob reduce",
            _reduce_kernel,
            pointers | shapes | {"BLOCK": "constexpr"},
            {"BLOCK": COLUMN_BLOCK},
            aligned=("logits_ptr", "columns", "stride"),
        )
    ]
    for slope in ("bf16", "fp16", "fp32"):
        values = {"logits": "*fp32", "slope": f"*{slope}", "target": "*i64"}
        values |= {"normaliser": "*fp32", "coefficient": "*fp32"}
        builds.append(
            Build(
                f"linear_logprob slope {slope}",
                _slope_kernel,
                {f"{name}_ptr": kind for name, kind in values.items()} | shapes | {"BLOCK": "constexpr"},
                {"BLOCK": COLUMN_BLOCK},
                aligned=("logits_ptr", "slope_ptr", "columns", "stride"),
            )
        )
    return builds


# ---------------------------------------------------------------- one tile, by a kernel or by torch


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _Running(NamedTuple):
    """Holds what is known of every position after some columns.

    Attributes:
        highest: (L,) float32 at least, the largest logit.
        total: (L,) float32 at least, the sum of the exponentials relative to `highest`.
        chosen: (L,) float32 at least, the target's logit; 0 until its column was met.
    """

    highest: Tensor
    total: Tensor
    chosen: Tensor

    def of(self, part: slice) -> _Running:
        return _Running(*(value[part] for value in self))


def _reduce(tile: Tensor, running: _Running, target: Tensor, first: int, scale: float) -> None:
    """Fold a tile of logits (P, C), of the columns from `first`, into the running values of its positions."""
    if runs_kernels(tile):
        shapes = (tile.shape[1], tile.stride(0), first, scale)
        with torch.cuda.device_of(tile):
            _reduce_kernel[(tile.shape[0],)](tile, target, *running, *shapes, BLOCK=COLUMN_BLOCK, num_warps=4)
        return
    if not tile.shape[1]:
        return
    logits = tile if scale == 1.0 else tile * scale
    column, inside = _column(tile, target, first)
    own = logits.gather(1, column).squeeze(1)
    running.chosen.copy_(torch.where(inside, own, running.chosen))
    highest = torch.maximum(running.highest, logits.amax(-1))
    kept = (running.highest - highest).exp()
    e = (logits - highest[:, None]).exp_()
    running.highest.copy_(highest)
    running.total.mul_(kept).add_(e.sum(-1))


def _slope(
    tile: Tensor,
    out: Tensor,
    target: Tensor,
    normaliser: Tensor,
    coefficient: Tensor,
    first: int,
    scale: float,
) -> None:
    """Compute out (P, C) = coefficient * d log-prob / d (hidden . row); `tile`, the logits, is overwritten."""
    if runs_kernels(tile):
        grid = (tile.shape[0], triton.cdiv(tile.shape[1], COLUMN_BLOCK))
        shapes = (tile.shape[1], tile.stride(0), first, scale)
        with torch.cuda.device_of(tile):
            _slope_kernel[grid](
                tile, out, target, normaliser, coefficient, *shapes, BLOCK=COLUMN_BLOCK, num_warps=4
            )
        return
    if not tile.shape[1]:
        return
    column, inside = _column(tile, target, first)
    tile.mul_(scale).sub_(normaliser[:, None]).exp_().neg_()
    tile.scatter_add_(1, column, inside[:, None].to(tile.dtype))
    out.copy_(tile.mul_((coefficient * scale)[:, None]))


def _column(tile: Tensor, target: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Return (P, 1) the target's column of the tile, clamped into it, and (P,) whether it is one of the tile's."""
    column = target - first
    return column.clamp(0, tile.shape[1] - 1)[:, None], (column >= 0) & (column < tile.shape[1])


# ---------------------------------------------------------------- all tiles


class _Problem(NamedTuple):
    """Holds what both passes need.

    Attributes:
        hidden: (L, H).
        weight: (R, H), only the rows of the output matrix that are real tokens.
        padding: number of rows after them, which get the gradient 0.
        target: (L,) int64, relative to the first row; another process's targets lie outside.
        scale: 1 / temperature.
        group: the processes among which the rows are split.
    """

    hidden: Tensor
    weight: Tensor
    padding: int
    target: Tensor
    scale: float
    group: ProcessGroup | None


class _Tiles:
    """Cuts a problem into tiles, and holds memory for one tile of logits and one of its slope."""

    def __init__(self, problem: _Problem, *, slope: bool) -> None:
        self.problem = problem
        hidden, rows = problem.hidden, problem.weight.shape[0]
        scored = hidden.shape[0]
        size = min(max(scored * rows // 16, SMALLEST_TILE), LARGEST_TILE)
        # tiles are long on the side that has more: the gradient of the other side then needs no sum over products
        if rows < scored:
            width = max(1, min(rows, LONGEST))
            height = min(scored, size // width)
        else:
            height = max(1, min(scored, LONGEST))
            width = min(rows, size // height)
        height, width = max(1, height), max(1, width)
        # keeps every row of a tile aligned, whatever the vocabulary
        width = -(-width // 64) * 64
        self.parts = [slice(p, min(p + height, scored)) for p in range(0, scored, height)]
        self.blocks = [slice(r, min(r + width, rows)) for r in range(0, rows, width)]
        self.width = width
        self._logits = hidden.new_empty((height, width), dtype=_wide(hidden.dtype))
        own = slope and hidden.dtype != self._logits.dtype
        self._slope = hidden.new_empty((height, width)) if own else self._logits

    def logits(self, part: slice, block: slice) -> Tensor:
        """Compute the logits of a tile: (P, C) float32 at least, before the temperature."""
        tile = self._logits[: part.stop - part.start, : block.stop - block.start]
        product(self.problem.hidden[part], self.problem.weight[block].T, tile)
        return tile

    def slope(
        self, tile: Tensor, part: slice, block: slice, normaliser: Tensor, coefficient: Tensor
    ) -> Tensor:
        """Compute the slope of a tile from its logits: (P, C) in the dtype of the hidden states."""
        out = self._slope[: tile.shape[0], : tile.shape[1]]
        target, scale = self.problem.target[part], self.problem.scale
        _slope(tile, out, target, normaliser[part], coefficient[part], block.start, scale)
        return out


def _start(problem: _Problem) -> _Running:
    total, chosen = problem.hidden.new_zeros((2, problem.hidden.shape[0]), dtype=_wide(problem.hidden.dtype))
    return _Running(torch.full_like(total, -torch.inf), total, chosen)


def _combine(running: _Running, group: ProcessGroup | None) -> _Running:
    """Combine the running values over the rows of all processes."""
    if group is None or group.size() == 1 or not running.highest.numel():
        return running
    top = running.highest.clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=group)
    kept = (running.highest - top).exp()
    sums = torch.stack([running.total * kept, running.chosen])
    dist.all_reduce(sums, group=group)
    return _Running(top, sums[0], sums[1])


def _forward(problem: _Problem) -> _Running:
    running = _start(problem)
    tiles = _Tiles(problem, slope=False)
    for block in tiles.blocks:
        for part in tiles.parts:
            logits = tiles.logits(part, block)
            _reduce(logits, running.of(part), problem.target[part], block.start, problem.scale)
    return _combine(running, problem.group)


def _gradients(problem: _Problem, normaliser: Tensor, coefficient: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of sum(coefficient * log-prob) in hidden and weight; the logits are computed again."""
    hidden, weight = problem.hidden, problem.weight
    tiles = _Tiles(problem, slope=True)
    if not (tiles.blocks and tiles.parts):
        return torch.zeros_like(hidden), _weight_gradient(problem).zero_()
    # a sum of several products is kept in float32; a single product is rounded once, by the product itself
    one_block, one_part = len(tiles.blocks) == 1, len(tiles.parts) == 1
    grad_hidden = torch.empty_like(hidden, dtype=hidden.dtype if one_block else normaliser.dtype)
    grad_weight = _weight_gradient(problem)
    partial = None if one_part else torch.empty_like(weight[: tiles.width], dtype=normaliser.dtype)
    for block in tiles.blocks:
        into = grad_weight[block] if partial is None else partial[: block.stop - block.start]
        for part in tiles.parts:
            slope = tiles.slope(tiles.logits(part, block), part, block, normaliser, coefficient)
            product(slope, weight[block], grad_hidden[part], add=block.start > 0)
            product(slope.T, hidden[part], into, add=part.start > 0)
        if partial is not None:
            grad_weight[block] = into
    return grad_hidden.to(hidden.dtype), grad_weight


def _weight_gradient(problem: _Problem) -> Tensor:
    """Allocate the gradient of this process's rows, 0 in those of padding."""
    rows, size = problem.weight.shape
    gradient = problem.weight.new_empty((rows + problem.padding, size))
    gradient[rows:] = 0
    return gradient


# ---------------------------------------------------------------- autograd


class _Options(NamedTuple):
    """Holds the arguments that are no tensors: where this process's rows lie, and the temperature."""

    group: ProcessGroup | None
    first_row: int
    real_rows: int | None
    temperature: float

    def problem(self, hidden: Tensor, weight: Tensor, target: Tensor) -> _Problem:
        local = (target.long() - self.first_row).contiguous()
        real = weight[: self.real_rows]
        padding = weight.shape[0] - real.shape[0]
        return _Problem(hidden.contiguous(), real, padding, local, 1.0 / self.temperature, self.group)


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, options: _Options) -> Tensor:
        highest, total, chosen = _forward(options.problem(hidden, weight, target))
        normaliser = highest + total.log()
        ctx.save_for_backward(hidden, weight, target, normaliser)
        ctx.options = options
        return chosen - normaliser

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target, normaliser = ctx.saved_tensors
        problem = ctx.options.problem(hidden, weight, target)
        grad_hidden, grad_weight = _gradients(problem, normaliser, grad.contiguous())
        return grad_hidden, grad_weight, None, None


# ---------------------------------------------------------------- the operation


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    group: ProcessGroup | None = None,
    first_row: int = 0,
    real_rows: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Compute log softmax(hidden @ weight.T / temperature)[target], differentiable in hidden and weight.

    Sums are accumulated in float32 at least, whatever the dtype of the inputs. The backward pass computes the logits
    again. Memory beside inputs and results: a tile of logits (at most 256 MiB in float32, and half of it for the slope
    of 16-bit types), (L, H) in float32 in the backward pass where the tile has not all rows, and C rows of the weight
    in float32 where L > `LONGEST`.

    Args:
        hidden: (L, H) float32, bfloat16, float16 or float64; equal on all processes of `group`.
        weight: (R, H), this process's rows of the output matrix.
        target: (L,) int, in the numbering of the whole vocabulary.
        group: the processes among which the rows are split; the gradient of `hidden` is then this process's
            share, and the caller sums it over the group.
        first_row: number of this process's first row.
        real_rows: number of this process's rows that are tokens; those after them are padding, take no part in the
            softmax and get the gradient 0. None: all.
        temperature: divides the logits.

    Returns:
        (L,) float32 (float64 for float64), equal on all processes of `group`.
    """
    options = _Options(group, first_row, real_rows, temperature)
    found: Tensor = _LinearLogProb.apply(hidden, weight, target, options)
    return found
