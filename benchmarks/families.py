"""Compares every family of models with transformers, with unrolled sequences, and with other layouts.

    python -m benchmarks.families [--only KIND ...]

Every kind is a small random model of a variant that a public checkpoint has. The largest difference of

- logits: from transformers' own class, in float32 and in float64 (where its rotary angles and norms, which it computes
  in float32 whatever the type, are given in float64), relative to the largest logit;
- trees: of log-probs and of the whole gradient of packed trees from those of the same sequences alone, in float64,
  relative to the largest;
- layouts: of log-probs under tensor (with and without sequence), pipeline and context parallelism from those of one
  process, in float64, relative to the largest;
- identity: tensors that an import and an export leave other than they were, of all.

A difference above LIMITS is an error.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from silva.engine.parallel import groups
from silva.engine.parallel.forked import world

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks import common, random_models
from silva.engine.model import gpt, hf_export
from silva.engine.recipe.schema import Parallel
from silva.kernels.reference import sequence_sums

LIMITS = {"logits": 1e-5, "logits64": 1e-9, "trees": 1e-9, "layouts": 1e-9, "identity": 0}
LAYOUTS = (
    (2, {"tensor": 2}),
    (2, {"tensor": 2, "sequence_parallel": True}),
    (2, {"pipeline": 2}),
    (2, {"context": 2}),
    (4, {"tensor": 2, "pipeline": 2}),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every check of every kind and print the largest differences.

    Returns:
        The exit code: 1 if a difference is above its limit.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.families", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--only", nargs="+", choices=random_models.KINDS, default=list(random_models.KINDS))
    options = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for kind in options.only:
            folder = random_models.checkpoint(Path(name) / kind, kind)
            rows.append((kind, check(kind, folder, Path(name) / f"{kind}-export")))
    common.show("largest differences", ("model", *LIMITS), [(kind, *found.values()) for kind, found in rows])
    worst = {check: max(found[check] for _, found in rows) for check in LIMITS}
    common.finish(
        {
            "families": len({random_models.NAMES[kind.partition("-")[0]] for kind, _ in rows}),
            "kinds": len(rows),
            "largest_logit_difference": worst["logits"],
            "largest_logit_difference_float64": worst["logits64"],
            "largest_tree_difference": worst["trees"],
            "largest_layout_difference": worst["layouts"],
            "tensors_changed": worst["identity"],
        }
    )
    return int(any(worst[check] > limit for check, limit in LIMITS.items()))


def check(kind: str, folder: Path, export: Path) -> dict[str, float]:
    """Return the largest difference of each check, by the names in `LIMITS`."""
    tokens = torch.randint(0, random_models.VOCABULARY, (97,), generator=torch.Generator().manual_seed(5))
    members = [random_models.sequences(6, seed) for seed in range(3)]
    packed = [random_models.row(members)]
    alone = [random_models.row([[each]]) for member in members for each in member]
    [[single]] = world(1, logits, folder, tokens, torch.float32)
    [[double]] = world(1, logits, folder, tokens, torch.float64)
    [(values, gradients)] = world(1, values_and_gradients, folder, packed)
    [(expected, unrolled)] = world(1, values_and_gradients, folder, alone)
    layouts = [
        found[0]
        for size, layout in LAYOUTS
        for found in world(size, scored, folder, packed, layout)
        if len(found)
    ]
    [[whole]] = world(1, scored, folder, packed, {})
    world(1, load_and_export, folder, export)
    before, after = weights(folder), weights(export)
    return {
        "logits": difference(single, theirs(kind, tokens, torch.float32)),
        "logits64": difference(double, theirs(kind, tokens, torch.float64)),
        "trees": max(
            difference(values, expected),
            *(difference(gradients[name], unrolled[name]) for name in unrolled),
        ),
        "layouts": max(difference(found, whole) for found in layouts),
        "identity": sum(
            name not in after or not torch.equal(after[name], tensor) for name, tensor in before.items()
        )
        + len(after.keys() - before.keys()),
    }


def difference(found: Any, expected: Any) -> float:
    """Return the largest difference, relative to the largest expected number."""
    return float(np.abs(np.asarray(found) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint."""
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


# ---------------------------------------------------------------- the two sides


@torch.no_grad()
def theirs(kind: str, tokens: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """Compute (S, V) logits by transformers."""
    model = random_models.model(kind).to(dtype)
    if dtype == torch.float64:
        rotary = model.model.rotary_emb
        frequencies, scale = rotary.inv_freq.double(), rotary.attention_scaling

        def angles(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            angle = position_ids[..., None].double() * frequencies
            both = torch.cat([angle, angle], -1)
            return both.cos() * scale, both.sin() * scale

        rotary.forward = angles
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = functools.partial(_norm, module)
    found: np.ndarray = model(tokens[None]).logits[0].numpy()
    return found


def _norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = (
        x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon) * module.weight
    )
    return found


def logits(folder: Path, tokens: torch.Tensor, dtype: torch.dtype) -> list[np.ndarray]:
    """Compute (S, V) logits by the engine."""
    chunks, _ = random_models.build(folder, Parallel(), dtype=dtype)
    return random_models.outputs(chunks, [tokens], gpt.logits)


def values_and_gradients(folder: Path, rows: list[Any]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Compute the log-prob of every sequence, and the gradients of their weighted sum, in float64."""
    [chunk], _ = random_models.build(folder, Parallel(), dtype=torch.float64)
    sums = [
        sequence_sums(gpt.forward(chunk, row), row.span, row.span_pointer, row.span_index) for row in rows
    ]
    every = torch.cat(sums)
    (every * torch.linspace(-1, 2, len(every), dtype=torch.float64)).sum().backward()
    return every.detach().numpy(), {
        name: parameter.grad.numpy()
        for name, parameter in chunk.named_parameters()
        if parameter.grad is not None
    }


def scored(folder: Path, rows: list[Any], layout: dict[str, Any]) -> list[np.ndarray]:
    """Compute the log-probs of the scored positions, in float64; none before the last stage."""
    chunks, _ = random_models.build(folder, Parallel(**layout), dtype=torch.float64)
    return random_models.outputs(chunks, rows)


def load_and_export(folder: Path, export: Path) -> None:
    """Read a checkpoint and write it again."""
    chunks, shape = random_models.build(folder, Parallel())
    hf_export.export(chunks, shape, source=folder, folder=export, dtype=torch.float32, head="lm")
    groups.shutdown()


if __name__ == "__main__":
    sys.exit(main())
