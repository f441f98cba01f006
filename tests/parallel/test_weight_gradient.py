"""Weight gradients that their product adds to the buffer: the same gradients, with less rounding."""

from __future__ import annotations

from pathlib import Path

from silva.engine.parallel import optimizer, weight_gradient

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel import layers
from worlds import world

from benchmarks import random_models
from silva.engine.recipe.schema import Parallel

ROWS = 6  # micro-batches of a step


def gradients(folder: Path, dtype: torch.dtype, fused: bool) -> dict[str, np.ndarray]:
    """By weight, the gradient buffer after a step's rows; of the linear layers only."""
    bare, _ = random_models.build(folder, Parallel(), dtype=dtype)
    [chunk] = optimizer.wrap(bare, Parallel())
    chosen = {}
    for name, module in bare[0].named_modules():
        linear = isinstance(module, layers.ColumnParallelLinear | layers.RowParallelLinear)
        if linear and name != "output_layer":  # whose products the log-probs make
            assert module.gradient_accumulation_fusion == (dtype != torch.float64)
            module.gradient_accumulation_fusion &= fused
            chosen[name] = module.weight
    assert len(chosen) == 4 * 4  # of four layers
    for seed in range(ROWS):
        row = random_models.row([random_models.sequences(5, seed=seed)])
        with chunk.no_sync():
            random_models.forward(chunk, row).sum().backward()
        for weight in chosen.values():
            assert weight.grad_added_to_main_grad == (fused and dtype != torch.float64)
            assert weight.grad is None
            weight.grad_added_to_main_grad = False  # as the next step does
    return {name: weight.main_grad.double().numpy().copy() for name, weight in chosen.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_separate_sums(dtype, tmp_path):
    folder = random_models.checkpoint(tmp_path, "llama")
    [exact], [fused], [apart] = (
        world(1, gradients, folder, kind, way)
        for kind, way in ((torch.float64, True), (dtype, True), (dtype, False))
    )
    for name, truth in exact.items():
        error, peer = (np.linalg.norm(way[name] - truth) / np.linalg.norm(truth) for way in (fused, apart))
        # what flows through the layers is rounded in either way, far more often than what is summed
        assert error <= 1.02 * peer + 1e-7, name
        assert error < (1e-5 if dtype == torch.float32 else 0.1), name


def test_apex_is_taken_where_it_is(monkeypatch):
    theirs = object()
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", theirs, raising=False)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    weight_gradient.fuse([])
    assert layers.fused_weight_gradient_mlp_cuda is theirs
