"""Reads rotary positions, scaled or not, from a checkpoint's config.json; transformers computes the frequencies."""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from silva.engine.errors import UserError, shown
from silva.engine.model.families.config import Config

# Scaled once and for all. `dynamic` is not: beyond max_position_embeddings, the frequencies of every token depend on
# the length of the sequence that is computed; up to it, they are unscaled.
SCALED = ("linear", "llama3", "yarn")


class Rope(NamedTuple):
    """Describes rotary positions.

    Attributes:
        theta: the base of the frequencies.
        frequencies: (D / 2) inverse frequencies, if they are scaled; else None, and they follow from `theta`.
        scale: what cosine and sine are multiplied by (YaRN's attention factor).
        bounded: whether this holds up to max_position_embeddings alone.
    """

    theta: float
    frequencies: tuple[float, ...] | None = None
    scale: float = 1.0
    bounded: bool = False


def read(config: Config) -> Rope:
    """Read the rotary positions of a config.

    They are in `rope_parameters` since transformers 5, and before that in `rope_theta` beside `rope_scaling`.

    Raises:
        UserError: they are of a kind that the engine does not compute, or their numbers make no sense.
    """
    found: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        part = config.get(key) or {}
        if not isinstance(part, dict):
            raise UserError(f"{config.file}: {key} must be an object, found {shown(part)}")
        found |= part
        kind = part.get("rope_type", part.get("type", "default"))
        if kind not in ("default", "dynamic", *SCALED) or part.get("partial_rotary_factor", 1) != 1:
            raise UserError(
                f"{config.file}: {key} is {shown(part)}; supported are rope_type default, dynamic, "
                f"{', '.join(SCALED)}, of whole heads"
            )
    kind = found.get("rope_type", found.get("type", "default"))
    theta = Config(config.file, config.values | found, {}).positive("rope_theta", 10000.0)
    if kind == "default":
        return Rope(theta)
    if kind == "dynamic":
        return Rope(theta, bounded=True)
    return Rope(theta, *_scaled(config, kind))


def _scaled(config: Config, kind: str) -> tuple[tuple[float, ...], float]:
    from transformers import CONFIG_MAPPING
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    try:
        with _quiet():
            theirs = CONFIG_MAPPING[config.get("model_type")].from_dict(config.values)
            frequencies, scale = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
        numbers = tuple(frequencies.tolist())
    # transformers reads foreign values, and stumbles over them in many ways
    except Exception as error:
        raise UserError(
            f"{config.file}: rope_type {kind}: transformers cannot compute its frequencies "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error
    if not all(map(math.isfinite, (*numbers, scale))) or min(numbers) <= 0:
        raise UserError(f"{config.file}: rope_type {kind}: its numbers give frequencies that are none")
    return numbers, float(scale)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from printing, because what it would warn of is an error here or of no matter."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)
