"""Tells whether a module can be imported, without importing it."""

from __future__ import annotations

import importlib.util


def absent(module: str) -> str | None:
    """Return why a module is not available, or None."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        # the package that would hold it is missing
        found = None
    return None if found else f"{module} is not installed"
