"""Describes Phi-3-mini and -medium and Phi-4: Llamas whose checkpoints have fused projections.

Phi-3.5 and Phi-4-mini, which rotate a part of each head or scale positions by the length of a text, are refused.
"""

from __future__ import annotations

from silva.engine.model.families.config import Config
from silva.engine.model.families.family import Family, Variant


def _variant(config: Config) -> Variant:
    config.only(resid_pdrop=(0, 0.0), embd_pdrop=(0, 0.0), attention_bias=(False,))
    windowed = config.get("sliding_window") is not None
    return Variant(window=config.count("sliding_window") if windowed else None, fused=True)


FAMILY = Family(
    "phi3",
    "Phi3",
    {"num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    _variant,
)
