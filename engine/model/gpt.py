"""Builds the model: megatron-core's GPTModel with attention over packed trees.

This is the only file that touches GPTModel.

A row has S tokens, L scored positions and N sequences; H is the hidden size, D the head size, and tp the number of
tensor-parallel processes. Hidden states have the shape (S, 1, H): sequence first, one row per micro-batch.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from silva.engine.parallel import groups
from silva.engine.parallel.context import every_position, whole_row

import megatron.core
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from silva.engine.data.trees.packing import TreeBatch
from silva.engine.data.trees.row_share import LARGEST_BLOCK, RowShare
from silva.engine.errors import UserError
from silva.engine.model.families.shape import ModelShape
from silva.engine.model.heads import LogProbHead, RewardHead
from silva.engine.model.hf_layout import padded_vocabulary
from silva.kernels.document_attention import Documents, document_attention
from silva.kernels.layers import rms_norm, rotary, rotary_angles, swiglu
from silva.kernels.tree_attention import Blocks, attention_blocks, tree_attention

if TYPE_CHECKING:
    from silva.engine.recipe.schema import Parallel

Head = Literal["lm", "reward"]

MEGATRON = tuple(int(part) for part in megatron.core.__version__.split(".")[:2])
# every process's part of a row is padded to a multiple of so many tokens
ROW_MULTIPLE = 16


@dataclass
class SilvaConfig(TransformerConfig):
    """Holds megatron-core's configuration and what our modules need beside it; every module gets it.

    Attributes:
        head: which head the model has.
        vocabulary: number of real tokens, without the padding to a multiple of tp.
        rope_theta: the base of the rotary frequencies.
        rope_frequencies: inverse frequencies of scaled positions; None: those of `rope_theta`.
        rope_scale: what their cosine and sine are multiplied by.
        output_bias: whether attention's output has a bias.
        window: tokens that attention looks back at most, itself included; None for all.
        attention: `model.attention` of the recipe.
        seed: of a reward head's weight.
    """

    head: Head = "lm"
    vocabulary: int = 0
    rope_theta: float = 10000.0
    rope_frequencies: tuple[float, ...] | None = None
    rope_scale: float = 1.0
    output_bias: bool = False
    window: int | None = None
    attention: str = "tree"
    seed: int = 0


@dataclass
class TreeParams(PackedSeqParams):
    """Holds what a stage must know of a row besides the hidden states; passed to it as `packed_seq_params`.

    It is an argument of the modules and not an attribute, because in a pipeline with recomputation other micro-batches
    pass between a forward pass and its recomputation. The format stays "sbhd", so that no branch for megatron-core's
    own packing runs.

    With context parallelism, `position`, `source`, `target` and `last` are those of this process's share of the row;
    `subtree_end` is always that of the whole row.

    Attributes:
        qkv_format: megatron-core's name of the layout of queries, keys and values.
        subtree_end: (S,) int32, as in `TreeBatch`.
        position: (S,) int32, as in `TreeBatch`.
        blocks: what each block of queries sees, the same for every layer.
        documents: of a row that FlashAttention takes, which needs no `blocks`; else None.
        angles: of the rotary positions, the same for every layer; the first layer fills them in.
        source: (L,) int32, as in `TreeBatch`; None if the last stage is to give logits.
        target: (L,) int64, as in `TreeBatch`.
        last: (N,) int32, as in `TreeBatch`.
        share: what this process computes of the row with context parallelism; else None.
        values: with a share, how many numbers the head gives for the whole row.
    """

    qkv_format: str = "sbhd"
    subtree_end: Tensor | None = None
    position: Tensor | None = None
    blocks: Blocks | None = None
    documents: Documents | None = None
    angles: tuple[Tensor, Tensor] | None = None
    source: Tensor | None = None
    target: Tensor | None = None
    last: Tensor | None = None
    share: RowShare | None = None
    values: int = 0


class RMSNorm(nn.Module):
    """Computes the root-mean-square norm (arXiv 1910.07467) of Llama."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        # with sequence parallelism each process sees a part of the row only; the mark has megatron-core sum gradients
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised hidden states."""
        return rms_norm(x, self.weight, self.eps)


class HeadNorm(RMSNorm):
    """Holds the weight of a norm of queries or keys, head by head, which `TreeAttention` applies as it rotates them."""

    def forward(self, x: Tensor) -> Tensor:
        """Return queries or keys as they are."""
        return x

    def numbers(self) -> tuple[Tensor, float]:
        """Return weight (D,) and epsilon."""
        return self.weight, self.eps


class TreeAttention(nn.Module):
    """Computes rotary positions and the attention of every token to its ancestors, between a layer's projections."""

    def __init__(self, config: SilvaConfig, layer_number: int, **unused: Any) -> None:
        super().__init__()
        self.window = config.window
        self.scale = config.rope_scale
        # of queries and keys, set by the layer, which they belong to
        self.norms: tuple[HeadNorm | None, HeadNorm | None] = (None, None)
        size = config.kv_channels
        if config.rope_frequencies is None:
            frequency = 1.0 / config.rope_theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
        else:
            frequency = torch.tensor(config.rope_frequencies, dtype=torch.float32)
        # no buffer, because converting the module to bfloat16 would convert it too and round the positions' angles
        self.inverse_frequency = frequency.to(torch.cuda.current_device())

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *unused: Any,
        packed_seq_params: TreeParams,
        **unused_too: Any,
    ) -> Tensor:
        """Compute the attention of this process's heads, and with context parallelism of its tokens.

        H_q is the number of query heads and H_kv that of key-value heads. With context parallelism, S is the number of
        this process's tokens.

        Args:
            query: (S, 1, H_q / tp, D), before the rotation.
            key: (S, 1, H_kv / tp, D), before the rotation.
            value: (S, 1, H_kv / tp, D).
            attention_mask: not used; megatron-core passes it.
            *unused: not used; megatron-core passes them.
            packed_seq_params: of the row.
            **unused_too: not used; megatron-core passes them.

        Returns:
            (S, 1, H_q / tp * D).
        """
        position, subtree_end = packed_seq_params.position, packed_seq_params.subtree_end
        assert position is not None
        assert subtree_end is not None
        if packed_seq_params.angles is None:
            packed_seq_params.angles = rotary_angles(position, self.inverse_frequency, self.scale)
        angles, share = packed_seq_params.angles, packed_seq_params.share
        query, key = (
            rotary(
                x[:, 0],
                position,
                self.inverse_frequency,
                self.scale,
                angles=angles,
                norm=None if norm is None else norm.numbers(),
            )
            for x, norm in zip((query, key), self.norms, strict=True)
        )
        # A view would keep the whole projection until the backward pass, which is six times as much with four query
        # heads per key head. Of queries and keys, only the rotated copies are kept. Norms need the projection anyway.
        value = value[:, 0] if self.norms[0] is not None else value[:, 0].contiguous()
        if share is not None:
            key, value = whole_row(key, value, share, groups.context_group())
        if packed_seq_params.documents is not None:
            out = document_attention(query, key, value, packed_seq_params.documents, window=self.window)
        else:
            out = tree_attention(query, key, value, subtree_end, blocks=packed_seq_params.blocks)
        return out.flatten(1)[:, None]


class TreeSelfAttention(SelfAttention):
    """Extends megatron-core's attention: its output has a bias or none, whatever the feed-forward part has.

    Norms of queries and keys, whose parameters are this layer's, are applied where they are rotated.
    """

    def __init__(self, config: SilvaConfig, *args: Any, **kwargs: Any) -> None:
        # megatron-core has one switch for both
        if config.output_bias != config.add_bias_linear:
            config = copy.copy(config)
            config.add_bias_linear = config.output_bias
        super().__init__(config, *args, **kwargs)
        if self.q_layernorm is not None:
            self.core_attention.norms = (self.q_layernorm, self.k_layernorm)


class BiasedRowParallelLinear(RowParallelLinear):
    """Extends megatron-core's layer, whose bias others are to add, by adding it here.

    Recomputation would make that bias, which a module returns as it is, an output of itself, and the backward pass
    would never end.
    """

    def forward(self, input_: Tensor) -> tuple[Tensor, None]:
        """Return the sum over the processes, with the bias, and no bias to add."""
        out, bias = super().forward(input_)
        return (out if bias is None else out + bias), None


class SwiGLU(MegatronModule):
    """Computes the feed-forward's hidden columns from the gate and up projections, which lie one behind the other."""

    def forward(self, x: Tensor) -> Tensor:
        """Return silu(gate) * up."""
        return swiglu(x)


class TreeModel(GPTModel):
    """Extends GPTModel by our heads."""

    config: SilvaConfig
    output_layer: nn.Module

    def setup_embeddings_and_output_layer(self) -> None:
        """Put our head in the place of the output layer, then mark and tie weights as GPTModel does."""
        # this is the constructor's last step: the output layer is replaced before attributes and ties are set on it
        if self.post_process:
            if self.config.head == "lm":
                self.output_layer = LogProbHead(self.output_layer, self.config.vocabulary)
            else:
                self.output_layer = RewardHead(self.config, self.pg_collection.tp, self.config.seed)
        super().setup_embeddings_and_output_layer()

    def _postprocess(self, *, hidden_states: Tensor, packed_seq_params: TreeParams, **unused: Any) -> Tensor:
        """Return the hidden states for the next stage, or what the head makes of them."""
        if not self.post_process:
            return hidden_states
        row, share = packed_seq_params, packed_seq_params.share
        if self.config.head == "reward":
            found = self.output_layer(hidden_states, row.last)
        else:
            tied = self.share_embeddings_and_output_weights
            weight = self.shared_embedding_or_output_weight() if tied else None
            found = self.output_layer(hidden_states, weight, source=row.source, target=row.target)
        if share is None:
            return found
        where = share.ended if self.config.head == "reward" else share.scored
        return every_position(found, where, row.values, groups.context_group())


def build(
    shape: ModelShape,
    parallel: Parallel,
    *,
    head: Head,
    dtype: torch.dtype,
    seed: int = 0,
    attention: str = "tree",
) -> list[nn.Module]:
    """Build the slice of the model that this process holds, without data parallelism.

    Weights are *not initialised* (`hf.load` fills them), except norms with ones and a reward head from `seed`.

    Args:
        shape: of the checkpoint.
        parallel: the layout that `groups.initialize` built.
        head: which head the model gets.
        dtype: float32, bfloat16 or float64, of parameters and activations.
        seed: of a reward head's weight.
        attention: `model.attention` of the recipe.

    Returns:
        One module per virtual stage.

    Raises:
        UserError: the shape does not fit the layout; the message names the key.
    """
    check_layout(shape, parallel)
    config = _configuration(shape, parallel, head=head, dtype=dtype, seed=seed, attention=attention)
    stages: list[int | None] = (
        [None] if parallel.virtual_pipeline is None else [*range(parallel.virtual_pipeline)]
    )
    return [_build_stage(config, shape, stage) for stage in stages]


def frees_outputs(parallel: Parallel) -> bool:
    """Tell whether stages free what they have sent.

    Interleaved ones do not before megatron-core 0.18, where they would free tensors that are still being sent.
    """
    return parallel.virtual_pipeline is None or MEGATRON >= (0, 18)


def check_layout(shape: ModelShape, parallel: Parallel) -> None:
    """Check that the model can be split as `parallel` asks.

    Raises:
        UserError: it cannot; the message names the key.
    """
    stage_layers(shape, parallel)
    splits = [
        ("parallel.tensor", parallel.tensor, "attention heads", shape.heads),
        ("parallel.tensor", parallel.tensor, "feed-forward columns", shape.ffn),
    ]
    # with fewer key-value heads than processes, each head is computed on several processes
    if shape.kv_heads >= parallel.tensor:
        splits.append(("parallel.tensor", parallel.tensor, "key-value heads", shape.kv_heads))
    for key, parts, what, count in splits:
        if count % parts:
            raise UserError(
                f"{key} is {parts}, but the model's {count} {what} cannot be split into {parts} equal parts"
            )
    if shape.kv_heads < parallel.tensor and parallel.tensor % shape.kv_heads:
        raise UserError(
            f"parallel.tensor is {parallel.tensor}, which must be a multiple of the model's {shape.kv_heads} "
            "key-value heads"
        )


def stage_layers(shape: ModelShape, parallel: Parallel) -> list[int]:
    """Return the number of layers of each chunk of the model, in the order in which a token passes the chunks.

    Raises:
        UserError: the given numbers do not add up to the model's layers, or none are given and the layers cannot be
            split into equal stages.
    """
    parallel.check()
    stages, given = parallel.chunks, parallel.stage_layers
    if given is None:
        if shape.layers % stages:
            raise UserError(
                f"parallel.pipeline x parallel.virtual_pipeline is {stages}, but the model's {shape.layers} layers "
                f"cannot be split into {stages} equal parts; say how many each stage gets in parallel.stage_layers"
            )
        return [shape.layers // stages] * stages
    if sum(given) != shape.layers:
        raise UserError(
            f"parallel.stage_layers is {given}, together {sum(given)} layers, but the model has {shape.layers}"
        )
    return given


def row_multiple(parallel: Parallel) -> int:
    """Return what a row's number of tokens has to be a multiple of.

    Every process then holds the same number of tokens, and that number is a multiple of `ROW_MULTIPLE`.
    """
    size = ROW_MULTIPLE * parallel.tensor * parallel.context
    # each process gets whole blocks of queries: smaller pieces would cost attention more tiles
    return math.lcm(size, LARGEST_BLOCK * parallel.context) if parallel.context > 1 else size


def _configuration(
    shape: ModelShape, parallel: Parallel, *, head: Head, dtype: torch.dtype, seed: int, attention: str
) -> SilvaConfig:
    options: dict[str, Any] = {}
    if parallel.virtual_pipeline is not None:
        # with a pipeline of two, batched point-to-point works confuse the neighbours: wrong numbers, without an error
        options |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    if parallel.recompute == "full":
        options |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif parallel.recompute == "selective":
        # these modules hold much memory and are cheap to compute again
        options |= {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
    if parallel.stage_layers is not None:
        chunks = [["decoder"] * count for count in stage_layers(shape, parallel)]
        options["pipeline_model_parallel_layout"] = [
            ["embedding", *chunks[0]],
            *chunks[1:-1],
            [*chunks[-1], "loss"],
        ]
    return SilvaConfig(
        head=head,
        vocabulary=shape.vocab,
        rope_theta=shape.rope_theta,
        rope_frequencies=shape.rope_frequencies,
        rope_scale=shape.rope_scale,
        output_bias=shape.output_bias,
        window=shape.window,
        attention=attention,
        seed=seed,
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn,
        layernorm_epsilon=shape.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=shape.mlp_bias,
        add_qkv_bias=shape.qkv_bias,
        # has megatron-core sum the gradients of these norms over the processes that split the heads
        qk_layernorm=shape.head_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,
        # no graphs; the default, "full", is a name that megatron-core itself calls deprecated
        cuda_graph_scope=[],
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        # has megatron-core build the activation that the spec names, which is ours
        use_te_activation_func=True,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence_parallel,
        variable_seq_lengths=True,
        # megatron-core demands this value with variable lengths, of dense models too
        moe_token_dispatcher_type="alltoall",
        deallocate_pipeline_outputs=frees_outputs(parallel),
        # losses are already divided by the global count, so gradients are plain sums over micro-batches and processes
        calculate_per_token_loss=True,
        **options,
    )


def _layer_spec(shape: ModelShape) -> ModuleSpec:
    norm = HeadNorm if shape.head_norm else None
    attention = ModuleSpec(
        module=TreeSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=TreeAttention,
            linear_proj=BiasedRowParallelLinear,
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=ColumnParallelLinear,
                    activation_func=SwiGLU,
                    linear_fc2=BiasedRowParallelLinear,
                ),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _build_stage(config: SilvaConfig, shape: ModelShape, virtual_stage: int | None) -> TreeModel:
    where: dict[str, Any] = {"ignore_virtual": virtual_stage is None, "vp_stage": virtual_stage}
    layers = get_num_layers_to_build(config, virtual_stage)
    model = TreeModel(
        config,
        TransformerBlockSubmodules(layer_specs=[_layer_spec(shape)] * layers, layer_norm=RMSNorm),
        vocab_size=padded_vocabulary(shape.vocab, config.tensor_model_parallel_size),
        max_sequence_length=shape.max_position,
        # positions are depths in a tree, and TreeAttention applies them
        position_embedding_type="none",
        pre_process=parallel_state.is_pipeline_first_stage(**where),
        post_process=parallel_state.is_pipeline_last_stage(**where),
        # a reward head is no output matrix, so a model with one has nothing to tie to the embedding
        share_embeddings_and_output_weights=shape.tied and config.head == "lm",
        vp_stage=virtual_stage,
    )
    # Only megatron-core's own initialisation, which is switched off, marks split weights as split. Without the mark,
    # gradient norms and clipping would count the first process's part only.
    for name, module in model.named_modules():
        split = isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding)
        if split and module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(
                module.weight,
                is_parallel=True,
                dim=1 if isinstance(module, RowParallelLinear) else 0,
                # linear_fc1 holds gate and up, and each of the two is split over the processes
                stride=2 if name.endswith("linear_fc1") else 1,
            )
    return model


def forward(
    chunk: nn.Module, batch: TreeBatch, share: RowShare | None = None, documents: Documents | None = None
) -> Tensor:
    """Run one stage's forward pass over one row; megatron-core's schedule calls it.

    Args:
        chunk: one of `build`'s modules, wrapped for data parallelism or not.
        batch: on this process's device; the same row on every tensor- and context-parallel process and stage.
        share: what this process computes of the row with context parallelism, on the same device.
        documents: of the row, on the same device, if FlashAttention is to compute it.

    Returns:
        On the last stage, log-probs (L,) (head "lm") or rewards (N,) (head "reward") of at least float32, those of the
        whole row also with a share. On the other stages, hidden states for the next stage.

    Raises:
        ValueError: sequence parallelism cannot split the row.
    """
    row = TreeParams(
        subtree_end=batch.subtree_end,
        position=batch.position,
        source=batch.source,
        target=batch.target,
        last=batch.last,
        documents=documents,
    )
    tokens = batch.tokens
    if share is not None:
        index = share.index.long()
        tokens, row.position, row.share = tokens[index], batch.position[index], share
        row.source, row.target, row.last = share.source, batch.target[share.scored], share.last
        row.values = len(batch.last) if head_of(chunk) == "reward" else len(batch.target)
    return _run(chunk, tokens, row, batch.position)


def logits(chunk: nn.Module, tokens: Tensor) -> Tensor:
    """Compute the logits of a plain sequence, to compare them with other implementations.

    With context parallelism, every process computes the whole sequence. V is the number of real tokens of the
    vocabulary.

    Args:
        chunk: one of `build`'s modules, wrapped for data parallelism or not.
        tokens: (S,) int64.

    Returns:
        On the last stage, (S, V) logits, equal on every tensor-parallel process; on the other stages, hidden states.
    """
    size = tokens.shape[0]
    position = torch.arange(size, dtype=torch.int32, device=tokens.device)
    row = TreeParams(subtree_end=torch.full_like(position, size), position=position)
    out = _run(chunk, tokens, row, position)
    model = unwrapped(chunk)
    if not model.post_process:
        return out
    return gather_from_tensor_model_parallel_region(out)[:, 0, : model.config.vocabulary]


def head_of(chunk: nn.Module) -> Head:
    """Return which head the model of this chunk has; the chunk may be of any stage, wrapped or not."""
    return unwrapped(chunk).config.head


def window_of(chunk: nn.Module) -> int | None:
    """Return how many tokens attention looks back at most, None for all."""
    return unwrapped(chunk).config.window


def attention_of(chunk: nn.Module) -> str:
    """Return `model.attention` of the recipe."""
    return unwrapped(chunk).config.attention


def _run(chunk: nn.Module, tokens: Tensor, row: TreeParams, position: Tensor) -> Tensor:
    """Run a chunk; `position` is that of the whole row, as `row.subtree_end` is."""
    config = unwrapped(chunk).config
    if config.sequence_parallel and tokens.shape[0] % config.tensor_model_parallel_size:
        raise ValueError(
            f"a row of {tokens.shape[0]} tokens cannot be split over {config.tensor_model_parallel_size} "
            "sequence-parallel processes: pack rows to a multiple of it"
        )
    assert row.subtree_end is not None
    if row.documents is None:
        row.blocks = attention_blocks(
            row.subtree_end,
            group=_local_group(config),
            size=config.kv_channels,
            dtype=config.params_dtype,
            position=position,
            window=config.window,
            query_index=None if row.share is None else row.share.index,
        )
    return chunk(input_ids=tokens[None], position_ids=None, attention_mask=None, packed_seq_params=row)


def _local_group(config: SilvaConfig) -> int:
    """Return the query heads per key head on one process, which has one key head if they are fewer than processes."""
    tp = config.tensor_model_parallel_size
    return config.num_attention_heads // tp // max(config.num_query_groups // tp, 1)


def unwrapped(chunk: nn.Module) -> Any:
    """Return the model inside megatron-core's wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk
