"""Every layout against one process: outputs and whole gradients of the model; and layouts that cannot be."""

import os
import socket
from pathlib import Path
from typing import Any

from silva.engine.parallel import groups, optimizer

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from worlds import world

from benchmarks import random_models
from silva.engine.data.trees.packing import TreeBatch
from silva.engine.errors import UserError
from silva.engine.model import gpt, hf, hf_export
from silva.engine.recipe.schema import Parallel, Training
from silva.engine.training import passes
from silva.engine.training.metrics import SUMS

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "tp2": (2, {"tensor": 2}),
    "tp2 sp": (2, {"tensor": 2, "sequence_parallel": True, "recompute": "selective"}),
    "tp4": (4, {"tensor": 4}),
    "pp2": (2, {"pipeline": 2, "recompute": "full"}),
    "pp4": (4, {"pipeline": 4, "recompute": "selective"}),
    "pp2 uneven": (2, {"pipeline": 2, "stage_layers": [1, 3], "recompute": "full"}),
    "vpp": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "vpp uneven": (2, {"pipeline": 2, "virtual_pipeline": 2, "stage_layers": [1, 2, 1, 0]}),
    "cp2": (2, {"context": 2, "recompute": "selective"}),
    "cp4": (4, {"context": 4, "recompute": "full"}),
    "cp2 x dp2": (4, {"context": 2}),
    "tp2 x pp2 sp": (4, {"tensor": 2, "pipeline": 2, "sequence_parallel": True}),
    "cp2 x tp2": (4, {"context": 2, "tensor": 2}),
    "cp2 x tp2 sp": (4, {"context": 2, "tensor": 2, "sequence_parallel": True, "recompute": "full"}),
    "cp2 x pp2 uneven": (4, {"context": 2, "pipeline": 2, "stage_layers": [3, 1]}),
    "cp2 x vpp": (4, {"context": 2, "pipeline": 2, "virtual_pipeline": 2, "recompute": "selective"}),
    "tp2 x pp2 x dp2": (8, {"tensor": 2, "pipeline": 2}),
}
# in float32, and logits beside log-probs; the gradients below hold every layout to float64
OUTPUTS = ("dp2", "tp2 sp", "tp4", "pp2", "vpp uneven", "cp4", "cp2 x tp2 sp", "tp2 x pp2 sp")
# One key-value head on up to four processes; a tied embedding at both ends of a pipeline; a sliding window that spans
# other processes' tokens.
GRADIENTS: list[tuple[str, gpt.Head, tuple[str, ...]]] = [
    ("llama", "lm", ("tp2", "pp4", "cp2", "tp2 x pp2 sp", "cp2 x tp2", "cp2 x vpp", "tp2 x pp2 x dp2")),
    ("llama-tied", "lm", ("tp2", "tp2 sp", "pp2", "vpp uneven", "cp4", "cp2 x pp2 uneven", "tp2 x pp2 sp")),
    ("mistral", "lm", ("cp2", "cp4", "cp2 x tp2 sp")),
    ("mistral-no-window", "reward", ("dp2", "tp2", "tp2 sp", "tp4", "pp2", "pp2 uneven", "vpp",
                                     "cp2", "cp2 x dp2", "cp2 x tp2 sp", "cp2 x pp2 uneven")),
    ("llama3-tied", "lm", ("tp2", "cp2", "tp2 x pp2 sp")),
    ("llama-biased", "lm", ("tp2", "tp2 sp", "pp2", "cp2 x tp2", "tp2 x pp2 x dp2")),
    ("qwen2", "lm", ("dp2", "tp2", "tp2 sp", "pp2", "cp2", "cp2 x tp2 sp", "tp2 x pp2 sp")),
    ("qwen2-tied", "reward", ("tp2", "tp4", "cp2 x pp2 uneven")),
    ("qwen3", "lm", ("dp2", "tp2", "tp2 sp", "tp4", "pp2", "cp2", "cp2 x tp2", "cp2 x tp2 sp", "tp2 x pp2 x dp2")),
    ("qwen3-tied", "reward", ("tp2", "vpp", "cp2 x tp2 sp")),
    ("phi3", "lm", ("tp2", "tp4", "tp2 x pp2 sp")),
]  # fmt: skip
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
    for size, layout in (LAYOUTS[name] for name in OUTPUTS):
        with_head = [found for found in world(size, model_outputs, folder, layout) if found]
        assert len(with_head) == size // layout.get("pipeline", 1)
        for found in with_head:
            for ours, theirs in zip(found, expected, strict=True):
                # float32: sums of about a hundred terms in another order
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5, err_msg=str(layout))


def write_gradients(
    folder: Path, target: Path, layout: dict, head: gpt.Head, dtype: torch.dtype = torch.float64
) -> float:
    """A weighted sum of all sequences' values; its gradients are exported as if they were the weights."""
    parallel = Parallel(**layout, distributed_optimizer=False)
    bare, shape = random_models.build(folder, parallel, head=head, dtype=dtype)
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
            chunk.double()  # gradients of bfloat16 weights are wider than these
            for parameter in chunk.parameters():
                parameter.copy_(parameter.main_grad)
    options = {"reward_format": "sequence_classification", "dtype": torch.float64}
    hf_export.export(bare, shape, source=folder, folder=target, head=head, **options)
    return float(sums[0])


@pytest.mark.parametrize(("kind", "head", "layouts"), GRADIENTS, ids=[kind for kind, _, _ in GRADIENTS])
def test_gradients_are_those_of_one_process(kind, head, layouts, tmp_path):
    folder = random_models.checkpoint(tmp_path / "model", kind)
    [value] = world(1, write_gradients, folder, tmp_path / "one", {}, head)
    expected = load_file(tmp_path / "one" / "model.safetensors")
    for layout in layouts:
        target = tmp_path / layout
        size, parallel = LAYOUTS[layout]
        values = world(size, write_gradients, folder, target, parallel, head)
        assert values == pytest.approx([value] * size, rel=1e-9), layout
        found = exported(target)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            # float64
            apart = float((found[name] - gradient).abs().max() / gradient.abs().max())
            assert apart < 1e-9, (layout, name, apart)


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in folder.glob("*.safetensors") for name, x in load_file(file).items()}


def error(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Relative error of a whole gradient."""
    apart = sum(float((found[name] - x).square().sum()) for name, x in truth.items())
    return (apart / sum(float(x.square().sum()) for x in truth.values())) ** 0.5


def test_bfloat16_gradients_are_no_worse_than_on_one_process(tmp_path):
    folder = random_models.checkpoint(tmp_path / "model", "llama")

    def gradients(name: str, layout: str | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        size, parallel = LAYOUTS[layout] if layout else (1, {})
        world(size, write_gradients, folder, tmp_path / name, parallel, "lm", dtype)
        return exported(tmp_path / name)

    truth = gradients("truth", None, torch.float64)
    alone = error(gradients("one", None, torch.bfloat16), truth)
    assert 1e-3 < alone < 1e-1  # bfloat16 keeps 8 bits, and four layers pass errors on
    for layout in ("dp2", "tp2", "tp2 sp", "pp2", "vpp", "cp2", "cp2 x tp2 sp"):
        # A sum split in two is rounded three times, its halves being smaller by the square root of 2: twice the
        # variance of one rounding, and as much again where both tensor and context parallelism split
        assert error(gradients(layout, layout, torch.bfloat16), truth) < 2 * alone, layout


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
        (3, {"context": 2}, r"parallel\.context 2 = 2 does not divide the number of processes, 3"),
        (
            2,
            {"context": 2, "tensor": 2},
            r"parallel\.context 2 = 4 does not divide the number of processes, 2",
        ),
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


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (
            {"stage_layers": [1, 2]},
            r"parallel\.stage_layers is \[1, 2\], together 3 layers, but the model has 4",
        ),
        (
            {"stage_layers": [1, 1, 2]},
            r"parallel\.stage_layers: found 3 numbers; .*pipeline x virtual_pipeline = 2",
        ),
        (
            {"stage_layers": [2, 2], "virtual_pipeline": 2},
            r"parallel\.stage_layers: found 2 numbers; .*pipeline x virtual_pipeline = 4",
        ),
        (
            {"virtual_pipeline": 3},
            r"parallel\.virtual_pipeline is 6, but the model's 4 .*parallel\.stage_layers",
        ),
    ],
)
def test_stages_that_do_not_make_the_model_are_refused(layout, said, tmp_path):
    shape = hf.read_shape(random_models.checkpoint(tmp_path, "llama"))
    with pytest.raises(UserError, match=said) as error:
        gpt.check_layout(shape, Parallel(pipeline=2, **layout))
    assert "\n" not in str(error.value)


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
