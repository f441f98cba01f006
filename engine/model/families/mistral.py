"""Describes Mistral, Mistral-Nemo and Mistral-Small."""

from __future__ import annotations

from silva.engine.model.families.config import Config
from silva.engine.model.families.family import Family, Variant


def _variant(config: Config) -> Variant:
    windowed = config.get("sliding_window") is not None
    return Variant(window=config.count("sliding_window") if windowed else None)


FAMILY = Family(
    "mistral",
    "Mistral",
    {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    _variant,
)
