"""Lists the formats of data sources: the reader of each, and what is known about its rows.

A new format is one reader and one row of the table (and its name in `silva.engine.recipe.schema`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from silva.engine.data.reading import row_readers, tree_readers
from silva.engine.data.reading.parsed import Kind, Parsed

# which messages are scored: everything behind the prompt, the assistant's messages behind it, the last message, or all
# of the assistant's
Score = Literal["completion", "turns", "last", "all"]


@dataclass(frozen=True, slots=True)
class Format:
    """Holds a reader and what is known about its rows.

    Attributes:
        parse: reads the fields of one row.
        kinds: the kinds of data that the reader gives.
        needs: the fields that a row must have.
        optional: the fields that a row may have besides those of `ANY_ROW`; "list.field" is a field of a list's items,
            for `columns` to rename.
        grouped: whether rows with the same `Parsed.group` are one tree.
        turns: whether each row is a turn of its tree, and continues an action that another row rejects.
        all_fields: whether the reader looks into every field of a row.
        score: what `data.score: auto` means for comparisons.
        score_alone: what it means for sequences without comparisons.
    """

    parse: Callable[[Mapping[str, Any], Kind], Parsed]
    kinds: tuple[Kind, ...]
    needs: tuple[str, ...]
    optional: tuple[str, ...] = ()
    grouped: bool = True
    turns: bool = False
    all_fields: bool = False
    score: Score = "completion"
    score_alone: Score = "last"

    @property
    def known(self) -> tuple[str, ...]:
        """Return every name that a source's `columns` may give another name."""
        return (*self.needs, *self.optional, *ANY_ROW)

    def auto(self, kind: Kind) -> Score:
        """Return what `data.score: auto` means for a kind of data."""
        return self.score if kind == "comparison" else self.score_alone


# A row of any format may hold a system message, and what chat templates take beside the messages.
ANY_ROW = ("system", "tools", "chat_template_kwargs")

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
        row_readers.conversation_messages,
        ("sequence",),
        (),
        ("messages", "conversations"),
        grouped=False,
        score_alone="all",
    ),
    "prompt_completion": Format(
        row_readers.prompt_completion, ("sequence",), ("prompt", "completion"), score_alone="completion"
    ),
    "gsm8k_solutions": Format(
        row_readers.gsm8k_solutions, ("sequence", "comparison"), ("question",), all_fields=True
    ),
    "mint": Format(tree_readers.mint, ("sequence", "comparison"), ("prompt", "trajectories"), score="turns"),
    "nodes": Format(
        tree_readers.nodes,
        ("sequence", "comparison"),
        ("nodes",),
        ("prompt", "comparisons", *(f"nodes.{name}" for name in tree_readers.NODE_FIELDS)),
        score="turns",
    ),
    "oasst": Format(tree_readers.oasst, ("sequence", "comparison"), ("prompt",), score="turns"),
}
