"""Tiny checkpoints and data for tests of the whole path."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from silva.engine.recipe.schema import Recipe
from silva.recipes.mini.make_model import make

MINI = Path(__file__).resolve().parents[2] / "recipes" / "mini"


def checkpoint(folder: Path, *, seed: int = 0, family: str = "Llama", **changes: Any) -> Path:
    """The mini tokenizer beside a random model of 2 layers, large enough in its weights to be far from uniform."""
    make(MINI, folder, seed=seed)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
    }
    (folder / "model.safetensors").unlink()
    config = getattr(transformers, f"{family}Config")(**settings | changes)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    return folder


def rows(name: str, groups: int) -> list[dict[str, Any]]:
    """The rows of the first trees of one of the shipped files."""
    found: list[dict[str, Any]] = []
    with gzip.open(MINI / f"{name}.jsonl.gz", "rt") as file:
        for line in file:
            row = json.loads(line)
            if len({r["parent_id"] for r in found} | {row["parent_id"]}) > groups:
                break
            found.append(row)
    return found


def write(path: Path, found: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def recipe(name: str, folder: Path, rows: Path, output: Path, /, **sections: dict[str, Any]) -> Recipe:
    """A recipe over UltraInteract rows, from the checkpoint in `folder`; sections go over small defaults."""
    form = "ultrainteract_sft" if name == "sft" else "ultrainteract_pair"
    source = {"path": str(rows), "format": form, "absolute": name == "bt_dr"}
    raw: dict[str, Any] = {
        "output": str(output),
        "objective": {"name": name},
        "model": {"path": str(folder), "dtype": "float32"},
        "data": {"train": [source], "row_length": 1024},
        # epsilon: with 1e-8 Adam moves a weight whose gradient is all rounding error by the whole learning
        # rate, in the direction of the error, and layouts drift apart by 1e-4 in three steps
        "training": {
            "global_batch": 6,
            "learning_rate": 1e-3,
            "max_steps": 3,
            "warmup": 0.0,
            "epsilon": 1e-4,
        },
    }
    for key, section in sections.items():
        raw[key] = raw.get(key, {}) | section
    return Recipe.model_validate(raw)


def history(output: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics file."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
