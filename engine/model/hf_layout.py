"""Says where every slice of a megatron-core parameter lies in a Hugging Face checkpoint of Llama's layout.

Import and export both walk the slices given here, so each is the other's inverse by construction.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from silva.engine.model.families.shape import ModelShape

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
# the reward head of transformers' *ForSequenceClassification
SCORE = "score.weight"
# the reward head of EurusRewardModel
REGRESSION = "regression_head.weight"
LAYER = re.compile(r"decoder\.layers\.\d+\.(.+)")


class Slice(NamedTuple):
    """Says that `parameter.narrow(dim, at, stop - start)` is `tensor[start:stop]` along `dim`."""

    tensor: str
    dim: int
    start: int
    stop: int
    at: int


def padded_vocabulary(vocabulary: int, tensor_size: int) -> int:
    """Return the rows of the embedding: the next multiple of the tensor-parallel size."""
    return -(-vocabulary // tensor_size) * tensor_size


def global_layer(chunk: Any, parameter: str) -> int | None:
    """Return the number of a parameter's layer in the whole model, None outside the layers."""
    match = re.match(r"decoder\.layers\.(\d+)\.", parameter)
    return None if match is None else chunk.decoder.layers[int(match[1])].layer_number - 1


def tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of all tensors of a checkpoint except its heads'."""
    query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    found: dict[str, tuple[int, ...]] = {
        EMBEDDING: (shape.vocab, shape.hidden),
        "model.norm.weight": (shape.hidden,),
    }
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        found |= {
            prefix + "input_layernorm.weight": (shape.hidden,),
            prefix + "self_attn.q_proj.weight": (query, shape.hidden),
            prefix + "self_attn.k_proj.weight": (key_value, shape.hidden),
            prefix + "self_attn.v_proj.weight": (key_value, shape.hidden),
            prefix + "self_attn.o_proj.weight": (shape.hidden, query),
            prefix + "post_attention_layernorm.weight": (shape.hidden,),
            prefix + "mlp.gate_proj.weight": (shape.ffn, shape.hidden),
            prefix + "mlp.up_proj.weight": (shape.ffn, shape.hidden),
            prefix + "mlp.down_proj.weight": (shape.hidden, shape.ffn),
        }
        if shape.qkv_bias:
            for name, rows in (("q", query), ("k", key_value), ("v", key_value)):
                found[f"{prefix}self_attn.{name}_proj.bias"] = (rows,)
        if shape.output_bias:
            found[prefix + "self_attn.o_proj.bias"] = (shape.hidden,)
        if shape.mlp_bias:
            for name, rows in (("gate", shape.ffn), ("up", shape.ffn), ("down", shape.hidden)):
                found[f"{prefix}mlp.{name}_proj.bias"] = (rows,)
        if shape.head_norm:
            for name in ("q_norm", "k_norm"):
                found[f"{prefix}self_attn.{name}.weight"] = (shape.head_dim,)
    if not shape.fused:
        return found
    whole: dict[str, tuple[int, ...]] = {}
    for name, (rows, *columns) in found.items():
        target, offset = _place(name, shape)
        # the last part of a fused tensor ends it
        whole[target] = (offset + rows, *columns)
    return whole


def _place(tensor: str, shape: ModelShape) -> tuple[str, int]:
    """Return where a tensor of Llama's layout lies in a checkpoint: another one's name, and the row it begins at."""
    query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    parts = {
        "q_proj": ("qkv_proj", 0),
        "k_proj": ("qkv_proj", query),
        "v_proj": ("qkv_proj", query + key_value),
        "gate_proj": ("gate_up_proj", 0),
        "up_proj": ("gate_up_proj", shape.ffn),
    }
    before, _, kind = tensor.rpartition(".")
    place, _, part = before.rpartition(".")
    if not shape.fused or part not in parts:
        return tensor, 0
    whole, offset = parts[part]
    return f"{place}.{whole}.{kind}", offset


def slices(
    parameter: str, layer: int | None, shape: ModelShape, *, tensor_rank: int, tensor_size: int
) -> Iterator[Slice]:
    """Yield the slices that make up one tensor-parallel process's share of a parameter, except a reward head's.

    Args:
        parameter: megatron-core's name within a stage.
        layer: number of the layer in the whole model, None outside the layers.
        shape: of the model.
        tensor_rank: of the process.
        tensor_size: number of tensor-parallel processes.

    Yields:
        The slices of the checkpoint's tensors.

    Raises:
        KeyError: the parameter is unknown.
    """
    for own in _plain_slices(parameter, layer, shape, tensor_rank=tensor_rank, tensor_size=tensor_size):
        tensor, offset = _place(own.tensor, shape)
        yield own._replace(tensor=tensor, start=own.start + offset, stop=own.stop + offset)


def _plain_slices(
    parameter: str, layer: int | None, shape: ModelShape, *, tensor_rank: int, tensor_size: int
) -> Iterator[Slice]:
    """Yield the slices as if the checkpoint had Llama's layout."""

    def share(tensor: str, dim: int, size: int, at: int = 0) -> Slice:
        part = size // tensor_size
        return Slice(tensor, dim, tensor_rank * part, (tensor_rank + 1) * part, at)

    match = LAYER.fullmatch(parameter)
    name, prefix = (match[1], f"model.layers.{layer}.") if match else (parameter, "")
    kind = name.rpartition(".")[2]
    if name.startswith("self_attention.linear_qkv."):
        yield from _query_key_value(prefix, kind, shape, tensor_rank, tensor_size)
    elif name == "self_attention.linear_proj.weight":
        yield share(prefix + "self_attn.o_proj.weight", 1, shape.heads * shape.head_dim)
    elif name.startswith("mlp.linear_fc1."):
        yield share(f"{prefix}mlp.gate_proj.{kind}", 0, shape.ffn)
        yield share(f"{prefix}mlp.up_proj.{kind}", 0, shape.ffn, at=shape.ffn // tensor_size)
    elif name == "mlp.linear_fc2.weight":
        yield share(prefix + "mlp.down_proj.weight", 1, shape.ffn)
    elif name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        part = padded_vocabulary(shape.vocab, tensor_size) // tensor_size
        start, stop = (min((tensor_rank + n) * part, shape.vocab) for n in (0, 1))
        # the process may hold nothing but padding
        if stop > start:
            tensor = OUTPUT if name == "output_layer.weight" and not shape.tied else EMBEDDING
            yield Slice(tensor, 0, start, stop, 0)
    else:
        tensor, size = {
            "input_layernorm.weight": ("input_layernorm.weight", shape.hidden),
            "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight", shape.hidden),
            "decoder.final_layernorm.weight": ("model.norm.weight", shape.hidden),
            "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight", shape.head_dim),
            "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight", shape.head_dim),
            # the sum over the processes is what gets the bias
            "self_attention.linear_proj.bias": ("self_attn.o_proj.bias", shape.hidden),
            "mlp.linear_fc2.bias": ("mlp.down_proj.bias", shape.hidden),
        }[name]
        yield Slice(prefix + tensor, 0, 0, size, 0)


def _query_key_value(
    prefix: str, kind: str, shape: ModelShape, tensor_rank: int, tensor_size: int
) -> Iterator[Slice]:
    """Yield for each key-value head the slices of the query heads that read it, of its key and of its value.

    The rows are split over the processes. With fewer key-value heads than processes, a share begins or ends within
    such a group.
    """
    size, queries = shape.head_dim, shape.heads // shape.kv_heads * shape.head_dim
    rows = (shape.heads + 2 * shape.kv_heads) * size
    first, end = tensor_rank * rows // tensor_size, (tensor_rank + 1) * rows // tensor_size
    row = 0
    for group in range(shape.kv_heads):
        for projection, count in (("q_proj", queries), ("k_proj", size), ("v_proj", size)):
            start, stop = max(row, first), min(row + count, end)
            if stop > start:
                offset = group * count - row
                yield Slice(
                    f"{prefix}self_attn.{projection}.{kind}", 0, offset + start, offset + stop, start - first
                )
            row += count
