"""Defines the shape of a model: what the engine has to know of it apart from its weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Describes a model of Llama's kind apart from its weights.

    Attributes:
        layers: number of layers.
        hidden: hidden size.
        heads: query heads.
        kv_heads: key-value heads.
        head_dim: size of a head.
        ffn: hidden columns of the feed-forward part.
        vocab: tokens of the vocabulary.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of the norms.
        tied: whether the output matrix is the embedding.
        window: how many positions back a token sees, itself included; None for all.
        architecture: the family, by its name in config.json (`model_type`).
        max_position: the longest sequence by the checkpoint's config.json.
        rope_frequencies: (D / 2) inverse frequencies of scaled positions; None: those of `rope_theta`.
        rope_scale: what cosine and sine of the positions are multiplied by.
        bounded: whether positions beyond `max_position` would be computed otherwise.
        qkv_bias: whether queries, keys and values have a bias.
        output_bias: whether attention's output has a bias.
        mlp_bias: whether the feed-forward part has biases.
        head_norm: whether queries and keys are normalised, head by head, before they are rotated.
        fused: whether the checkpoint has queries, keys and values in one tensor, and gate and up in another one.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    rope_theta: float
    norm_eps: float
    tied: bool
    window: int | None
    architecture: str
    max_position: int
    rope_frequencies: tuple[float, ...] | None = None
    rope_scale: float = 1.0
    bounded: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norm: bool = False
    fused: bool = False
