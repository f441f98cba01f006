"""Lists the formats of data sources: the reader of each, and what is known about its rows.

A new format is one reader and one row of the table (and its name in `silva.engine.recipe.schema`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from silva.engine.data.reading import row_readers, tree_readers
from silva.engine.data.reading.parsed import Kind, Parsed


@dataclass(frozen=True, slots=True)
class Format:
    """Holds a reader and what is known about its rows.

    Attributes:
        parse: reads the fields of one row.
        kinds: the kinds of data that the reader gives.
        needs: the fields that a row must have.
        optional: the fields that a row may have; "list.field" is a field of a list's items, for `columns` to rename.
        grouped: whether rows with the same `Parsed.group` are one tree.
        turns: whether each row is a turn of its tree, and continues an action that another row rejects.
    """

    parse: Callable[[Mapping[str, Any], Kind], Parsed]
    kinds: tuple[Kind, ...]
    needs: tuple[str, ...]
    optional: tuple[str, ...] = ()
    grouped: bool = True
    turns: bool = False


FORMATS: dict[str, Format] = {
    "ultrainteract_sft": Format(
        row_readers.ultrainteract_sft, ("sequence",), ("parent_id", "instruction", "response")
    ),
    "ultrainteract_pair": Format(
        row_readers.ultrainteract_pair,
        ("comparison",),
        ("id", "parent_id", "trajectory", "chosen", "rejected"),
        turns=True,
    ),
    "ultrafeedback": Format(row_readers.ultrafeedback, ("comparison",), ("instruction", "completions")),
    "ultrasafety": Format(row_readers.ultrasafety, ("comparison",), ("instruction", "completions")),
    "hh_rlhf": Format(row_readers.hh_rlhf, ("comparison",), ("chosen", "rejected")),
    "preference": Format(row_readers.preference, ("comparison",), ("chosen", "rejected"), ("prompt",)),
    "unpaired": Format(row_readers.unpaired, ("comparison",), ("prompt", "completion", "label")),
    "messages": Format(
        row_readers.conversation_messages, ("sequence",), (), ("messages", "conversations"), grouped=False
    ),
    "prompt_completion": Format(
        row_readers.prompt_completion, ("sequence",), ("prompt", "completion"), ("system",)
    ),
    "gsm8k_solutions": Format(row_readers.gsm8k_solutions, ("sequence", "comparison"), ("question",)),
    "mint": Format(tree_readers.mint, ("sequence", "comparison"), ("prompt", "trajectories")),
    "nodes": Format(
        tree_readers.nodes,
        ("sequence", "comparison"),
        ("nodes",),
        ("prompt", "comparisons", *(f"nodes.{name}" for name in tree_readers.NODE_FIELDS)),
    ),
    "oasst": Format(tree_readers.oasst, ("sequence", "comparison"), ("prompt",)),
}
