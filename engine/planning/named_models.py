"""Lists the shapes of well-known models, so that a run can be planned before its checkpoint is downloaded.

Training reads the checkpoint's own config.json, never this table.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from silva.engine.errors import UserError
from silva.engine.model import hf
from silva.engine.model.families.shape import ModelShape


def _llama(
    layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int, rope_theta: float = 10000.0,
    *, architecture: str = "llama", max_position: int = 4096, window: int | None = None, tied: bool = False,
    head_dim: int | None = None,
) -> ModelShape:  # fmt: skip
    return ModelShape(
        layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim or hidden // heads, ffn=ffn,
        vocab=vocab, rope_theta=rope_theta, norm_eps=1e-5, tied=tied, window=window,
        architecture=architecture, max_position=max_position,
    )  # fmt: skip


def _qwen2(
    layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int, *, tied: bool = False
) -> ModelShape:
    made = _llama(
        layers, hidden, heads, kv_heads, ffn, vocab, 1e6, architecture="qwen2", max_position=32768, tied=tied
    )
    return replace(made, norm_eps=1e-6, qkv_bias=True)


def _qwen3(
    layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, *, tied: bool = False
) -> ModelShape:
    made = _llama(
        layers, hidden, heads, kv_heads, ffn, 151936, 1e6, architecture="qwen3", max_position=40960, tied=tied,
        head_dim=128,
    )  # fmt: skip
    return replace(made, norm_eps=1e-6, head_norm=True)


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
    # scaled positions cost what others do, and are left out here
    "llama-3.1-8b": _llama(32, 4096, 32, 8, 14336, 128256, 5e5, max_position=131072),
    "llama-3.1-70b": _llama(80, 8192, 64, 8, 28672, 128256, 5e5, max_position=131072),
    "llama-3.2-1b": _llama(16, 2048, 32, 8, 8192, 128256, 5e5, max_position=131072, tied=True),
    "llama-3.2-3b": _llama(28, 3072, 24, 8, 8192, 128256, 5e5, max_position=131072, tied=True),
    "mistral-nemo-12b": _llama(
        40, 5120, 32, 8, 14336, 131072, 1e6, architecture="mistral", max_position=131072, head_dim=128
    ),
    "qwen2.5-0.5b": _qwen2(24, 896, 14, 2, 4864, 151936, tied=True),
    "qwen2.5-7b": _qwen2(28, 3584, 28, 4, 18944, 152064),
    "qwen2.5-32b": _qwen2(64, 5120, 40, 8, 27648, 152064),
    "qwen2.5-72b": _qwen2(80, 8192, 64, 8, 29568, 152064),
    "qwen3-0.6b": _qwen3(28, 1024, 16, 8, 3072, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 32, 8, 12288),
    "qwen3-32b": _qwen3(64, 5120, 64, 8, 25600),
}

# checkpoints that the packaged recipes name, and their bases
HUB = {
    "mistralai/Mistral-7B-v0.1": "mistral-7b",
    "openbmb/Eurus-7b-sft": "mistral-7b",
    "codellama/CodeLlama-70b-hf": "codellama-70b",
    "openbmb/Eurus-70b-sft": "codellama-70b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "Qwen/Qwen2.5-7B-Instruct": "qwen2.5-7b",
    "Qwen/Qwen3-8B": "qwen3-8b",
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
