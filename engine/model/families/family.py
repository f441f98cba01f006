"""Defines what a family of models is: what its config.json says, and which of the engine's variants it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from silva.engine.errors import UserError
from silva.engine.model.families import rope
from silva.engine.model.families.config import Config
from silva.engine.model.families.shape import ModelShape


class Variant(NamedTuple):
    """Says in what a model differs from Llama; see `ModelShape`.

    Attributes:
        qkv_bias: of queries, keys and values.
        output_bias: of attention's output.
        mlp_bias: of the feed-forward part.
        head_norm: whether queries and keys are normalised.
        window: how many positions back a token sees.
        fused: whether the checkpoint has projections in one tensor.
    """

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norm: bool = False
    window: int | None = None
    fused: bool = False


@dataclass(frozen=True)
class Family:
    """Describes a family of models.

    Attributes:
        model_type: its name in config.json.
        name: what transformers' classes of it begin with.
        defaults: of keys that transformers leaves out of config.json because they equal its own default.
        variant: reads what differs from Llama.
    """

    model_type: str
    name: str
    defaults: Mapping[str, Any]
    variant: Callable[[Config], Variant]

    @property
    def architectures(self) -> tuple[str, ...]:
        """Return the names of classes that config.json may have: transformers', and the paper's for reward models."""
        return (f"{self.name}ForCausalLM", f"{self.name}ForSequenceClassification", "EurusRewardModel")

    def shape(self, config: Config) -> ModelShape:
        """Read the shape of a checkpoint.

        Raises:
            UserError: the engine does not build such a model; the message names the key.
        """
        config.only(
            hidden_act=("silu",),
            attention_dropout=(0, 0.0),
            partial_rotary_factor=(1, 1.0),
            quantization_config=(None,),
        )
        heads, hidden = config.count("num_attention_heads"), config.count("hidden_size")
        kv_heads = heads if config.get("num_key_value_heads") is None else config.count("num_key_value_heads")
        head_dim = hidden // heads if config.get("head_dim") is None else config.count("head_dim")
        if heads % kv_heads or head_dim % 2 or not head_dim:
            raise UserError(
                f"{config.file}: {heads} attention heads of size {head_dim} over {kv_heads} key-value heads; the heads "
                "must be a multiple of the key-value heads and their size even"
            )
        positions = rope.read(config)
        return ModelShape(
            layers=config.count("num_hidden_layers"),
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            ffn=config.count("intermediate_size"),
            vocab=config.count("vocab_size"),
            rope_theta=positions.theta,
            norm_eps=config.positive("rms_norm_eps", 1e-6),
            tied=config.flag("tie_word_embeddings"),
            architecture=self.model_type,
            max_position=config.count("max_position_embeddings"),
            rope_frequencies=positions.frequencies,
            rope_scale=positions.scale,
            bounded=positions.bounded,
            **self.variant(config)._asdict(),
        )
