"""What a kernel is compiled for: how long a row is, and how many trees it holds, must not be among it.

Triton compiles again where an argument's type or alignment differs, or an integer is 1 or stops being a multiple of 16.
A compilation takes seconds, and all processes of a step wait for it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch

from silva.kernels import (
    layers,
    linear_logprob,
    preference_loss,
    tree_attention,
    tree_attention_tiles,
    tree_blocks,
)

MODULES = (tree_blocks, tree_attention, linear_logprob, preference_loss, layers)
LENGTHS = (1, 7, 16, 17, 100, 512, 1000)


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """Kernel -> what it would have been compiled for, as Triton's launcher for sm_90 finds it; nothing is run."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    found: dict[str, set[str]] = defaultdict(set)
    backend = make_backend(GPUTarget("cuda", 90, 32))

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.name = kernel.__name__
            self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)

        def __getitem__(self, grid: Any) -> Any:
            return self.record

        def record(self, *arguments: Any, num_warps: int = 4, num_stages: int = 2, **more: Any) -> None:
            _, specialization, _ = self.bind(*arguments, **more)
            found[self.name].add(f"{specialization}")

    for module in MODULES:
        for name, value in vars(module).copy().items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder(value))
        if hasattr(module, "runs_kernels"):
            monkeypatch.setattr(module, "runs_kernels", lambda x: True)
    monkeypatch.setattr(tree_attention_tiles, "_architecture", lambda device: "sm_90")
    return found


def test_attention(keys):
    for size in LENGTHS:
        end = torch.full((size,), size, dtype=torch.int32)
        q, k, v = (torch.randn(size, heads, 128).bfloat16().requires_grad_() for heads in (8, 2, 2))
        tree_attention.tree_attention(q, k, v, end).sum().backward()
    counts = {name: len(found) for name, found in keys.items()}
    # the lists have three shapes of tiles
    lists = {"_bounds_kernel": 3, "_lists_kernel": 3}
    assert counts == lists | dict.fromkeys(
        ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel"), 1
    )


def test_logprobs(keys, monkeypatch):
    monkeypatch.setattr(linear_logprob, "SMALLEST_TILE", 1 << 12)  # blocks of odd numbers of positions
    weight = torch.randn(1024, 8).bfloat16().requires_grad_()
    for size in LENGTHS:
        hidden = torch.randn(size, 8).bfloat16().requires_grad_()
        linear_logprob.linear_logprob(hidden, weight, torch.zeros(size, dtype=torch.long)).sum().backward()
    assert {name: len(found) for name, found in keys.items()} == {"_reduce_kernel": 1, "_slope_kernel": 1}


def test_preference_losses(keys):
    for trees in (1, 2, 3, 16, 17):
        # of each tree a shared span, two answers of three tokens and their comparison
        tree = torch.arange(trees + 1, dtype=torch.int32)
        count, first = 2 * trees, 3 * tree[:-1]
        paths = torch.stack([first, first + 1, first, first + 2], 1).flatten()
        structure = preference_loss.Structure(
            span_start=3 * torch.arange(3 * trees + 1, dtype=torch.int32),
            span_pointer=2 * torch.arange(count + 1, dtype=torch.int32),
            span_index=paths,
            comparisons=torch.arange(count, dtype=torch.int32).view(-1, 2),
            tree_start=torch.stack([3 * tree, 2 * tree, tree], 1),
            scored=torch.full((count,), 6, dtype=torch.int32),
            absolute=torch.zeros(trees, dtype=torch.bool),
        )
        preference_loss.preference_loss(
            torch.randn(9 * trees), structure, "dpo", reference_logprob=torch.randn(count)
        )
    assert len(keys["_preference_kernel"]) == 1


def test_layers(keys):
    weight = torch.ones(256).bfloat16().requires_grad_()
    for size in LENGTHS:
        x = torch.randn(size, 256).bfloat16().requires_grad_()
        layers.rms_norm(x, weight, 1e-5).sum().backward()
        layers.swiglu(x).sum().backward()
        layers.rotary(torch.randn(size, 4, 64).bfloat16(), torch.arange(size), torch.rand(32))
    assert sum(name.startswith("_") for name in keys) == 5
    assert {len(found) for found in keys.values()} == {1}
