"""Makes random Hugging Face checkpoints, packed rows over them, and forward passes of the model on any layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from silva.engine.parallel import groups

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from silva.engine.data.trees import packing
from silva.engine.data.trees.group import ABSENT, TokenGroup, TokenSequence
from silva.engine.data.trees.row_share import share_of
from silva.engine.data.trees.tree import Tree, merge
from silva.engine.model import gpt, hf
from silva.engine.recipe.schema import Parallel

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
VOCABULARY = 251  # odd: every tensor-parallel layout pads it
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-wide-heads": {"head_dim": 24, "num_key_value_heads": 8},
    "mistral": {"sliding_window": 5},
    "mistral-no-window": {"sliding_window": None, "num_key_value_heads": 1},
    # Mistral-Nemo-2407: heads that are not hidden / heads wide
    "mistral-nemo": {"sliding_window": None, "head_dim": 12},
    # Llama-3.1-8B and Llama-3.2-1B (tied), with lengths scaled to those of the tests
    "llama3": {"rope_parameters": LLAMA3, "max_position_embeddings": 512},
    "llama3-tied": {"rope_parameters": LLAMA3, "max_position_embeddings": 512, "tie_word_embeddings": True},
    # deepseek-coder's positions, and Qwen2.5's for long texts
    "llama-linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}},
    "llama-yarn": {"rope_parameters": YARN},
    "llama-dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    "llama-biased": {"attention_bias": True, "mlp_bias": True},
    "llama-attention-biased": {"attention_bias": True},
    # Qwen2.5-7B, -0.5B (tied); a window for all layers
    "qwen2": {},
    "qwen2-tied": {"tie_word_embeddings": True, "num_key_value_heads": 2},
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    "qwen2-yarn": {"rope_parameters": YARN},
    # Qwen3-8B, -0.6B (tied)
    "qwen3": {"head_dim": 16},
    "qwen3-tied": {"head_dim": 12, "tie_word_embeddings": True},
    "qwen3-biased": {"head_dim": 16, "attention_bias": True},
    # Phi-3-mini-4k-instruct, Phi-4
    "phi3": {"sliding_window": 5, "pad_token_id": 0},
    "phi3-no-window": {"sliding_window": None, "num_key_value_heads": 2, "pad_token_id": 0},
}
NAMES = {
    "llama": "Llama",
    "llama3": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "phi3": "Phi3",
}


def model(kind: str, *, head: str = "CausalLM", **changes: Any) -> Any:
    """Make a random transformers model of one of `KINDS`, deterministic, with weights large enough to matter."""
    import transformers

    name = NAMES[kind.partition("-")[0]]
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    if head != "CausalLM":
        settings |= {"num_labels": 1, "pad_token_id": 0}
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**settings | KINDS[kind] | changes)
    made = getattr(transformers, f"{name}For{head}")(config).eval()
    with (
        torch.no_grad()
    ):  # norms start as ones and biases as zeros, which would hide a missing or swapped one
        for parameter_name, parameter in made.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
            elif parameter_name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    return made


def checkpoint(folder: Path, kind: str, *, head: str = "CausalLM", **changes: Any) -> Path:
    """Save the model of `model` in several files."""
    model(kind, head=head, **changes).save_pretrained(folder, max_shard_size="100KB")
    return folder


def sequences(count: int, seed: int) -> list[TokenSequence]:
    """Random sequences of one group: each continues a prefix of an earlier one."""
    random = np.random.default_rng(seed)
    found: list[TokenSequence] = []
    for _ in range(count):
        new = random.integers(0, VOCABULARY, random.integers(2, 9))
        old = found[random.integers(len(found))].tokens if found else new[:0]
        tokens = np.concatenate([old[: random.integers(0, len(old) + 1)], new]).astype(np.int32)
        scored = random.random(len(tokens)) < 0.6
        scored[0] = False
        found.append(TokenSequence(tokens, scored))
    return found


def merge_in_order(sequences: Sequence[TokenSequence]) -> Tree:
    """Merge sequences into a tree, and keep the order they are given in."""
    # a comparison with nothing tells where a group has put each sequence
    group = TokenGroup.of(sequences, [(k, ABSENT) for k in range(len(sequences))])
    made, place = merge(group), group.comparisons[:, 0]
    spans = [made.span_index[made.span_pointer[k] : made.span_pointer[k + 1]] for k in place]
    return replace(
        made,
        span_pointer=np.cumsum([0, *map(len, spans)]).astype(np.int32),
        span_index=np.concatenate([made.span_index[:0], *spans]),
        last=made.last[place],
        scored=made.scored[place],
    )


def row(members: Sequence[Sequence[TokenSequence]], *, multiple: int = 4) -> packing.TreeBatch:
    """One packed row with one tree for each group of sequences."""
    none = np.zeros((0, 2), np.int32), np.zeros(0, bool)
    pieces = [packing.Piece(merge_in_order(m), np.arange(len(m)), *none) for m in members]
    return packing.pack_row(pieces, multiple=multiple, pad_id=0)


def build(
    folder: Path,
    parallel: Parallel,
    *,
    head: gpt.Head = "lm",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[list[nn.Module], hf.ModelShape]:
    """Build groups, model and weights, in a process of a world."""
    groups.initialize(parallel, seed=seed)
    shape = hf.read_shape(folder)
    chunks = gpt.build(shape, parallel, head=head, dtype=dtype, seed=seed)
    hf.load(chunks, folder, shape)
    return chunks, shape


def forward(chunk: nn.Module, row: packing.TreeBatch) -> Tensor:
    """`gpt.forward`, with context parallelism over this process's share of the row."""
    rank, ranks = groups.context_rank(), groups.context_size()
    share = share_of(row, rank, ranks, window=gpt.window_of(chunk)) if ranks > 1 else None
    return gpt.forward(chunk, row, share)


@torch.no_grad()
def outputs(
    chunks: Sequence[nn.Module],
    inputs: Sequence[Any],
    run: Callable[[nn.Module, Any], Tensor] = forward,
) -> list[np.ndarray]:
    """`run(chunk, input)` through megatron-core's schedule; empty before the last stage."""

    def step(iterator: Any, chunk: nn.Module) -> tuple[Tensor, Any]:
        return run(chunk, next(iterator)), lambda output, non_loss_data=True: output

    iterators = [iter(inputs) for _ in chunks]
    found = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(inputs),
        seq_length=1,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return [output.numpy() for output in found]
