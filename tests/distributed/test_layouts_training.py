"""Whole runs on every layout: losses, gradient norms, updated weights and the export are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

TOLERANCE = 1e-5  # float32 sums in another order, over three optimizer steps
# a sequence's log-prob is near -500, where float32's last digit is 3e-5: NCA's and KTO's coefficients carry that
GRADIENT_TOLERANCE = 3e-5
VPP = {"pipeline": 2, "virtual_pipeline": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor": 2}),
    "tp2 sp": (2, {"tensor": 2, "sequence_parallel": True, "recompute": "selective"}),
    "pp2": (2, {"pipeline": 2}),
    "pp2 uneven": (2, {"pipeline": 2, "stage_layers": [3, 1], "recompute": "full"}),
    "pp4": (4, {"pipeline": 4, "recompute": "selective"}),
    "vpp": (2, VPP),
    "vpp uneven": (2, VPP | {"stage_layers": [1, 2, 1, 0], "recompute": "full"}),
    "dp2": (2, {}),
    "dp2 plain optimizer": (2, {"distributed_optimizer": False}),
    "dp2 overlapped": (2, {"overlap": True}),
    "cp2": (2, {"context": 2}),
    "cp2 recomputed": (2, {"context": 2, "recompute": "selective", "distributed_optimizer": False}),
    "cp4": (4, {"context": 4, "recompute": "full"}),
    "cp2 x tp2": (4, {"context": 2, "tensor": 2}),
    "cp2 x tp2 sp": (4, {"context": 2, "tensor": 2, "sequence_parallel": True, "recompute": "selective"}),
    "cp2 x pp2": (4, {"context": 2, "pipeline": 2, "recompute": "full"}),
    "cp2 x vpp uneven": (4, {"context": 2, **VPP, "stage_layers": [1, 1, 2, 0], "overlap": True}),
    "cp2 x dp2": (4, {"context": 2}),
    "cp2 x dp2 overlapped": (4, {"context": 2, "overlap": True}),
    "tp2 x pp2": (4, {"tensor": 2, "pipeline": 2, "recompute": "full"}),
    "vpp x dp2 overlapped": (4, VPP | {"overlap": True}),
    "tp2 x pp2 x dp2": (8, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}),
}
OBJECTIVES = ("sft", "dpo", "nca", "kto", "bt_dr")
CASES = [
    *((layout, objective) for layout in ("tp2", "pp2", "cp2", "dp2") for objective in OBJECTIVES),
    ("tp2 sp", "nca"),
    ("tp2 sp", "bt_dr"),
    ("pp2 uneven", "sft"),
    ("pp4", "ipo"),
    ("vpp", "kto"),
    ("vpp", "bt_dr"),
    ("vpp uneven", "nca"),
    ("dp2 plain optimizer", "kto"),
    ("dp2 overlapped", "nca"),
    ("cp2 recomputed", "ipo"),
    ("cp4", "nca"),
    ("cp2 x tp2", "simpo"),
    ("cp2 x tp2 sp", "kto"),
    ("cp2 x tp2 sp", "bt_dr"),
    ("cp2 x pp2", "kto"),
    ("cp2 x vpp uneven", "bt_dr"),
    ("cp2 x dp2", "kto"),
    ("cp2 x dp2 overlapped", "sft"),
    ("tp2 x pp2", "kto"),
    ("vpp x dp2 overlapped", "nca"),
    ("tp2 x pp2 x dp2", "kto"),
]
# an embedding at both ends of a pipeline: each end computes a part of its gradient, and both have to stay the same
TIED = ["pp2 uneven", "cp2 x pp2", "cp2 x tp2 sp", "vpp x dp2 overlapped"]


def weights(output: Path) -> dict[str, torch.Tensor]:
    """The exported tensors of a run; pipelines write several files."""
    files = sorted((output / "export").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(found: Any, expected: Any) -> None:
    """Two runs in float32, but for the order of sums."""
    ours, theirs = tiny.history(found.output), tiny.history(expected.output)
    assert len(ours) == len(theirs) == 3
    for line, alone in zip(ours, theirs, strict=True):
        for key in ("loss", "reward_chosen", "reward_margin"):
            if key in alone:
                assert line[key] == pytest.approx(alone[key], rel=TOLERANCE, abs=TOLERANCE), key
        assert line["gradient_norm"] == pytest.approx(alone["gradient_norm"], rel=GRADIENT_TOLERANCE)
    # the estimate is beta times a mean of differences of log-probs near -500
    assert found.divergence == pytest.approx(expected.divergence, rel=TOLERANCE, abs=GRADIENT_TOLERANCE)
    mine, alone = weights(found.output), weights(expected.output)
    assert mine.keys() == alone.keys()
    for name, tensor in alone.items():
        # a hundredth of the 3e-3 that three steps can move a weight
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=3e-5, msg=name)
    exports = [run.output / "export" / "config.json" for run in (found, expected)]
    assert exports[0].read_bytes() == exports[1].read_bytes()


@pytest.mark.parametrize(("layout", "objective"), CASES)
def test_layouts_give_the_numbers_of_one_process(layout, objective, runs, run_on, tmp_path):
    size, parallel = LAYOUTS[layout]
    found = run_on(size, runs.recipe(objective, tmp_path / "run", parallel=parallel))
    assert_same(found, runs.single(objective))


@pytest.mark.parametrize("layout", TIED)
def test_tied_embeddings_give_the_numbers_of_one_process(layout, runs, run_on, tmp_path):
    size, parallel = LAYOUTS[layout]
    found = run_on(size, runs.recipe("sft", tmp_path / "run", kind="tied", parallel=parallel))
    expected = runs.single("sft", kind="tied")
    assert "lm_head.weight" not in weights(expected.output)
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("kind", "objective", "layout"),
    [
        ("llama3", "dpo", "tp2 x pp2"),
        ("biased", "nca", "tp2 sp"),
        ("biased", "nca", "vpp x dp2 overlapped"),
        ("qwen2", "dpo", "tp2"),
        ("qwen2", "dpo", "cp2 x tp2 sp"),
        ("qwen2", "bt_dr", "dp2 overlapped"),
        ("qwen3", "dpo", "tp2"),
        ("qwen3", "dpo", "tp2 sp"),
        ("qwen3", "dpo", "cp2 x pp2"),
        ("qwen3", "bt_dr", "vpp x dp2 overlapped"),
    ],
)
def test_every_family_has_the_numbers_of_one_process(kind, objective, layout, runs, run_on, tmp_path):
    """Of other families: biases and norms of queries and keys are on several processes, and get one gradient."""
    size, parallel = LAYOUTS[layout]
    found = run_on(size, runs.recipe(objective, tmp_path / "run", kind=kind, parallel=parallel))
    assert_same(found, runs.single(objective, kind=kind))


def test_the_compared_divergence_is_not_clamped(runs):
    """KTO takes max(0, estimate): were it negative in every step, layouts could not be told apart by it."""
    found = runs.single("kto").divergence
    assert found[0] == pytest.approx(0, abs=1e-4)  # the policy is still the reference
    assert max(found) > 0.01  # hundreds of times what layouts may differ by


@pytest.mark.parametrize("layout", ["tp2 sp", "pp2", "cp2", "dp2"])
def test_bfloat16_is_no_worse_than_on_one_process(layout, runs, run_on, tmp_path):
    """Weights in bfloat16 with float32 main weights, gradients and log-probs."""
    size, parallel = LAYOUTS[layout]
    recipe = runs.recipe("sft", tmp_path / "run", parallel=parallel, model={"dtype": "bfloat16"})
    found = run_on(size, recipe)
    exact, rounded = runs.single("sft"), runs.single("sft", dtype="bfloat16")
    for ours, expected in zip(tiny.history(found.output), tiny.history(exact.output), strict=True):
        # bfloat16 keeps 8 bits: 4e-3 per rounding, averaged over some thousand tokens
        assert ours["loss"] == pytest.approx(expected["loss"], rel=4e-3)
        assert ours["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=4e-2)
    truth = weights(exact.output)
    mine, alone = weights(found.output), weights(rounded.output)
    assert {tensor.dtype for tensor in mine.values()} == {torch.bfloat16}
    # A sum split in two is rounded three times, its halves being smaller by the square root of 2: twice the variance
    # of one rounding, and some for three steps' coincidences
    assert distance(mine, truth) < 1.5 * distance(alone, truth)


def distance(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    return float(sum((found[name].double() - truth[name].double()).square().sum() for name in truth) ** 0.5)
