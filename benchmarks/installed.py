"""Whether a module can be imported, without importing it."""

from __future__ import annotations

import importlib.util


def absent(module: str) -> str | None:
    """Why it cannot be had, or None."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of the package that would hold it
        found = None
    return None if found else f"{module} is not installed"
