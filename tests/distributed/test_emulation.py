"""The emulation of CUDA holds what its table says, no more: for the megatron-core that is installed, and for torch."""

from __future__ import annotations

import functools
import importlib
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from silva.engine.parallel import emulation

import megatron.core
import pytest
import torch
import torch.distributed as dist
from worlds import world

from silva.engine.recipe.schema import Recipe
from silva.engine.training import trainer

CORE = "megatron.core."
VERSION = tuple(int(part) for part in megatron.core.__version__.split(".")[:2])
RANDOM = CORE + "tensor_parallel.random"
BUFFERS = CORE + "distributed.param_and_grad_buffer"
PIPELINE = CORE + "pipeline_parallel."
OPTIMIZER = CORE + "optimizer."
# Everything that is replaced, and the modules that must be seen calling it: who stops to, has made the entry's reason
# out of date.
CALLERS: dict[str, set[str]] = {
    "torch.cuda.current_device": {
        CORE + "tensor_parallel.layers",  # parameters
        BUFFERS,
        PIPELINE + "p2p_communication",  # received tensors
    },
    "torch.cuda.synchronize": {
        PIPELINE + "p2p_communication",
        CORE + "dist_checkpointing.strategies.async_utils",
    },
    # from 0.19 on
    "torch.cuda.current_stream": {BUFFERS} if VERSION >= (0, 19) else set(),
    "torch.cuda.get_rng_state": {RANDOM},
    "torch.cuda.manual_seed": {RANDOM},
    f"{RANDOM}._get_cuda_rng_state": {RANDOM},
    f"{RANDOM}._set_cuda_rng_state": {RANDOM},
    "torch.Tensor.cuda": {CORE + "models.common.language_module.language_module"},
    "torch.Tensor.type": {OPTIMIZER + "distrib_optimizer", OPTIMIZER + "clip_grads"},
    "torch.tensor": {OPTIMIZER + "optimizer"},
    "torch.zeros": {OPTIMIZER + "clip_grads", PIPELINE + "schedules"},
    "torch.distributed.isend": {PIPELINE + "p2p_communication"},
    # batched works call the function they were given
    "torch.distributed.distributed_c10d.isend": {"torch.distributed.distributed_c10d"},
    f"{BUFFERS}._coalescing_manager": {BUFFERS},
    f"{BUFFERS}.dist_all_gather_func": {BUFFERS},
    f"{BUFFERS}.dist_reduce_scatter_func": {BUFFERS},
}
# used once, while megatron-core is imported: `test_megatron_takes_its_compiler_from_torch`
AT_IMPORT = {"megatron.core.jit.jit_fuser"}
# Every entry is called in one of them: batched and single sends, recomputation, a tied embedding at both ends of a
# pipeline; interleaving with coalesced collectives in flight
RUNS: list[tuple[int, str, dict[str, Any]]] = [
    (4, "tied", {"tensor": 2, "pipeline": 2, "recompute": "full"}),
    (4, "untied", {"pipeline": 2, "virtual_pipeline": 2, "overlap": True}),
]


def ours(value: Any) -> bool:
    """Whether a function was written in emulation.py, under any number of wrappers."""
    while inspect.isfunction(value):
        if value.__code__.co_filename == emulation.__file__:
            return True
        value = getattr(value, "__wrapped__", None)
    return False


def replaced() -> Iterator[tuple[str, Any]]:
    """Every name of torch and megatron-core that holds a function of ours, and the function."""
    owners: dict[str, Any] = {
        name: module
        for name, module in sys.modules.items()
        if name.split(".")[0] in ("torch", "megatron") and module is not None
    }
    for owner, holder in [*owners.items(), ("torch.Tensor", torch.Tensor)]:
        yield from ((f"{owner}.{name}", value) for name, value in list(vars(holder).items()) if ours(value))


def test_the_table_lists_all_that_is_replaced():
    found = dict(replaced())
    listed = {*CALLERS, *AT_IMPORT}
    assert listed <= found.keys()
    # other modules have imported some of them, under whatever name
    functions = [found[name] for name in listed]
    assert [name for name, value in found.items() if not any(value is each for each in functions)] == []
    table = emulation.__doc__ or ""
    for name in listed:
        assert name.rpartition(".")[2] in table, name


def resolve(path: str) -> tuple[Any, str]:
    """The module or class that holds a name, and the name's last part."""
    owner, _, name = path.rpartition(".")
    return (torch.Tensor if owner == "torch.Tensor" else importlib.import_module(owner)), name


def calls(recipe: Recipe) -> tuple[set[tuple[str, str]], set[str]]:
    """(replaced name, calling module) of a run; and what else the table claims that was seen to happen."""
    called: set[tuple[str, str]] = set()
    claims: set[str] = set()
    sent: list[torch.Tensor] = []
    # a factory of a tensor on the CPU, or a conversion, is none of the emulation's business
    matters: dict[str, Callable[..., bool]] = {
        "torch.Tensor.type": lambda args, options: len(args) == 1 and not options,
        "torch.tensor": lambda args, options: emulation._is_cuda(options.get("device")),
        "torch.zeros": lambda args, options: emulation._is_cuda(options.get("device")),
    }

    def recorded(path: str, function: Any) -> Any:
        @functools.wraps(function)
        def record(*args: Any, **options: Any) -> Any:
            if matters.get(path, lambda args, options: True)(args, options):
                called.add((path, sys._getframe(1).f_globals["__name__"]))
            if path.endswith(".isend"):
                sent.append(args[0] if args else options["tensor"])
            if path.endswith("._coalescing_manager") and options.get("async_ops"):
                claims.add("asynchronous and coalesced")
            return function(*args, **options)

        return record

    for path in CALLERS:
        owner, name = resolve(path)
        setattr(owner, name, recorded(path, getattr(owner, name)))
    # batched works are refused unless both names hold the same function; who calls it tells them apart
    dist.distributed_c10d.isend = dist.isend
    schedules: Any = importlib.import_module(f"{PIPELINE}schedules")
    deallocate = schedules.deallocate_output_tensor

    def recorded_deallocate(out: Any, *flag: Any) -> None:
        outs = [each for each in (out if isinstance(out, list) else [out]) if each is not None]
        full = [each for each in outs if each.numel() > 1]
        deallocate(out, *flag)
        if any(each.numel() == 1 and any(each is tensor for tensor in sent) for each in full):
            claims.add("empties what was sent")

    schedules.deallocate_output_tensor = recorded_deallocate
    trainer.train(recipe)
    both = "torch.distributed.isend", "torch.distributed.distributed_c10d.isend"
    called |= {(both[1], caller) for path, caller in called if path == both[0]}
    return called, claims


@pytest.fixture(scope="module")
def seen(runs, tmp_path_factory) -> tuple[set[tuple[str, str]], set[str]]:
    called: set[tuple[str, str]] = set()
    claims: set[str] = set()
    for size, kind, parallel in RUNS:
        recipe = runs.recipe("sft", tmp_path_factory.mktemp("run"), kind=kind, parallel=parallel)
        for one in world(size, calls, recipe):
            called |= one[0]
            claims |= one[1]
    return called, claims


@pytest.mark.parametrize("path", CALLERS)
def test_megatron_still_calls_what_is_replaced(path, seen):
    callers = {caller for name, caller in seen[0] if name == path}
    assert CALLERS[path] <= callers


def test_megatron_still_needs_what_is_repaired(seen):
    """Sent tensors are emptied; collectives are coalesced in flight."""
    assert seen[1] == {"empties what was sent", "asynchronous and coalesced"}


def test_megatron_takes_its_compiler_from_torch():
    assert ours(importlib.import_module("megatron.core.jit").jit_fuser)
    assert not ours(torch.compile)


def test_torch_itself_keeps_what_it_needs_of_the_replaced_names():
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta"
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.ones(1).type(torch.float64).dtype == torch.float64
    assert torch.arange(3).type() == "torch.LongTensor"
    # a batched work compares the function it is given with distributed_c10d's own
    assert dist.isend is dist.distributed_c10d.isend


IN_TORCH = [path for path in CALLERS if path.startswith("torch.")]
INERT = f"""
import sys
import torch, torch.distributed
torch.cuda.is_available = lambda: True
# this changes torch by itself, which is not our doing
import megatron.core.models.gpt.gpt_model, megatron.core.distributed
modules = {{name: module for name, module in sys.modules.items() if name.split(".")[0] == "torch"}}
owners = modules | {{"torch.Tensor": torch.Tensor}}
def held():
    named = {{path: getattr(owners[path.rpartition(".")[0]], path.rpartition(".")[2]) for path in {IN_TORCH!r}}}
    return named | {{(name, key): value for name, module in modules.items() for key, value in vars(module).items()}}
before = held()
from silva.engine.parallel import emulation
assert not emulation.install()
after = held()
for key, value in before.items():
    assert after[key] is value, key
print(len(before))
"""


def test_with_a_gpu_nothing_is_touched():
    """In a fresh interpreter: no name of torch changes."""
    done = subprocess.run([sys.executable, "-c", INERT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10_000


def test_a_second_call_changes_nothing():
    before = {path: getattr(*resolve(path)) for path in CALLERS}
    assert emulation.install()
    assert before == {path: getattr(*resolve(path)) for path in CALLERS}
