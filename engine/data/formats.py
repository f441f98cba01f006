"""Reads a data source into groups: opens it, parses every row, merges the rows of one tree into one `Group`.

Formats whose rows belong together (one `parent_id`, or the same prompt) are grouped in memory, in first-seen
order, because such rows need not be adjacent; `messages` streams, one group per row.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from silva.engine.data.files import Row, open_rows
from silva.engine.data.messages import BadRow, Conversation, Message, root
from silva.engine.data.readers import FORMATS, Format, Kind, Parsed
from silva.engine.data.report import Report
from silva.engine.errors import UserError

if TYPE_CHECKING:
    from silva.engine.config import Source

__all__ = ["FORMATS", "Comparison", "Group", "Message", "Report", "read_groups"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Indices into `Group.conversations`; one side None is unpaired feedback, for objective kto only."""

    chosen: int | None
    rejected: int | None
    absolute: bool = False


@dataclass(slots=True)
class Group:
    """One tree: all sequences of one root instruction; `origin` is its first row, such as "train.jsonl:12".

    Where there are comparisons, equal conversations are kept once; in SFT groups duplicates stay and count.
    """

    id: str
    conversations: list[Conversation]
    comparisons: list[Comparison]
    origin: str


def read_groups(
    source: "Source", *, kind: Kind, on_bad_row: Literal["refuse", "skip"], report: Report
) -> Iterator[Group]:
    """Reads one data source.

    kind: "sequence" for SFT data (groups without comparisons), "comparison" for preference data.
    on_bad_row: a malformed row either ends the reading or is counted in `report` and left out. Rows that are
        well formed but teach nothing (only ties, nothing correct) are always counted and left out.
    `source.limit` counts rows; `source.columns` maps the name a format needs to the name the file uses.
    Raises UserError: at once for an unknown format, kind, column or path; while iterating for a malformed row
        and for a source that gives no group at all.
    """
    form = _format(source, kind)
    rows = itertools.islice(open_rows(source.path, source.split), source.limit)
    return _groups(rows, source, form, kind, on_bad_row, report)


def _format(source: "Source", kind: Kind) -> Format:
    form = FORMATS.get(source.format)
    if form is None:
        raise UserError(
            f"data source {source.path}: unknown format {source.format!r}; known: {', '.join(FORMATS)}"
        )
    if kind not in form.kinds:
        fitting = ", ".join(name for name, other in FORMATS.items() if kind in other.kinds)
        gives = "sequences without comparisons" if kind == "comparison" else "comparisons"
        raise UserError(
            f"data source {source.path}: format {source.format} gives {gives}, this objective needs {kind}s; "
            f"formats that give them: {fitting}"
        )
    known = (*form.needs, *form.optional)
    unknown = [name for name in source.columns if name not in known]
    if unknown:
        raise UserError(
            f"data source {source.path}: columns names {', '.join(unknown)}, but format {source.format} "
            f"reads {', '.join(known)}; write columns as {{field of the format: field of the file}}"
        )
    return form


def _groups(
    rows: Iterator[Row],
    source: "Source",
    form: Format,
    kind: Kind,
    on_bad_row: Literal["refuse", "skip"],
    report: Report,
) -> Iterator[Group]:
    groups: dict[str, _Tree] = {}
    read = given = 0
    for row in rows:
        read += 1
        try:
            parsed = form.parse(_fields(row, source, form), kind)
            if not parsed.conversations:
                report.skip(parsed.reason, row.origin)
                continue
            given += 1
            if form.grouped:
                # Looked up before the tree is made, so that a malformed row leaves no empty group behind.
                tree = groups.get(parsed.group) or _Tree(parsed, row.origin)
                tree.add(parsed, source.absolute)
                groups[parsed.group] = tree
            else:
                yield Group(row.origin, parsed.conversations, [], row.origin)
        except BadRow as bad:
            if on_bad_row == "refuse":
                advice = "repair the row, or set data.on_bad_row=skip to count and leave out such rows"
                raise UserError(f"{row.origin}: {bad} (format {source.format}); {advice}") from None
            report.skip(bad.reason, row.origin)
    if not read:
        raise UserError(f"data source {source.path}: it holds no rows")
    if not given:
        reasons = "; ".join(report.lines())
        raise UserError(f"data source {source.path}: none of its {read} rows can be used: {reasons}")
    for tree in groups.values():
        yield tree.group


class _Tree:
    """A group while its rows arrive; finds equal conversations by their text."""

    def __init__(self, parsed: Parsed, origin: str) -> None:
        self.group = Group(parsed.group, [], [], origin)
        self._root = root(parsed.conversations[0])
        self._index: dict[Conversation, int] = {}

    def add(self, parsed: Parsed, absolute: bool) -> None:
        """Adds one row's conversations; raises BadRow, changing nothing, if a comparison has another root."""
        if not parsed.comparisons:
            # UltraInteract_sft folds a branch's history into `instruction`: the roots of one tree may differ.
            self.group.conversations.extend(parsed.conversations)
            return
        if any(root(conversation) != self._root for conversation in parsed.conversations):
            where = f"parent_id {parsed.group}, first seen at {self.group.origin}"
            raise BadRow("rows of one parent_id have different instructions", where)
        places = [self._place(conversation) for conversation in parsed.conversations]
        for pair in parsed.comparisons:
            chosen, rejected = (None if side is None else places[side] for side in pair)
            self.group.comparisons.append(Comparison(chosen, rejected, absolute))

    def _place(self, conversation: Conversation) -> int:
        index = self._index.setdefault(conversation, len(self.group.conversations))
        if index == len(self.group.conversations):
            self.group.conversations.append(conversation)
        return index


def _fields(row: Row, source: "Source", form: Format) -> dict[str, Any]:
    """The row with its columns renamed; a field that is null counts as absent (that is how Parquet pads)."""
    if row.fields is None:
        raise BadRow(row.problem, row.detail)
    own = {name: value for name, value in row.fields.items() if value is not None}
    # a renamed field is read from nowhere else: a misspelt column must not fall back on a field of the same name
    fields = {name: value for name, value in own.items() if name not in source.columns}
    fields |= {name: own[theirs] for name, theirs in source.columns.items() if theirs in own}
    missing = [name for name in form.needs if name not in fields]
    if missing:
        wanted, found = ", ".join(missing), ", ".join(row.fields) or "nothing"
        raise BadRow(
            f"the row has no {wanted}",
            f"it has {found}; name it with columns: {{{missing[0]}: <file's field>}} or set another format",
        )
    return fields
