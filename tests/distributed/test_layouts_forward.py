"""Every layout against one process: outputs and whole gradients of the model; and layouts that cannot be."""

import os
import socket
from pathlib import Path
from typing import Any

from silva.engine.parallel import emulation, groups, optimizer

import numpy as np
import pytest
import random_models
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from worlds import world

from silva.engine import passes
from silva.engine.config import Parallel, Training
from silva.engine.data.packing import TreeBatch
from silva.engine.errors import UserError
from silva.engine.metrics import SUMS
from silva.engine.model import gpt, hf

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {}),  # two data-parallel copies
    (2, {"tensor": 2}),
    (2, {"tensor": 2, "sequence_parallel": True, "recompute": "selective"}),
    (2, {"pipeline": 2, "recompute": "full"}),
    (2, {"pipeline": 2, "virtual_pipeline": 2}),
    (4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}),
    (4, {"tensor": 4}),
]
# one key-value head on up to four processes; a tied embedding at both ends of a pipeline
GRADIENTS: list[tuple[str, gpt.Head, list[tuple[int, dict[str, Any]]]]] = [
    ("llama", "lm", [LAYOUTS[1], LAYOUTS[5]]),
    ("llama-tied", "lm", LAYOUTS[1:6]),
    ("mistral-no-window", "reward", LAYOUTS),
]
# rows of different lengths, one of them padding alone: a pipeline has to send the length with the row
ROWS = [[0], [1, 2, 3], [], [4, 5]]


def packed() -> list[TreeBatch]:
    return [random_models.row([random_models.sequences(5, seed) for seed in seeds]) for seeds in ROWS]


def model_outputs(folder: Path, layout: dict) -> list[np.ndarray]:
    """On the last stage: log-probs of the scored positions of every row, and logits of two rows."""
    chunks, _ = random_models.build(folder, Parallel(**layout))
    rows = packed()
    found = random_models.outputs(chunks, rows)
    return found + random_models.outputs(chunks, [rows[1].tokens, rows[3].tokens], gpt.logits)


def test_outputs_are_those_of_one_process(tmp_path):
    folder = random_models.checkpoint(tmp_path, "llama")
    [expected] = world(1, model_outputs, folder, {})
    for size, layout in LAYOUTS:
        with_head = [found for found in world(size, model_outputs, folder, layout) if found]
        assert len(with_head) == size // layout.get("pipeline", 1)
        for found in with_head:
            for ours, theirs in zip(found, expected, strict=True):
                # float32: sums of about a hundred terms in another order
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5, err_msg=str(layout))


def write_gradients(folder: Path, target: Path, layout: dict, head: gpt.Head) -> float:
    """A weighted sum of all sequences' values; its gradients are exported as if they were the weights."""
    parallel = Parallel(**layout, distributed_optimizer=False)
    bare, shape = random_models.build(folder, parallel, head=head, dtype=torch.float64)
    chunks = optimizer.wrap(bare, parallel)
    optimizer.build(chunks, Training(global_batch=1, learning_rate=1.0), parallel)

    def loss(values: torch.Tensor, row: TreeBatch) -> tuple[torch.Tensor, torch.Tensor]:
        weight = torch.linspace(-1, 2, len(values), dtype=values.dtype)
        value = (values * weight).sum()
        return value, torch.nn.functional.pad(value.detach()[None], (0, len(SUMS) - 1))

    for chunk in chunks:
        chunk.zero_grad_buffer()
    rows = packed()[groups.data_rank() :: groups.data_size()]
    sums = passes.run_rows(chunks, rows, loss, training=True)
    with torch.no_grad():
        for chunk in bare:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.main_grad)
    options = {"reward_format": "sequence_classification", "dtype": torch.float64}
    hf.export(bare, shape, source=folder, folder=target, head=head, **options)
    return float(sums[0])


@pytest.mark.parametrize(("kind", "head", "layouts"), GRADIENTS, ids=[kind for kind, _, _ in GRADIENTS])
def test_gradients_are_those_of_one_process(kind, head, layouts, tmp_path):
    folder = random_models.checkpoint(tmp_path / "model", kind)
    [value] = world(1, write_gradients, folder, tmp_path / "one", {}, head)
    expected = load_file(tmp_path / "one" / "model.safetensors")
    for number, (size, layout) in enumerate(layouts):
        target = tmp_path / str(number)
        values = world(size, write_gradients, folder, target, layout, head)
        assert values == pytest.approx([value] * size, rel=1e-9), layout
        found = {k: v for file in target.glob("*.safetensors") for k, v in load_file(file).items()}
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            # float64
            error = float((found[name] - gradient).abs().max() / gradient.abs().max())
            assert error < 1e-9, (layout, name, error)


def test_weights_that_are_split_are_marked_as_split(tmp_path):
    folder = random_models.checkpoint(tmp_path, "llama")

    def marks() -> dict[str, tuple[bool, bool, int]]:
        [chunk], _ = random_models.build(folder, Parallel(tensor=2, sequence_parallel=True))
        return {
            name: (
                getattr(p, "tensor_model_parallel", False),
                getattr(p, "sequence_parallel", False),
                getattr(p, "partition_stride", 1),
            )
            for name, p in chunk.named_parameters()
        }

    found, _ = world(2, marks)
    for name, (split, replicated_over_the_row, stride) in found.items():
        assert replicated_over_the_row == ("norm" in name), name
        assert split == ("norm" not in name), name
        assert stride == (2 if "linear_fc1" in name else 1), name


@pytest.mark.parametrize(
    ("size", "layout", "said"),
    [
        (1, {"tensor": 2}, r"parallel\.tensor 2 x .* = 2 does not divide the number of processes, 1"),
        (3, {"pipeline": 2}, r"parallel\.pipeline 2 x .* = 2 does not divide the number of processes, 3"),
        (1, {"virtual_pipeline": 2}, r"parallel\.virtual_pipeline"),
        (1, {"sequence_parallel": True}, r"parallel\.sequence_parallel"),
    ],
)
def test_layouts_that_do_not_fit_the_processes_are_refused(size, layout, said):
    def attempt() -> str:
        with pytest.raises(UserError, match=said) as error:
            groups.initialize(Parallel(**layout))
        assert not dist.is_initialized()
        return str(error.value)

    assert len(set(world(size, attempt))) == 1


def test_a_row_that_sequence_parallelism_cannot_split_is_refused(tmp_path):
    folder = random_models.checkpoint(tmp_path, "llama")

    def attempt() -> None:
        [chunk], _ = random_models.build(folder, Parallel(tensor=2, sequence_parallel=True))
        with pytest.raises(ValueError, match="a row of 7 tokens"):
            gpt.logits(chunk, torch.arange(7))

    world(2, attempt)


def test_processes_started_by_torchrun_can_make_one_world_after_the_other(tmp_path):
    folder = random_models.checkpoint(tmp_path, "llama")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    layouts: list[dict[str, int]] = [{"tensor": 2}, {}]

    def twice() -> list[float]:
        dist.destroy_process_group()  # the test's own world; from here on only torchrun's variables
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        found = []
        for layout in layouts:
            [chunk], _ = random_models.build(folder, Parallel(**layout))
            assert groups.data_size() == 2 // layout.get("tensor", 1)
            found.append(float(gpt.forward(chunk, packed()[0]).sum()))
            dist.barrier()
            groups.shutdown()
        return found

    for first, second in world(2, twice):
        assert first == pytest.approx(second, rel=1e-5)


def test_emulation_leaves_a_gpu_machine_alone(monkeypatch):
    assert emulation.install()  # it is in place here; again: nothing happens
    before = {name: getattr(torch, name) for name in emulation.FACTORIES}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(emulation, "_installed", False)
    assert not emulation.install()
    assert before == {name: getattr(torch, name) for name in emulation.FACTORIES}


def test_emulation_keeps_what_torch_itself_needs_of_the_names_it_replaces():
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta"
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64
    assert torch.arange(3).type() == "torch.LongTensor"
    assert torch.compile is not None
    assert "megatron" not in torch.compile.__module__
