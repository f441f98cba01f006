"""Finds the kernels and libraries with which a run computes on this machine, and describes them in one line."""

from __future__ import annotations

from silva.engine.parallel.optimizer import adam_in_use

import torch

from silva.engine.errors import UserError
from silva.engine.recipe.schema import Recipe
from silva.kernels import dispatch, document_attention


def check(recipe: Recipe) -> None:
    """Check that the libraries the recipe asks for are installed.

    Raises:
        UserError: one is not.
    """
    if recipe.model.attention == "flash" and document_attention.installed() is None:
        raise UserError(
            f"model.attention: found flash, but none of {', '.join(document_attention.MODULES)} is installed; install "
            "FlashAttention, or set model.attention to tree"
        )


def describe(recipe: Recipe) -> str:
    """Return the line that a run prints about them; called after the optimizer is built."""
    place = f"{torch.cuda.get_device_name()}, NCCL" if torch.cuda.is_available() else "CPU, gloo"
    kernels = f"Triton {dispatch.triton.__version__}" if dispatch.triton is not None else "torch"
    if not torch.cuda.is_available() and not dispatch.INTERPRETED:
        kernels = "torch"
    attention = f"tree attention ({kernels})"
    if recipe.model.attention == "flash" and recipe.parallel.context == 1:
        attention = f"{document_attention.installed()} for plain documents, else {attention}"
    offload = ", its state on the host" if recipe.parallel.offload_optimizer else ""
    return (
        f"{place}; {attention}; log-probs, losses, norms, rotary positions, SwiGLU ({kernels}); AdamW "
        f"({adam_in_use()}{offload})"
    )
