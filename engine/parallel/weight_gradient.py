"""Adds weight gradients to the gradient buffer in the product that computes them.

Without this, a layer's weight gradient is written in bfloat16, read again and added to the float32 buffer. That moves
12 bytes per weight and micro-batch, takes about a twentieth of a step with rows of 8,192 tokens, and rounds to
bfloat16 in each micro-batch. megatron-core adds in one launch if apex's CUDA extension
`fused_weight_gradient_mlp_cuda` is installed; cuBLAS does the same for torch's `addmm`, with which this module
replaces the extension.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor, nn

from silva.kernels.products import product


def _accumulate(x: Tensor, grad: Tensor, main_grad: Tensor) -> None:
    """Compute main_grad (out, in) += grad (T, out)^T @ x (T, in)."""
    product(grad.T, x, main_grad, add=True)


def fuse(chunks: Sequence[nn.Module]) -> None:
    """Have the linear layers of wrapped chunks add to their gradient buffers, if the buffers are float32."""
    found: Any = layers
    if not found._grad_accum_fusion_available:
        found.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=_accumulate)
        found._grad_accum_fusion_available = True
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, layers.ColumnParallelLinear | layers.RowParallelLinear):
                own: Any = module
                # a tied output layer has no weight of its own
                buffer = getattr(own.weight, "main_grad", None)
                own.gradient_accumulation_fusion = buffer is not None and buffer.dtype == torch.float32
