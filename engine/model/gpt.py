"""The model: megatron-core's GPTModel with attention over packed trees. The one file that touches GPTModel.

S tokens of the row, L scored positions, N sequences, H hidden size, D head size; tp tensor-parallel
processes. Rows travel as (S, 1, H): sequence first, one row per micro-batch.
"""

from __future__ import annotations

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
from silva.engine.model.heads import LogProbHead, RewardHead
from silva.engine.model.hf_layout import ModelShape, padded_vocabulary
from silva.kernels.document_attention import Documents, document_attention
from silva.kernels.layers import rms_norm, rotary, rotary_angles, swiglu
from silva.kernels.tree_attention import Blocks, attention_blocks, tree_attention

if TYPE_CHECKING:
    from silva.engine.recipe.schema import Parallel

Head = Literal["lm", "reward"]

MEGATRON = tuple(int(part) for part in megatron.core.__version__.split(".")[:2])
ROW_MULTIPLE = 16  # tokens: what rows are padded to a multiple of, on every process


@dataclass
class SilvaConfig(TransformerConfig):
    """megatron-core's configuration and what our modules need beside it; every module gets it."""

    head: Head = "lm"
    vocabulary: int = 0  # real tokens, without the padding to a multiple of tp
    rope_theta: float = 10000.0
    window: int | None = None
    attention: str = "tree"
    seed: int = 0


@dataclass
class TreeParams(PackedSeqParams):
    """What a stage must know of a row besides the hidden states, handed through as `packed_seq_params`.

    An argument and not an attribute of the modules: under a pipeline with recomputation, other micro-batches
    pass between a forward and its recomputation. The format stays "sbhd" so that no branch for
    megatron-core's own packing runs.
    """

    qkv_format: str = "sbhd"
    subtree_end: Tensor | None = None  # (S,) int32
    position: Tensor | None = None  # (S,) int32
    blocks: Blocks | None = None  # what each block of queries sees, the same for every layer
    documents: Documents | None = None  # of a row that FlashAttention takes; there are no blocks then
    angles: tuple[Tensor, Tensor] | None = None  # of the rotary positions, the same for every layer
    source: Tensor | None = None  # (L,) int32; None: the last stage gives logits
    target: Tensor | None = None  # (L,) int64
    last: Tensor | None = None  # (N,) int32
    # With context parallelism what this process computes of the row: `position` to `last` are then of its own tokens,
    # and `values` counts what the head gives for the whole row.
    share: RowShare | None = None
    values: int = 0


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) of Llama."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        # each process sees a part of the row only: megatron-core then sums the gradient over them
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class TreeAttention(nn.Module):
    """Rotary positions and attention of every token to its ancestors, between the projections of a layer."""

    def __init__(self, config: SilvaConfig, layer_number: int, **unused: Any) -> None:
        super().__init__()
        self.window = config.window
        size = config.kv_channels
        exponent = torch.arange(0, size, 2, dtype=torch.float32) / size
        # not a buffer: converting the module to bfloat16 would convert it too, and positions with it
        self.inverse_frequency = (1.0 / config.rope_theta**exponent).to(torch.cuda.current_device())

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
        """query (S, 1, H_q / tp, D), key and value (S, 1, H_kv / tp, D) -> (S, 1, H_q / tp * D).

        With context parallelism S is the number of this process's tokens.
        """
        position, subtree_end = packed_seq_params.position, packed_seq_params.subtree_end
        assert position is not None
        assert subtree_end is not None
        if packed_seq_params.angles is None:
            packed_seq_params.angles = rotary_angles(position, self.inverse_frequency)
        angles, share = packed_seq_params.angles, packed_seq_params.share
        query = rotary(query[:, 0], position, self.inverse_frequency, angles=angles)
        key = rotary(key[:, 0], position, self.inverse_frequency, angles=angles)
        # a view would keep the whole projection until the backward pass: with four query heads a key head six times
        # as much; of queries and keys nothing is kept but what the rotation made
        value = value[:, 0].contiguous()
        if share is not None:
            key, value = whole_row(key, value, share, groups.context_group())
        if packed_seq_params.documents is not None:
            out = document_attention(query, key, value, packed_seq_params.documents, window=self.window)
        else:
            out = tree_attention(query, key, value, subtree_end, blocks=packed_seq_params.blocks)
        return out.flatten(1)[:, None]


class SwiGLU(MegatronModule):
    """Gate and up projections, one behind the other, to the feed-forward's hidden columns."""

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x)


class TreeModel(GPTModel):
    """GPTModel with our heads."""

    config: SilvaConfig
    output_layer: nn.Module

    def setup_embeddings_and_output_layer(self) -> None:
        # the constructor's last step: its output layer gives way before attributes and ties are set on it
        if self.post_process:
            if self.config.head == "lm":
                self.output_layer = LogProbHead(self.output_layer, self.config.vocabulary)
            else:
                self.output_layer = RewardHead(self.config, self.pg_collection.tp, self.config.seed)
        super().setup_embeddings_and_output_layer()

    def _postprocess(self, *, hidden_states: Tensor, packed_seq_params: TreeParams, **unused: Any) -> Tensor:
        """hidden states to the next stage, or what the head makes of them."""
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
    """The slice of the model this process holds: one module per virtual stage, without data parallelism.

    Weights are *not initialised* (`hf.load` fills them), except norms with ones and a reward head from
    `seed`.

    Args:
        shape: of the checkpoint.
        parallel: the layout that `groups.initialize` built.
        dtype: float32, bfloat16 or float64, of parameters and activations.
        attention: `model.attention` of the recipe.

    Raises:
        UserError: the shape does not fit the layout, naming the key.
    """
    check_layout(shape, parallel)
    config = _configuration(shape, parallel, head=head, dtype=dtype, seed=seed, attention=attention)
    stages: list[int | None] = (
        [None] if parallel.virtual_pipeline is None else [*range(parallel.virtual_pipeline)]
    )
    return [_build_stage(config, shape, stage) for stage in stages]


def frees_outputs(parallel: Parallel) -> bool:
    """Whether a stage keeps nothing of what it has sent: before 0.18 interleaved ones free what is still being sent."""
    return parallel.virtual_pipeline is None or MEGATRON >= (0, 18)


def check_layout(shape: ModelShape, parallel: Parallel) -> None:
    """Raises UserError where the model cannot be split as `parallel` asks."""
    stage_layers(shape, parallel)
    splits = [
        ("parallel.tensor", parallel.tensor, "attention heads", shape.heads),
        ("parallel.tensor", parallel.tensor, "feed-forward columns", shape.ffn),
    ]
    # with fewer key-value heads than processes, each head is computed on several of them
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
    """Layers of each chunk of the model, in the order a token passes them.

    Raises:
        UserError: they are not those of the model, or it cannot be cut into equal stages and no others are given.
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
    """What the length of a row has to be a multiple of: every process then holds equally many, suitable tokens."""
    size = ROW_MULTIPLE * parallel.tensor * parallel.context
    # whole blocks of queries for each process: finer dealing would cost attention more tiles
    return math.lcm(size, LARGEST_BLOCK * parallel.context) if parallel.context > 1 else size


def _configuration(
    shape: ModelShape, parallel: Parallel, *, head: Head, dtype: torch.dtype, seed: int, attention: str
) -> SilvaConfig:
    options: dict[str, Any] = {}
    if parallel.virtual_pipeline is not None:
        # batched point-to-point works mix up the neighbours of a pipeline of two: wrong without an error
        options |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    if parallel.recompute == "full":
        options |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif parallel.recompute == "selective":
        # what holds much and is cheap to compute again
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
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        use_te_activation_func=True,  # megatron-core then builds the activation of the spec, ours
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence_parallel,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # demanded with variable lengths, of dense models too
        deallocate_pipeline_outputs=frees_outputs(parallel),
        # losses come divided by the global count: gradients are plain sums over micro-batches and processes
        calculate_per_token_loss=True,
        **options,
    )


def _layer_spec() -> ModuleSpec:
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear, core_attention=TreeAttention, linear_proj=RowParallelLinear
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
                    linear_fc1=ColumnParallelLinear, activation_func=SwiGLU, linear_fc2=RowParallelLinear
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
        TransformerBlockSubmodules(layer_specs=[_layer_spec()] * layers, layer_norm=RMSNorm),
        vocab_size=padded_vocabulary(shape.vocab, config.tensor_model_parallel_size),
        max_sequence_length=shape.max_position,
        position_embedding_type="none",  # positions are depths in a tree: TreeAttention applies them
        pre_process=parallel_state.is_pipeline_first_stage(**where),
        post_process=parallel_state.is_pipeline_last_stage(**where),
        # a reward head is no output matrix: with one, nothing is left to tie
        share_embeddings_and_output_weights=shape.tied and config.head == "lm",
        vp_stage=virtual_stage,
    )
    # Without megatron-core's own initialisation nobody marks split weights as split, and norms and clipping
    # would count those of the first process only.
    for name, module in model.named_modules():
        split = isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding)
        if split and module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(
                module.weight,
                is_parallel=True,
                dim=1 if isinstance(module, RowParallelLinear) else 0,
                stride=2 if name.endswith("linear_fc1") else 1,  # gate and up, each split over the processes
            )
    return model


def forward(
    chunk: nn.Module, batch: TreeBatch, share: RowShare | None = None, documents: Documents | None = None
) -> Tensor:
    """One stage's forward pass over one row; with a pipeline, called by megatron-core's schedule.

    Args:
        chunk: one of `build`'s modules, wrapped for data parallelism or not.
        batch: on this process's device; the same row on every tensor- and context-parallel process and stage.
        share: of the row, on the same device: with context parallelism what this process computes of it.
        documents: of the row, on the same device, if FlashAttention is to compute it.

    Returns:
        On the last stage log-probs (L,) (head "lm") or rewards (N,) (head "reward"), float32 at least, also with a
        share those of the whole row; on the others hidden states for the next stage.

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
    """Logits of a plain sequence, to compare with other implementations: `forward` without a head's targets.

    With context parallelism every process computes the whole sequence.

    Args:
        tokens: (S,) int64.

    Returns:
        On the last stage (S, V), equal on every tensor-parallel process; on the others hidden states.
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
    """Which head the model of this chunk has, on any stage; wrapped or not."""
    return unwrapped(chunk).config.head


def window_of(chunk: nn.Module) -> int | None:
    """Tokens that attention looks back at most; None: all."""
    return unwrapped(chunk).config.window


def attention_of(chunk: nn.Module) -> str:
    """`model.attention` of the recipe."""
    return unwrapped(chunk).config.attention


def _run(chunk: nn.Module, tokens: Tensor, row: TreeParams, position: Tensor) -> Tensor:
    """`position`: of the whole row, as `row.subtree_end` is."""
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
    """Query heads per key head on one process: with fewer key heads than processes, each process has one."""
    tp = config.tensor_model_parallel_size
    return config.num_attention_heads // tp // max(config.num_query_groups // tp, 1)


def unwrapped(chunk: nn.Module) -> Any:
    """Return the model under megatron-core's wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module  # type: ignore[assignment]
    return chunk
