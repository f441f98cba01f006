"""Lists the shapes of well-known models, so that a run can be planned before its checkpoint is downloaded.

Training reads the checkpoint's own config.json, never this table.
"""

from __future__ import annotations

from pathlib import Path

from silva.engine.errors import UserError
from silva.engine.model import hf
from silva.engine.model.hf_layout import ModelShape


def _llama(
    layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int, rope_theta: float = 10000.0,
    *, architecture: str = "llama", max_position: int = 4096, window: int | None = None, tied: bool = False,
) -> ModelShape:  # fmt: skip
    return ModelShape(
        layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=hidden // heads, ffn=ffn,
        vocab=vocab, rope_theta=rope_theta, norm_eps=1e-5, tied=tied, window=window,
        architecture=architecture, max_position=max_position,
    )  # fmt: skip


NAMED = {
    "mistral-7b": _llama(
        32, 4096, 32, 8, 14336, 32000, architecture="mistral", max_position=32768, window=4096
    ),
    "codellama-7b": _llama(32, 4096, 32, 32, 11008, 32016, 1e6, max_position=16384),
    "codellama-34b": _llama(48, 8192, 64, 8, 22016, 32000, 1e6, max_position=16384),
    "codellama-70b": _llama(80, 8192, 64, 8, 28672, 32016),
    "llama-2-7b": _llama(32, 4096, 32, 32, 11008, 32000),
    "llama-2-13b": _llama(40, 5120, 40, 40, 13824, 32000),
    "llama-2-70b": _llama(80, 8192, 64, 8, 28672, 32000),
    "llama-3-8b": _llama(32, 4096, 32, 8, 14336, 128256, 5e5, max_position=8192),
    "llama-3-70b": _llama(80, 8192, 64, 8, 28672, 128256, 5e5, max_position=8192),
}

# checkpoints that the packaged recipes name, and their bases
HUB = {
    "mistralai/Mistral-7B-v0.1": "mistral-7b",
    "openbmb/Eurus-7b-sft": "mistral-7b",
    "codellama/CodeLlama-70b-hf": "codellama-70b",
    "openbmb/Eurus-70b-sft": "codellama-70b",
}


def resolve(asked: str | None, model: str) -> tuple[ModelShape, str]:
    """Find the shape to plan with; nothing is downloaded.

    Args:
        asked: a name of `NAMED`, a folder with a config.json, or that file; None takes `model`.
        model: the recipe's `model.path`.

    Returns:
        The shape, and where it comes from: a name of `NAMED` or the path of a config.json.

    Raises:
        UserError: neither argument leads to a shape.
    """
    name = asked or HUB.get(model, model)
    if name in NAMED:
        return NAMED[name], name
    folder = Path(name).parent if Path(name).name == "config.json" else Path(name)
    if (folder / "config.json").is_file():
        return hf.read_shape(folder), str(folder / "config.json")
    key = "--shape" if asked else "model.path"
    raise UserError(
        f"{key}: {name} is no folder with a config.json here, and a plan downloads nothing; "
        f"give --shape with such a folder, or one of: {', '.join(NAMED)}"
    )
