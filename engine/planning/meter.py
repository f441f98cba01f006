"""Counts what running a module costs, operation by operation as torch dispatches them, also on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# these operations return memory or a view of it and move no bytes
FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
    "lift_fresh",
}


@dataclass
class Cost:
    """Holds what a stretch of work takes on one GPU.

    Attributes:
        flops: floating-point operations of matrix products.
        traffic: bytes that everything else reads and writes.
        wire: bytes this GPU sends in collectives, by the ring algorithm.
        attention: number of attention operations (one per layer), whose work depends on the trees.
        attention_backward: number of their backward passes.
        context_wire: bytes such as `wire`, but sent among context-parallel processes.
    """

    flops: float = 0
    traffic: float = 0
    wire: float = 0
    attention: int = 0
    attention_backward: int = 0
    context_wire: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, name) + getattr(other, name) for name in COSTS))

    def scaled(self, factor: float) -> Cost:
        """Return the cost of `factor` times the work."""
        return Cost(*(getattr(self, name) * factor for name in COSTS))


COSTS = ("flops", "traffic", "wire", "attention", "attention_backward", "context_wire")


class Meter(TorchDispatchMode):
    """Counts the cost of what runs under it, and the bytes of live storages that were made under it.

    A storage is freed when torch frees it, so the count at the end of a forward pass is what is kept for the
    backward pass. Collectives count as ring algorithms send: (n - 1) / n of the whole for a gather or a scatter
    over n processes, twice that for an all-reduce.

    Attributes:
        context_group: name of the group whose collectives are counted apart, as `Cost.context_wire`.
        live: bytes of the storages that were made under the meter and are not freed.
        peak: the largest `live` since the last `restart`.
        cost: what was counted since the last `restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.context_group = ""
        self.live = self.peak = 0
        self.cost = Cost()
        self._sizes: dict[int, int] = {}

    def restart(self) -> Cost:
        """Return the cost so far; counting goes on from zero, and the peak from what is live."""
        cost, self.cost, self.peak = self.cost, Cost(), self.live
        return cost

    def kernel(self, arguments: Sequence[Any]) -> None:
        """Count a kernel that torch does not see as one that reads or writes each of its tensors once."""
        self.cost.traffic += sum(_bytes(x) for x in arguments if isinstance(x, Tensor))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if func.namespace == "c10d":
            self._send(packet.__name__, args)
        elif packet in flop_registry:
            self.cost.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        elif not func.is_view and packet.__name__ not in FREE:
            self.cost.traffic += sum(map(_bytes, (*given, *results)))
        # an operation that works in place returns a storage it was given and allocates none
        before = {x.untyped_storage()._cdata for x in given}
        for x in results:
            storage = x.untyped_storage()
            if storage._cdata not in before and storage._cdata not in self._sizes:
                self._hold(storage)
        return out

    def _send(self, name: str, args: tuple[Any, ...]) -> None:
        boxed = next((a for a in args if isinstance(a, torch.ScriptObject)), None)
        if boxed is None:
            return
        group = dist.ProcessGroup.unbox(boxed)
        whole = max((_bytes(x) for x in tree_leaves(args) if isinstance(x, Tensor)), default=0)
        sent = whole * (group.size() - 1) / group.size() * (2 if name.startswith("allreduce") else 1)
        if group.group_name == self.context_group:
            self.cost.context_wire += sent
        else:
            self.cost.wire += sent

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        self._sizes[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
