"""Lists the families of models that the engine builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from silva.engine.errors import UserError, shown
from silva.engine.model.families import llama, mistral, phi3, qwen2, qwen3
from silva.engine.model.families.config import Config
from silva.engine.model.families.shape import ModelShape

FAMILIES = {
    family.model_type: family
    for family in (llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY, phi3.FAMILY)
}


def shape(file: Path, values: dict[str, Any]) -> ModelShape:
    """Read the shape of a checkpoint of a known family.

    Args:
        file: its config.json, for errors.
        values: of the file.

    Raises:
        UserError: the family is unknown, or the model is a variant that the engine does not build.
    """
    kind, named = values.get("model_type"), values.get("architectures") or [None]
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise UserError(
            f"{file}: model_type {shown(kind)} is not among the known families, {', '.join(FAMILIES)}; "
            "docs/families.md says how one is added"
        )
    if not isinstance(named, list) or named[0] not in (*family.architectures, None):
        raise UserError(
            f"{file}: architectures is {shown(named)}; supported are {', '.join(family.architectures)}"
        )
    return family.shape(Config(file, values, family.defaults))
