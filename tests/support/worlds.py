"""Gives tests the gloo worlds of `silva.engine.parallel.forked`, forked from a parent that has imported everything."""

# imported once, before the ranks are forked; pyarrow imports pandas only when it makes its first array
from silva.engine.parallel.forked import world

import pandas  # noqa: F401

import silva.engine.training.trainer  # noqa: F401

__all__ = ["world"]
