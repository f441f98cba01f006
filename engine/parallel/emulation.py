"""Runs megatron-core on the CPU: gives the CUDA names that it calls a meaning on a machine without a GPU.

megatron-core is written for GPUs, but needs very little to run unchanged with gloo. What is replaced, and why:

=====================================  ==================================================================
name                                   why
=====================================  ==================================================================
torch.cuda.current_device              parameters, buffers and received tensors are allocated on it
torch.cuda.synchronize                 called after batched point-to-point works and before checkpoints
torch.cuda.current_stream              called from 0.19 on before gradients are summed, to wait for recorded graphs
torch.cuda.get_rng_state, manual_seed; the tensor-parallel random tracker and recomputation keep and
_get_cuda_rng_state and                restore generator states; here they are the CPU generator's
_set_cuda_rng_state of megatron's
tensor_parallel.random
Tensor.cuda                            a tied embedding's second copy is moved to the GPU; here it stays
                                       where it is
Tensor.type()                          the optimizer tells half precision from full precision by names such as
                                       torch.cuda.FloatTensor, and gradient clipping asserts them
torch.tensor, torch.zeros              called with device="cuda" for scales, norms and flags
torch.distributed.isend, also in       megatron-core empties the `.data` of a tensor whose send is in flight;
distributed_c10d                       gloo holds that same tensor, so it is given an alias that keeps the
                                       storage (without it, interleaved pipelines were wrong in every run)
_coalescing_manager,                   gloo's asynchronous *coalesced* all-gather corrupts the heap about once
dist_all_gather_func and               in 400 overlapped runs; single asynchronous works do not
dist_reduce_scatter_func of megatron's
param_and_grad_buffer
jit_fuser of megatron.core.jit, which  torch.compile on the CPU costs two seconds a process and gains nothing
takes it from torch.compile
=====================================  ==================================================================

With a GPU present, nothing is replaced. Events, memory statistics and the methods of streams are never called on the
CPU and are not emulated.
`tests/distributed/test_emulation.py` compares this table with the megatron-core that is installed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _device

CPU = torch.device("cpu")
FACTORIES = ("tensor", "zeros")
TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    # The exactness tests train in float64, which megatron-core does not know. Called a FloatTensor, such a parameter
    # is its own main parameter, as a parameter of full precision has to be.
    torch.float64: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}

_installed = False


def install() -> bool:
    """Make megatron-core run on the CPU; a second call does nothing.

    Returns:
        Whether the emulation is in place. False means that CUDA is present; nothing is replaced then.

    Raises:
        RuntimeError: megatron-core was imported before; it binds some of these names on import.
    """
    global _installed
    if torch.cuda.is_available():
        return False
    if _installed:
        return True
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "megatron.core was imported before silva.engine.parallel could prepare it for the CPU"
        )
    # megatron-core warns where it is not set, which means something to GPUs alone
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _emulate_device()
    _emulate_random_states()
    _emulate_tensor_names()
    _emulate_factories()
    _keep_storage_of_sends()
    _import_without_compiling()
    _emulate_megatron_random_states()
    _collect_works_one_by_one()
    _installed = True
    return True


def _is_cuda(device: Any) -> bool:
    """Tell whether a `device` argument (name, torch.device, index or None) names a GPU."""
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


def _emulate_device() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.synchronize = lambda device=None: None
    cuda.current_stream = lambda device=None: None


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(new_state)


def _manual_seed(seed: int) -> None:
    torch.manual_seed(seed)


def _emulate_random_states() -> None:
    cuda: Any = torch.cuda
    cuda.get_rng_state = _get_rng_state
    # this does not recurse: torch.manual_seed itself calls torch.cuda.manual_seed_all, never torch.cuda.manual_seed
    cuda.manual_seed = _manual_seed


def _emulate_megatron_random_states() -> None:
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state, random._set_cuda_rng_state = _get_rng_state, _set_rng_state


def _emulate_tensor_names() -> None:
    tensor: Any = torch.Tensor
    own_type = tensor.type

    def type_of(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or self.dtype not in TYPE_NAMES:
            return own_type(self, *args, **kwargs)
        return TYPE_NAMES[self.dtype]

    tensor.type = type_of
    tensor.cuda = lambda self, *args, **kwargs: self


def _emulate_factories() -> None:
    # torch caches the set of factories that `with torch.device(...)` redirects; filled now, it holds the originals
    _device._device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return create


def _keep_storage_of_sends() -> None:
    distributed: Any = dist
    send = distributed.isend

    @functools.wraps(send)
    def isend(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return send(tensor.detach(), *args, **kwargs)

    # both names are replaced, because batched works compare the given function with distributed_c10d's by identity
    distributed.isend = distributed.distributed_c10d.isend = isend


def _import_without_compiling() -> None:
    """Import megatron-core while `torch.compile` is the identity; its decorators are bound on this import only."""
    with _replaced(torch, "compile", lambda function: function), warnings.catch_warnings():
        # its warnings recommend Transformer Engine and Apex, which exist for GPUs only
        warnings.simplefilter("ignore", UserWarning)
        importlib.import_module("megatron.core.models.gpt.gpt_model")


class _Works(list[Any]):
    """Holds asynchronous works that are waited for together, as a coalesced work is."""

    def wait(self) -> None:
        """Wait for all of them."""
        for work in self:
            work.wait()


def _collect_works_one_by_one() -> None:
    """Have megatron-core start single asynchronous works where it asks for coalesced ones."""
    buffers: Any = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    open_collections: list[_Works] = []

    def collected(collective: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(collective)
        def start(*args: Any, **kwargs: Any) -> Any:
            work = collective(*args, **kwargs)
            if work is not None and open_collections:
                open_collections[-1].append(work)
            return work

        return start

    @contextlib.contextmanager
    def manager(group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[_Works]:
        works = _Works()
        open_collections.append(works)
        with _replaced(dist, "all_reduce", collected(dist.all_reduce)):
            try:
                yield works
            finally:
                open_collections.pop()

    buffers._coalescing_manager = manager
    buffers.dist_all_gather_func = collected(buffers.dist_all_gather_func)
    buffers.dist_reduce_scatter_func = collected(buffers.dist_reduce_scatter_func)


@contextlib.contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Replace a name of a module while the block lasts."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
