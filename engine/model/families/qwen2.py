"""Describes Qwen2 and Qwen2.5, also Math and Coder: Llamas whose queries, keys and values have a bias."""

from __future__ import annotations

from silva.engine.errors import UserError, shown
from silva.engine.model.families.config import Config
from silva.engine.model.families.family import Family, Variant

DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def window(config: Config) -> int | None:
    """Return the window of all layers; None if they have none.

    Raises:
        UserError: some layers have one and others do not.
    """
    types = config.get("layer_types")
    if isinstance(types, list) and types:
        if any(each != types[0] for each in types) or types[0] not in ("full_attention", "sliding_attention"):
            raise UserError(
                f"{config.file}: layer_types names {shown(sorted(map(str, set(map(str, types)))))}: only one kind of "
                "attention for all layers is supported"
            )
        return config.count("sliding_window") if types[0] == "sliding_attention" else None
    if not config.flag("use_sliding_window") or config.get("sliding_window") is None:
        return None
    layers = config.count("num_hidden_layers")
    # layers before this one see everything
    first = config.get("max_window_layers")
    if isinstance(first, bool) or not isinstance(first, int) or 0 < first < layers:
        raise UserError(
            f"{config.file}: use_sliding_window with max_window_layers {first!r} of {layers} layers: only one window "
            "for all layers is supported"
        )
    return config.count("sliding_window") if first <= 0 else None


def _variant(config: Config) -> Variant:
    return Variant(qkv_bias=True, window=window(config))


FAMILY = Family("qwen2", "Qwen2", DEFAULTS, _variant)
