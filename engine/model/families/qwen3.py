"""Describes the dense Qwen3: Llamas whose queries and keys are normalised, head by head."""

from __future__ import annotations

from silva.engine.model.families import qwen2
from silva.engine.model.families.config import Config
from silva.engine.model.families.family import Family, Variant


def _variant(config: Config) -> Variant:
    biased = config.flag("attention_bias")
    return Variant(qkv_bias=biased, output_bias=biased, head_norm=True, window=qwen2.window(config))


FAMILY = Family("qwen3", "Qwen3", qwen2.DEFAULTS | {"head_dim": 128}, _variant)
