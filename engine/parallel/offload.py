"""Keeps the optimizer's state in host memory: main weights and both moments, 12 of a bfloat16 parameter's 18 bytes.

They are used once a step, when no activations are held. With `keep_on_host`, the GPU holds one portion of them at a
time: a portion is copied to the GPU, updated by the kernel that also serves without `keep_on_host`, and copied back.
The numbers are those of the optimizer that keeps everything on the GPU, bit for bit.

AdamW does not run on the CPU instead, because torchrun gives every process one thread: a step there would take longer
than copying the 24 bytes per parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

# elements that are on the GPU at a time, unless a single weight has more: 0.75 GiB of state
PORTION = 1 << 26
# Elements that are allocated on the host together: 1 GiB. torch rounds page-locked allocations up to a power of two,
# which would waste a third of the memory if every tensor had an allocation of its own.
SLAB = 1 << 28
MOMENTS = ("exp_avg", "exp_avg_sq")


def keep_on_host(optimizer: Any) -> None:
    """Move the state of megatron-core's optimizer to host memory, where it stays.

    Args:
        optimizer: of `get_megatron_optimizer`, over distributed optimizers that run our `FusedAdam`. Weights must be
            in place: main weights of a bfloat16 model are moved, those of a float32 model are the model's own and
            stay on the GPU.
    """
    for distributed in optimizer.chained_optimizers:
        # None if this process owns no slice of any weight
        if distributed.optimizer is not None:
            _Host(distributed)


class _Host:
    """Holds host copies of one distributed optimizer's state, and replaces its methods that use the state.

    Attributes:
        distributed: megatron-core's distributed optimizer.
        adam: the optimizer inside it.
        main: the values of each main weight, on the host.
        model: the bfloat16 weight made from each main weight.
    """

    def __init__(self, distributed: Any) -> None:
        self.distributed, self.adam = distributed, distributed.optimizer
        self.main: dict[Tensor, Tensor] = {}
        self.model: dict[Tensor, Tensor] = {}
        groups = distributed.shard_float16_groups, distributed.shard_fp32_from_float16_groups
        slabs = _Slabs(
            sum(p.numel() for mains in groups[1] for p in mains)
            + len(MOMENTS) * sum(p.numel() for p in self._parameters())
        )
        for weights, mains in zip(*groups, strict=True):
            for weight, main in zip(weights, mains, strict=True):
                self.main[main], self.model[main] = slabs.like(main).copy_(main), weight
                main.untyped_storage().resize_(0)
        for p in self._parameters():
            self.adam.state[p] = {name: slabs.like(p).zero_() for name in MOMENTS}
        self.adam.step = self.step
        self.adam.load_state_dict = self.load_settings
        distributed._get_main_param_and_optimizer_states = self.state_of
        distributed._set_main_param_and_optimizer_states = self.set_state_of
        if self.main:
            # `step` has already copied them
            distributed._copy_main_params_to_model_params = lambda: None

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.adam.param_groups for p in group["params"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take an optimizer step, portion by portion."""
        for group in self.adam.param_groups:
            group["step"] = group.get("step", 0) + 1
            for portion in portions([p for p in group["params"] if p.grad is not None]):
                self._update(group, portion)

    def _update(self, group: dict[str, Any], portion: list[Tensor]) -> None:
        # All copies and the kernel run in order on one stream. So memory that is freed here is used again, and host
        # memory is written again, only by work that comes after them.
        moments = []
        for p in portion:
            if p in self.main:
                host = self.main[p]
                p.untyped_storage().resize_(host.nbytes)
                p.copy_(host, non_blocking=True)
            state = self.adam.state[p]
            moments.append([torch.empty_like(p).copy_(state[name], non_blocking=True) for name in MOMENTS])
        self.adam.update(group, portion, [m[0] for m in moments], [m[1] for m in moments])
        for p, found in zip(portion, moments, strict=True):
            for name, moment in zip(MOMENTS, found, strict=True):
                self.adam.state[p][name].copy_(moment, non_blocking=True)
            if p in self.main:
                self.model[p].copy_(p)
                self.main[p].copy_(p, non_blocking=True)
                p.untyped_storage().resize_(0)

    def state_of(self, model_param: Tensor) -> dict[str, Tensor]:
        """Return what megatron-core saves of a weight."""
        settle()
        p = self._main_of(model_param)
        return {"param": self.main.get(p, p), **self.adam.state[p]}

    def set_state_of(self, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        """Take over what megatron-core loads of a weight."""
        for name, own in self.state_of(model_param).items():
            own.data.copy_(tensors[name])

    def _main_of(self, model_param: Tensor) -> Tensor:
        group, place = self.distributed.model_param_group_index_map[model_param]
        found: Tensor = self.adam.param_groups[group]["params"][place]
        return found

    def load_settings(self, state_dict: dict[str, Any]) -> None:
        """Load learning rates, steps and other settings of the parameter groups; `set_state_of` loads the tensors.

        torch's own method would move the tensors to the device of the weights.
        """
        for group, saved in zip(self.adam.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})


def portions(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the parameters of a group in portions, each of which is on the GPU at one time."""
    portion: list[Tensor] = []
    for p in parameters:
        if portion and sum(each.numel() for each in portion) + p.numel() > PORTION:
            yield portion
            portion = []
        portion.append(p)
    if portion:
        yield portion


class _Slabs:
    """Hands out host memory, page-locked where there is a GPU, so that copies are asynchronous.

    Args:
        total: elements that will be asked for.
    """

    def __init__(self, total: int) -> None:
        self._size = min(SLAB, total)
        # the free part of each slab
        self._left: list[Tensor] = []

    def like(self, x: Tensor) -> Tensor:
        """Return a float32 tensor of the shape of `x`; like `x`, it has no memory if only a plan is made."""
        if x.is_meta:
            return torch.empty_like(x, dtype=torch.float32)
        size = x.numel()
        place = next((k for k, left in enumerate(self._left) if len(left) >= size), len(self._left))
        if place == len(self._left):
            self._left.append(torch.empty(max(self._size, size), dtype=torch.float32, pin_memory=x.is_cuda))
        found, self._left[place] = self._left[place][:size], self._left[place][size:]
        return found.view(x.shape)


def settle() -> None:
    """Wait for copies to the host, after which the CPU may read what a step has written."""
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
