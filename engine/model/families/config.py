"""Reads the keys of a checkpoint's config.json, each with its type, and refuses in one line what is none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from silva.engine.errors import UserError, shown


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a checkpoint.

    Raises:
        UserError: the file is missing, or holds anything else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: missing; {file.parent} is not a Hugging Face checkpoint's folder") from None
    # bad JSON or bad UTF-8, a number of thousands of digits, or brackets in thousands of brackets
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({error})") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: a JSON object is expected, found {type(found).__name__}")
    return found


class Config:
    """Holds the values of a config.json.

    Args:
        file: named in errors.
        values: of the file.
        defaults: of keys that transformers leaves out because they equal its own default.

    Attributes:
        file: named in errors.
        values: of the file, with the defaults.
    """

    def __init__(self, file: Path, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.file = file
        self.values = {**defaults, **values}

    def get(self, key: str) -> Any:
        """Return a value of any type; None if it is not there."""
        return self.values.get(key)

    def count(self, key: str) -> int:
        """Return a positive whole number.

        Raises:
            UserError: it is none.
        """
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise UserError(
                f"{self.file}: {key} must be a positive whole number below 2^31, found {shown(value)}"
            )
        return value

    def positive(self, key: str, default: float) -> float:
        """Return a positive number.

        Raises:
            UserError: it is none.
        """
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
            raise UserError(f"{self.file}: {key} must be a positive number, found {shown(value)}")
        return float(value)

    def flag(self, key: str) -> bool:
        """Return whether a key is true; one that is not there is not.

        Raises:
            UserError: it is neither true nor false.
        """
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            raise UserError(f"{self.file}: {key} must be true or false, found {shown(value)}")
        return value

    def only(self, **supported: tuple[Any, ...]) -> None:
        """Refuse settings that would change the model's outputs and that the engine does not build.

        Args:
            **supported: the values that are, by key; the first one is that of a key that is not there.

        Raises:
            UserError: a key has another value.
        """
        for key, values in supported.items():
            if self.values.get(key, values[0]) not in values:
                raise UserError(
                    f"{self.file}: {key} is {shown(self.get(key))}; only {values[0]!r} is supported"
                )
