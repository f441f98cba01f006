"""Computes the layer operations between the products, fused: norms, rotary positions of a tree's tokens, SwiGLU.

    S tokens, H hidden size (heads in `rotary`), D head size, F feed-forward columns

Each operation is one pass over memory forward and one backward, computed in float32 and rounded once. They take
megatron-core's tensors as they are: any leading dimensions, heads that are slices of a fused projection, gate and up
in one tensor. The torch definitions are used for float64, and for everything where kernels do not run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from silva.kernels import reference
from silva.kernels.build import Build
from silva.kernels.dispatch import jit, runs_kernels, tl, triton

# Programs of the norm's backward pass, two for each of an H100's multiprocessors: each sums the weight's gradient over
# its rows.
NORM_PROGRAMS = 264
COLUMN_BLOCK = 1024


# ---------------------------------------------------------------- kernels


@jit
def _norm_kernel(
    # pointers
    x_ptr,
    weight_ptr,
    out_ptr,
    scale_ptr,
    # shapes and numbers
    columns,
    epsilon,
    # constants
    BLOCK: tl.constexpr,
):
    """Compute RMSNorm of one row per program."""
    row = tl.program_id(0).to(tl.int64)
    o_column = tl.arange(0, BLOCK)
    mask = o_column < columns
    x = tl.load(x_ptr + row * columns + o_column, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / columns + epsilon)
    weight = tl.load(weight_ptr + o_column, mask=mask, other=0.0).to(tl.float32)
    # the normalised value is rounded before the weight is applied, as Llama's definition does
    normal = (x * scale).to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(scale_ptr + row, scale)
    tl.store(out_ptr + row * columns + o_column, (normal * weight).to(out_ptr.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["rows"])
def _norm_backward_kernel(
    # pointers
    grad_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    grad_x_ptr,
    partial_ptr,
    # shapes
    rows,
    columns,
    # constants
    BLOCK: tl.constexpr,
):
    """Compute RMSNorm's gradients.

    Every program takes each `programs`-th row and writes the sum of their weight gradients to a line of its own.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    o_column = tl.arange(0, BLOCK)
    mask = o_column < columns
    weight = tl.load(weight_ptr + o_column, mask=mask, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, rows, programs):
        start = tl.cast(row, tl.int64) * columns
        x = tl.load(x_ptr + start + o_column, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + start + o_column, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row)
        normal = x * scale
        grad_weight += grad * normal.to(x_ptr.dtype.element_ty).to(tl.float32)
        grad *= weight
        grad_x = scale * (grad - normal * (tl.sum(grad * normal, 0) / columns))
        tl.store(grad_x_ptr + start + o_column, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + program.to(tl.int64) * columns + o_column, grad_weight, mask=mask)


@jit
def _rotary_kernel(
    # pointers
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    # strides and sizes
    token_stride,
    head_stride,
    heads,
    # constants
    SIGN: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Compute the rotation of one token, whose heads all share its angles; the backward pass turns the other way."""
    token = tl.program_id(0).to(tl.int64)
    o_head, o_pair = tl.arange(0, HEADS)[:, None], tl.arange(0, PAIRS)[None, :]
    mask = (o_head < heads) & (o_pair < HALF)
    cos = tl.load(cos_ptr + token * HALF + o_pair, mask=o_pair < HALF, other=0.0)
    sin = SIGN * tl.load(sin_ptr + token * HALF + o_pair, mask=o_pair < HALF, other=0.0)
    pair_ptr = x_ptr + token * token_stride + o_head.to(tl.int64) * head_stride + o_pair
    first = tl.load(pair_ptr, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(pair_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    turned_ptr = out_ptr + (token * heads + o_head) * (2 * HALF) + o_pair
    kind = out_ptr.dtype.element_ty
    tl.store(turned_ptr, (first * cos - second * sin).to(kind), mask=mask)
    tl.store(turned_ptr + HALF, (second * cos + first * sin).to(kind), mask=mask)


@jit
def _norm_rotary_kernel(
    # pointers
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    # strides, sizes and numbers
    token_stride,
    head_stride,
    heads,
    epsilon,
    # constants
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Compute the norm of every head of one token, and its rotation."""
    token = tl.program_id(0).to(tl.int64)
    o_head, o_pair = tl.arange(0, HEADS)[:, None], tl.arange(0, PAIRS)[None, :]
    in_half = o_pair < HALF
    mask = (o_head < heads) & in_half
    kind = out_ptr.dtype.element_ty
    pair_ptr = x_ptr + token * token_stride + o_head.to(tl.int64) * head_stride + o_pair
    first = tl.load(pair_ptr, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(pair_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(first * first + second * second, 1) / (2 * HALF) + epsilon)
    # rounded where the definitions of norm and rotation are
    weight = tl.load(weight_ptr + o_pair, mask=in_half, other=0.0).to(tl.float32)
    first = ((first * scale[:, None]).to(kind).to(tl.float32) * weight).to(kind).to(tl.float32)
    weight = tl.load(weight_ptr + HALF + o_pair, mask=in_half, other=0.0).to(tl.float32)
    second = ((second * scale[:, None]).to(kind).to(tl.float32) * weight).to(kind).to(tl.float32)
    cos = tl.load(cos_ptr + token * HALF + o_pair, mask=in_half, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + o_pair, mask=in_half, other=0.0)
    turned_ptr = out_ptr + (token * heads + o_head) * (2 * HALF) + o_pair
    tl.store(turned_ptr, (first * cos - second * sin).to(kind), mask=mask)
    tl.store(turned_ptr + HALF, (second * cos + first * sin).to(kind), mask=mask)


@jit(do_not_specialize=["tokens"])
def _norm_rotary_backward_kernel(
    # pointers
    grad_ptr,
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    grad_x_ptr,
    partial_ptr,
    # strides, sizes and numbers
    token_stride,
    head_stride,
    tokens,
    heads,
    epsilon,
    # constants
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Compute the gradients of rotation and norm.

    Every program takes each `programs`-th token and writes the sum of their weight gradients to a line of its own.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    o_head, o_pair = tl.arange(0, HEADS)[:, None], tl.arange(0, PAIRS)[None, :]
    in_half = o_pair < HALF
    mask = (o_head < heads) & in_half
    kind = x_ptr.dtype.element_ty
    first_weight = tl.load(weight_ptr + o_pair, mask=in_half, other=0.0).to(tl.float32)
    second_weight = tl.load(weight_ptr + HALF + o_pair, mask=in_half, other=0.0).to(tl.float32)
    first_sum = tl.zeros((HEADS, PAIRS), tl.float32)
    second_sum = tl.zeros((HEADS, PAIRS), tl.float32)
    for token in range(program, tokens, programs):
        start = tl.cast(token, tl.int64)
        cos = tl.load(cos_ptr + start * HALF + o_pair, mask=in_half, other=0.0)
        sin = tl.load(sin_ptr + start * HALF + o_pair, mask=in_half, other=0.0)
        turned = (start * heads + o_head) * (2 * HALF) + o_pair
        first = tl.load(grad_ptr + turned, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(grad_ptr + turned + HALF, mask=mask, other=0.0).to(tl.float32)
        first_grad, second_grad = first * cos + second * sin, second * cos - first * sin
        pair_ptr = x_ptr + start * token_stride + o_head.to(tl.int64) * head_stride + o_pair
        first = tl.load(pair_ptr, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(pair_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
        scale = (1.0 / tl.sqrt(tl.sum(first * first + second * second, 1) / (2 * HALF) + epsilon))[:, None]
        first *= scale
        second *= scale
        first_sum += first_grad * first.to(kind).to(tl.float32)
        second_sum += second_grad * second.to(kind).to(tl.float32)
        first_grad *= first_weight
        second_grad *= second_weight
        mean = (tl.sum(first_grad * first + second_grad * second, 1) / (2 * HALF))[:, None]
        tl.store(grad_x_ptr + turned, (scale * (first_grad - first * mean)).to(kind), mask=mask)
        tl.store(grad_x_ptr + turned + HALF, (scale * (second_grad - second * mean)).to(kind), mask=mask)
    line_ptr = partial_ptr + program.to(tl.int64) * (2 * HALF) + tl.arange(0, PAIRS)
    own = tl.arange(0, PAIRS) < HALF
    tl.store(line_ptr, tl.sum(first_sum, 0), mask=own)
    tl.store(line_ptr + HALF, tl.sum(second_sum, 0), mask=own)


@jit
def _swiglu_kernel(x_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    """Compute silu(gate) * up of one block of a row's columns."""
    row = tl.program_id(0).to(tl.int64)
    o_column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = o_column < columns
    gate_ptr = x_ptr + row * 2 * columns + o_column
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * columns + o_column, out.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _swiglu_backward_kernel(grad_ptr, x_ptr, grad_x_ptr, columns, BLOCK: tl.constexpr):
    """Compute SwiGLU's gradients of one block of a row's columns."""
    row = tl.program_id(0).to(tl.int64)
    o_column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = o_column < columns
    o_gate = row * 2 * columns + o_column
    grad = tl.load(grad_ptr + row * columns + o_column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + o_gate, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + o_gate + columns, mask=mask, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    grad_gate = grad * up * share * (1.0 + gate * (1.0 - share))
    kind = grad_x_ptr.dtype.element_ty
    tl.store(grad_x_ptr + o_gate, grad_gate.to(kind), mask=mask)
    tl.store(grad_x_ptr + o_gate + columns, (grad * gate * share).to(kind), mask=mask)


def _norm_options(columns: int) -> tuple[int, int]:
    """Return block and warps: up to sixteen elements of a row per thread, so that the backward pass does not spill."""
    block = triton.next_power_of_2(columns)
    return block, min(max(block // 512, 1), 16)


def aot_builds(capability: int) -> list[Build]:
    """List the builds in bfloat16, for the widths of 7B, 13B and 70B models."""
    builds = []
    for columns in (4096, 5120, 8192):
        block, warps = _norm_options(columns)
        common = {
            "x_ptr": "*bf16",
            "weight_ptr": "*bf16",
            "scale_ptr": "*fp32",
            "columns": "i32",
            "BLOCK": "constexpr",
        }
        aligned = ("x_ptr", "weight_ptr", "columns")
        builds += [
            Build(
                f"rms_norm forward H{columns}",
                _norm_kernel,
                common | {"out_ptr": "*bf16", "epsilon": "fp32"},
                {"BLOCK": block},
                (*aligned, "out_ptr"),
                warps,
            ),
            Build(
                f"rms_norm backward H{columns}",
                _norm_backward_kernel,
                common | {"grad_ptr": "*bf16", "grad_x_ptr": "*bf16", "partial_ptr": "*fp32", "rows": "i32"},
                {"BLOCK": block},
                (*aligned, "grad_ptr", "grad_x_ptr", "partial_ptr"),
                warps,
            ),
        ]
    for heads in (8, 32, 64):
        pointers = {
            "x_ptr": "*bf16",
            "cos_ptr": "*fp32",
            "sin_ptr": "*fp32",
            "out_ptr": "*bf16",
        }
        sizes = {"token_stride": "i32", "head_stride": "i32", "heads": "i32"}
        constants = {"SIGN": 1, "HALF": 64, "PAIRS": 64, "HEADS": heads}
        builds.append(
            Build(
                f"rotary D128 heads {heads}",
                _rotary_kernel,
                pointers | sizes | dict.fromkeys(constants, "constexpr"),
                constants,
                ("x_ptr", "cos_ptr", "sin_ptr", "out_ptr", "token_stride", "head_stride"),
            )
        )
        pointers |= {"weight_ptr": "*bf16"}
        sizes |= {"epsilon": "fp32"}
        constants = {"HALF": 64, "PAIRS": 64, "HEADS": heads}
        vectors = ("x_ptr", "weight_ptr", "cos_ptr", "sin_ptr", "token_stride", "head_stride")
        warps = min(max(heads // 2, 1), 16)
        builds += [
            Build(
                f"norm + rotary D128 heads {heads}",
                _norm_rotary_kernel,
                pointers | sizes | dict.fromkeys(constants, "constexpr"),
                constants,
                (*vectors, "out_ptr"),
                warps,
            ),
            Build(
                f"norm + rotary backward D128 heads {heads}",
                _norm_rotary_backward_kernel,
                {
                    **{name: kind for name, kind in pointers.items() if name != "out_ptr"},
                    "grad_ptr": "*bf16",
                    "grad_x_ptr": "*bf16",
                    "partial_ptr": "*fp32",
                    "tokens": "i32",
                    **sizes,
                    **dict.fromkeys(constants, "constexpr"),
                },
                constants,
                (*vectors, "grad_ptr", "grad_x_ptr", "partial_ptr"),
                warps,
            ),
        ]
    both = {"x_ptr": "*bf16", "columns": "i32", "BLOCK": "constexpr"}
    forward, backward = {"out_ptr": "*bf16"}, {"grad_ptr": "*bf16", "grad_x_ptr": "*bf16"}
    for name, kernel, more in (
        ("forward", _swiglu_kernel, forward),
        ("backward", _swiglu_backward_kernel, backward),
    ):
        vectorised = ("x_ptr", "columns", *more)
        builds.append(Build(f"swiglu {name}", kernel, both | more, {"BLOCK": COLUMN_BLOCK}, vectorised))
    return builds


# ---------------------------------------------------------------- autograd


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x = x.contiguous()
        columns = x.shape[-1]
        rows = x.numel() // columns
        out, scale = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
        block, warps = _norm_options(columns)
        if rows:
            with torch.cuda.device_of(x):
                _norm_kernel[(rows,)](x, weight, out, scale, columns, epsilon, BLOCK=block, num_warps=warps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        rows, columns = scale.shape[0], x.shape[-1]
        if not rows:
            return torch.empty_like(x), torch.zeros_like(weight), None
        block, warps = _norm_options(columns)
        grad_x = torch.empty_like(x)
        partial = x.new_empty(min(rows, NORM_PROGRAMS), columns, dtype=torch.float32)
        numbers = (*(grad.contiguous(), x, weight, scale, grad_x, partial), rows, columns)
        with torch.cuda.device_of(x):
            _norm_backward_kernel[(partial.shape[0],)](*numbers, BLOCK=block, num_warps=warps)
        return grad_x, partial.sum(0).to(weight.dtype), None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    tokens, heads, size = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    out = x.new_empty(tokens, heads, size)
    if out.numel():
        with torch.cuda.device_of(x):
            _rotary_kernel[(tokens,)](
                *(x, cos, sin, out, x.stride(0), x.stride(1), heads),
                SIGN=sign,
                HALF=size // 2,
                PAIRS=triton.next_power_of_2(size // 2),
                HEADS=triton.next_power_of_2(heads),
                num_warps=4,
            )
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, sin, -1), None, None


class _NormRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
        tokens, heads, size = x.shape
        x = x if x.stride(2) == 1 else x.contiguous()
        out = x.new_empty(tokens, heads, size)
        if out.numel():
            with torch.cuda.device_of(x):
                _norm_rotary_kernel[(tokens,)](
                    *(x, weight, cos, sin, out, x.stride(0), x.stride(1), heads, eps), **_head_options(x)
                )
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin = ctx.saved_tensors
        tokens, heads, size = x.shape
        grad_x = x.new_empty(x.shape)
        if not grad_x.numel():
            return grad_x, torch.zeros_like(weight), None, None, None
        partial = x.new_empty(min(tokens, NORM_PROGRAMS), size, dtype=torch.float32)
        tensors = (grad.contiguous(), x, weight, cos, sin, grad_x, partial)
        with torch.cuda.device_of(x):
            _norm_rotary_backward_kernel[(partial.shape[0],)](
                *(*tensors, x.stride(0), x.stride(1), tokens, heads, ctx.eps), **_head_options(x)
            )
        return grad_x, partial.sum(0).to(weight.dtype), None, None, None


def _head_options(x: Tensor) -> dict[str, int]:
    """Return a kernel's constants for (tokens, heads, D), and warps: two heads of 128 for each."""
    _, heads, size = x.shape
    padded = triton.next_power_of_2(heads)
    return {
        "HALF": size // 2,
        "PAIRS": triton.next_power_of_2(size // 2),
        "HEADS": padded,
        "num_warps": min(max(padded // 2, 1), 16),
    }


class _SwiGLU(torch.autograd.Function):
    """Applies SwiGLU, also on torch's path: left to autograd, that would keep silu(gate) beside its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        if not runs_kernels(x):
            return torch.nn.functional.silu(gate) * up
        out = x.new_empty(up.shape)
        _launch_swiglu(_swiglu_kernel, up, x, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        if not runs_kernels(x):
            share = torch.sigmoid(gate)
            return torch.cat([grad * up * share * (1 + gate * (1 - share)), grad * gate * share], -1)
        grad_x = torch.empty_like(x)
        _launch_swiglu(_swiglu_backward_kernel, up, grad.contiguous(), x, grad_x)
        return grad_x


def _launch_swiglu(kernel: Any, half: Tensor, *tensors: Tensor) -> None:
    columns = half.shape[-1]
    if half.numel():
        grid = (half.numel() // columns, triton.cdiv(columns, COLUMN_BLOCK))
        with torch.cuda.device_of(half):
            kernel[grid](*tensors, columns, BLOCK=COLUMN_BLOCK, num_warps=4)


# ---------------------------------------------------------------- the operations


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467).

    The weight's gradient is summed in float32, in the same order every time.

    Args:
        x: (..., H).
        weight: (H,), in x's dtype.
        eps: is added to the mean.

    Returns:
        (..., H), in x's dtype.
    """
    return _Norm.apply(x, weight, eps) if runs_kernels(x) else reference.rms_norm(x, weight, eps)


def rotary_angles(position: Tensor, inverse_frequency: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Compute cos and sin of every token's angles; they are the same for every layer, so made once per row.

    Args:
        position: (S,), the depth of each token in its tree.
        inverse_frequency: (D / 2,).
        scale: what both are multiplied by (YaRN's attention factor).

    Returns:
        cos and sin, each (S, D / 2) float32.
    """
    angle = position.float()[:, None] * inverse_frequency.float()[None]
    return angle.cos() * scale, angle.sin() * scale


def rotary(
    x: Tensor,
    position: Tensor,
    inverse_frequency: Tensor,
    scale: float = 1.0,
    *,
    angles: tuple[Tensor, Tensor] | None = None,
    norm: tuple[Tensor, float] | None = None,
) -> Tensor:
    """Compute the rotary position embedding in Llama's non-interleaved form (Su et al. 2021, arXiv 2104.09864).

    With a norm, every head is normalised first, in the same pass over memory (Qwen3's queries and keys).

    Args:
        x: (S, heads, D); a slice of a larger tensor is read as it is. With a norm, the backward pass keeps it.
        position: (S,), the depth of each token in its tree.
        inverse_frequency: (D / 2,).
        scale: as `rotary_angles` takes it.
        angles: of `rotary_angles`, if they are at hand.
        norm: weight (D,), in x's dtype, and epsilon of `rms_norm` over each head.

    Returns:
        (S, heads, D), in x's dtype.
    """
    if not runs_kernels(x):
        if norm is not None:
            x = reference.rms_norm(x, *norm)
        return reference.rotary(x, position, inverse_frequency, scale)
    cos, sin = rotary_angles(position, inverse_frequency, scale) if angles is None else angles
    if norm is not None:
        return _NormRotary.apply(x, *norm, cos, sin)
    return _Rotary.apply(x, cos, sin)


def swiglu(x: Tensor) -> Tensor:
    """Compute silu(gate) * up (Shazeer 2020, arXiv 2002.05202).

    Args:
        x: (..., 2F), the columns of gate followed by those of up.

    Returns:
        (..., F), in x's dtype.
    """
    return _SwiGLU.apply(x)
