"""Keeps the optimizer's state in host memory: main weights and both moments, 12 of a bfloat16 parameter's 18 bytes.

They are used once a step, when no activations are held. `keep_on_host` leaves the GPU the storage of one portion of
them at a time: a portion is copied in, updated by the same fused kernel as without it, and copied back. Numbers are
those of the optimizer that keeps everything on the GPU, bit for bit.

Why not the CPU's own AdamW: torchrun gives every process one thread, and a step of it would take longer than the
24 bytes a parameter that travel here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

PORTION = (
    1 << 26
)  # elements that are on the GPU at a time, unless a single weight has more; 0.75 GiB of state
# Elements that are allocated on the host together, 1 GiB: torch rounds page-locked allocations up to a power of two,
# which would waste a third of the memory if every tensor were one.
SLAB = 1 << 28
MOMENTS = ("exp_avg", "exp_avg_sq")


def keep_on_host(optimizer: Any) -> None:
    """Move the state of megatron-core's optimizer to host memory, for good.

    Args:
        optimizer: of `get_megatron_optimizer`, over distributed optimizers that run our `FusedAdam`. Weights must be in
            place: main weights of a bfloat16 model are moved, those of a float32 model are the model's own and stay.
    """
    for distributed in optimizer.chained_optimizers:
        if distributed.optimizer is not None:  # a process may own no slice of any weight
            _Host(distributed)


class _Host:
    """Host copies of one distributed optimizer's state, and the methods of it that reach for the state."""

    def __init__(self, distributed: Any) -> None:
        self.distributed, self.adam = distributed, distributed.optimizer
        self.main: dict[Tensor, Tensor] = {}  # by main weight: its values
        self.model: dict[Tensor, Tensor] = {}  # by main weight: the bfloat16 weight made from it
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
            distributed._copy_main_params_to_model_params = lambda: None  # `step` has done it

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.adam.param_groups for p in group["params"])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """An optimizer step, portion by portion."""
        for group in self.adam.param_groups:
            group["step"] = group.get("step", 0) + 1
            for portion in portions([p for p in group["params"] if p.grad is not None]):
                self._update(group, portion)

    def _update(self, group: dict[str, Any], portion: list[Tensor]) -> None:
        # All copies and the kernel run on one stream, in order: memory that is freed here is only used again, and host
        # memory only written again, by what comes after them.
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
        """What megatron-core saves of a weight."""
        settle()
        p = self._main_of(model_param)
        return {"param": self.main.get(p, p), **self.adam.state[p]}

    def set_state_of(self, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        """What it loads."""
        for name, own in self.state_of(model_param).items():
            own.data.copy_(tensors[name])

    def _main_of(self, model_param: Tensor) -> Tensor:
        group, place = self.distributed.model_param_group_index_map[model_param]
        found: Tensor = self.adam.param_groups[group]["params"][place]
        return found

    def load_settings(self, state_dict: dict[str, Any]) -> None:
        """Learning rates, steps and the like; tensors are loaded into the host's by `set_state_of`.

        torch's own method would move them to the device of the weights.
        """
        for group, saved in zip(self.adam.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})


def portions(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """What of a group is on the GPU together."""
    portion: list[Tensor] = []
    for p in parameters:
        if portion and sum(each.numel() for each in portion) + p.numel() > PORTION:
            yield portion
            portion = []
        portion.append(p)
    if portion:
        yield portion


class _Slabs:
    """Host memory, page-locked where there is a GPU, so that copies run beside the host."""

    def __init__(self, total: int) -> None:
        """total: elements that will be asked for."""
        self._size = min(SLAB, total)
        self._left: list[Tensor] = []  # of each slab what nobody has yet

    def like(self, x: Tensor) -> Tensor:
        """A float32 tensor of that shape; without memory, as `x`, where only a plan is made."""
        if x.is_meta:
            return torch.empty_like(x, dtype=torch.float32)
        size = x.numel()
        place = next((k for k, left in enumerate(self._left) if len(left) >= size), len(self._left))
        if place == len(self._left):
            self._left.append(torch.empty(max(self._size, size), dtype=torch.float32, pin_memory=x.is_cuda))
        found, self._left[place] = self._left[place][:size], self._left[place][size:]
        return found.view(x.shape)


def settle() -> None:
    """Wait for copies to the host: the CPU may read what a step has written only after it."""
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()
