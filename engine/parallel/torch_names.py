"""Gives megatron-core torch's newest collectives, under the names by which it imports them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from unittest.mock import patch

import torch.distributed as dist

# names that megatron-core binds on its import, and what torch 2.13 calls them; the old ones warn where they are called
NEW = {
    "all_gather_into_tensor": "all_gather_single",
    "reduce_scatter_tensor": "reduce_scatter_single",
}


@contextlib.contextmanager
def renamed() -> Iterator[None]:
    """While the block lasts, old names of torch's collectives mean the new functions, if torch has them."""
    found = {old: getattr(dist, new) for old, new in NEW.items() if hasattr(dist, new)}
    with patch.multiple(dist, **found) if found else contextlib.nullcontext():
        yield


def import_megatron() -> None:
    """Import those modules of megatron-core that bind collectives."""
    for name in ("megatron.core.models.gpt.gpt_model", "megatron.core.distributed"):
        importlib.import_module(name)
