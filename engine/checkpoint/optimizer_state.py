"""Gives the optimizer's state one form in a checkpoint, whichever optimizer wrote it and however it was split.

Main weights and moments are called `optimizer.state.param.<weight>`, `optimizer.state.exp_avg.<weight>` and
`optimizer.state.exp_avg_sq.<weight>`, and have the shape of the whole weight. With the distributed optimizer, a
process owns a range of a weight's flat elements; in the whole weight that range is a few boxes. Each process writes
the boxes it owns and reads those it needs, in place, so nothing is gathered on any layout.

megatron-core has a form of its own that any layout can read ("fully_reshardable"). It gathers the state of a model
slice in one process when it saves, and has every process read all of it when it loads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import (
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import FP32Optimizer
from torch import Tensor

PREFIX = "optimizer.state"


def sharded(
    model: dict[str, Any], optimizer: Any, metadata: dict[str, Any], *, loading: bool
) -> dict[str, Any]:
    """Return the optimizer's state for megatron-core's `dist_checkpointing`.

    Args:
        model: the sharded state of the model's chunks on this process, made of the parameters themselves, not of
            copies.
        optimizer: of `get_megatron_optimizer`.
        metadata: how optimizers that are not distributed name their state.
        loading: whether it will be read into. The distributed optimizer's moments are then allocated, if they are not
            yet.

    Returns:
        The state as `dist_checkpointing` takes it.
    """
    # megatron-core chains several only for experts and for frozen parameters, and the models here have neither
    [one] = optimizer.chained_optimizers
    if isinstance(one, DistributedOptimizer):
        return _distributed(model, one, loading=loading)
    found = optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    if not isinstance(one, FP32Optimizer):
        for main in nested_values(found["fp32_from_fp16_params"]):
            main.key = main.key.replace(f"{PREFIX}.fp32_param.", f"{PREFIX}.param.", 1)
        return dict(found)
    # the parameters are their own main weights
    parameters = one.get_parameters()
    weights = get_param_id_to_sharded_param_map(model, parameters)
    main = [
        make_sharded_optimizer_tensor(weights[place], p, prefix=f"{PREFIX}.param")
        for place, p in enumerate(parameters)
    ]
    return {"optimizer": found, "main": main}


def load(optimizer: Any, state: dict[str, Any]) -> None:
    """Take over the state that was read into `sharded(..., loading=True)`.

    Args:
        optimizer: of `get_megatron_optimizer`.
        state: as `sharded` returned it, after `dist_checkpointing.load`.
    """
    [one] = optimizer.chained_optimizers
    if isinstance(one, DistributedOptimizer):
        settings = {name: value for name, value in state.items() if name != "owned"}
        one.load_state_dict(settings)
    else:
        optimizer.load_state_dict(state["optimizer"] if isinstance(one, FP32Optimizer) else state)


def _distributed(model: dict[str, Any], one: Any, *, loading: bool) -> dict[str, Any]:
    if loading:
        # allocates the moments if no step has been taken yet
        one.load_state_dict(one.state_dict())
    weights = {
        weight.data: weight
        for weight in nested_values(extract_sharded_tensors_and_factories(model)[0])
        if weight.data is not None
    }
    owned = []
    for parameter, (start, end) in _ranges(one):
        for name, values in one._get_main_param_and_optimizer_states(parameter).items():
            # torch's Adam also keeps its number of steps here
            if name in ("param", "exp_avg", "exp_avg_sq"):
                key = f"{PREFIX}.{name}.{weights[parameter].key}"
                assert values.numel() == end - start, key
                owned += boxes_of(weights[parameter], key, values, start)
    return one.state_dict() | {"owned": owned}


def _ranges(one: Any) -> Iterator[tuple[Tensor, tuple[int, int]]]:
    """Yield each parameter with the range of its flat elements whose state this process owns."""
    for buffer in one.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, (ranges["param"].start, ranges["param"].end)


def boxes_of(
    weight: ShardedTensor | ShardedTensorFactory, key: str, values: Tensor, start: int
) -> list[ShardedTensor]:
    """Describe a range of a process's part of a weight as boxes of the whole weight.

    Args:
        weight: the process's part; a factory if it is itself made of several parts of the whole (gate and up
            projections of a tensor-parallel MLP).
        key: what the boxes' tensor is called.
        values: (elements of the range,) of any dtype; the boxes are views of it.
        start: the range's first element in the flat part.

    Returns:
        The boxes, in the order of the elements.

    Raises:
        ValueError: the parts of a factory do not make up the weight, or are no ranges of its flat elements.
    """
    values = values.view(-1)
    whole = torch.empty(weight.data.shape, dtype=values.dtype, device="meta")
    if isinstance(weight, ShardedTensorFactory):
        parts = list(nested_values(replace(weight, key=key, data=whole).build()))
    else:
        parts = [replace(weight, key=key, data=whole, dtype=values.dtype)]
    if sum(part.data.numel() for part in parts) != whole.numel():
        raise ValueError(f"{key}: its parts do not make up the weight")
    found = []
    for part in parts:
        first = part.data.storage_offset()
        if not part.data.is_contiguous():
            raise ValueError(f"{key}: a part of it is not a range of its flat elements")
        lower, upper = max(first, start), min(first + part.data.numel(), start + len(values))
        # other data-parallel processes hold copies of this slice but own other ranges of it, so all of them write
        replica = (*part.replica_id[:-1], 0)
        for offset, shape in boxes(part.data.shape, lower - first, upper - first):
            size = math.prod(shape)
            shape = (1,) * part.prepend_axis_num + shape
            offset = (0,) * part.prepend_axis_num + offset
            found.append(
                replace(
                    part,
                    data=values[lower - start : lower - start + size].view(shape),
                    local_shape=shape,
                    global_offset=tuple(a + b for a, b in zip(part.global_offset, offset, strict=True)),
                    # the boxes form no regular grid
                    axis_fragmentations=None,
                    prepend_axis_num=0,
                    replica_id=replica,
                )
            )
            lower += size
    return found


def boxes(shape: Sequence[int], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield the fewest boxes that together are elements `start` to `end` of a tensor in row-major order.

    Args:
        shape: of the tensor.
        start: the first element.
        end: one past the last element.

    Yields:
        (offset, shape) of each box, in order. A matrix has at most three: the rest of a row, whole rows, and the
        beginning of a row.
    """
    if end <= start:
        return
    if len(shape) <= 1:
        yield tuple([start] * len(shape)), tuple([end - start] * len(shape))
        return
    row, rest = math.prod(shape[1:]), tuple(shape[1:])

    def within(number: int, start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        for offset, size in boxes(rest, start, end):
            yield (number, *offset), (1, *size)

    if start % row:
        number, stop = start // row, min(end, (start // row + 1) * row)
        yield from within(number, start - number * row, stop - number * row)
        start = stop
    if rows := (end - start) // row:
        yield (start // row, *([0] * len(rest))), (rows, *rest)
        start += rows * row
    yield from within(start // row, 0, end - start)
