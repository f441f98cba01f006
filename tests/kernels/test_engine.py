"""The whole engine with every kernel in it: losses, gradient norms and weights of the plain torch operations."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from worlds import world

from silva.engine import objectives
from silva.engine.training import trainer
from silva.kernels import dispatch

STEPS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model whose heads have a size the attention kernel takes, and a few short trees."""
    folder = tmp_path_factory.mktemp("engine")
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 160}
    tiny.checkpoint(folder / "model", **shape)
    pairs = [
        {"prompt": f"What is {k} + 1?", "chosen": f"It is {k + 1}.", "rejected": f"It is {k}, I think."}
        for k in (2, 2, 7, 8)
    ]
    pairs[1] |= {"rejected": "I do not know."}  # two pairs of one tree
    tiny.write(folder / "pair.jsonl", pairs)
    answers = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    tiny.write(folder / "sft.jsonl", answers)
    return folder


def unfused(policy_chosen, policy_rejected, reference_chosen, reference_rejected, *, beta):
    """A loss that has no kernel of its own: beside the other kernels it runs through autograd."""
    return objectives.dpo(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=beta)


def run(folder: Path, name: str, output: Path, layout: dict, kernels: bool) -> None:
    rows = folder / ("sft.jsonl" if name == "sft" else "pair.jsonl")
    source = {
        "path": str(rows),
        "format": "prompt_completion" if name == "sft" else "preference",
        "absolute": name == "bt_dr",
    }
    if name == "unfused":
        objectives.add(unfused)
    training = {"max_steps": STEPS, "global_batch": 2}
    recipe = tiny.recipe(
        name, folder / "model", rows, output, parallel=layout, data={"train": [source]}, training=training
    )
    with dispatch.forced(kernels):
        trainer.train(recipe)


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="beside a GPU nothing takes torch's operations; benchmarks/gpu_step.py compares",
)
@pytest.mark.parametrize(
    ("name", "size", "layout"),
    [
        ("sft", 1, {}),
        ("nca", 1, {"recompute": "selective"}),
        ("kto", 1, {"recompute": "full"}),
        ("bt_dr", 1, {}),
        ("dpo", 2, {"tensor": 2, "sequence_parallel": True}),
        ("unfused", 1, {}),
    ],
)
def test_kernels_train_as_torch_does(folder, tmp_path, name, size, layout):
    found = {}
    for kernels in (False, True):
        output = tmp_path / str(kernels)
        world(size, run, folder, name, output, layout, kernels, timeout=600)
        found[kernels] = [line for line in tiny.history(output) if line["kind"] == "train"]
        weights = next((output / "export").glob("*.safetensors"))
        found[kernels, "weights"] = load_file(weights)
    assert len(found[True]) == STEPS
    for torch_step, kernel_step in zip(found[False], found[True], strict=True):
        # float32 sums in another order; a log-prob near -300 has a last digit of 3e-5
        assert kernel_step["loss"] == pytest.approx(torch_step["loss"], rel=1e-5)
        assert kernel_step["gradient_norm"] == pytest.approx(torch_step["gradient_norm"], rel=1e-4)
        for key in {"reward_chosen", "reward_rejected", "reward_margin"} & torch_step.keys():
            assert kernel_step[key] == pytest.approx(torch_step[key], rel=1e-4, abs=1e-5)
    for key, expected in found[False, "weights"].items():
        # two steps of at most the learning rate, 1e-3, each
        torch.testing.assert_close(found[True, "weights"][key], expected, rtol=0, atol=3e-5)
