"""Describes Llama 1 to 3.3, CodeLlama, and the many models that are published as Llamas."""

from __future__ import annotations

from silva.engine.model.families.config import Config
from silva.engine.model.families.family import Family, Variant


def _variant(config: Config) -> Variant:
    biased = config.flag("attention_bias")
    return Variant(qkv_bias=biased, output_bias=biased, mlp_bias=config.flag("mlp_bias"))


FAMILY = Family(
    "llama",
    "Llama",
    {"num_key_value_heads": None, "max_position_embeddings": 2048},
    _variant,
)
