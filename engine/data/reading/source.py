"""Reads a data source into groups: opens it, parses every row, merges the rows of one tree into one `Group`.

The two steps stand apart so that rows can be parsed by one process and merged by others: `parse_row` needs one row,
`assemble` all rows of the trees it is given. Rows of one tree (one `parent_id`, or the same prompt) need not be
adjacent; `messages` rows are a group each.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from silva.engine.data.augment import single_turn_pairs
from silva.engine.data.files import Row, open_rows
from silva.engine.data.messages import BadRow, Conversation, Message, root
from silva.engine.data.readers import FORMATS, Format, Kind, Parsed
from silva.engine.data.report import Report
from silva.engine.errors import UserError

if TYPE_CHECKING:
    from silva.engine.config import Source

__all__ = [
    "FORMATS",
    "Comparison",
    "Group",
    "Message",
    "Report",
    "assemble",
    "check_source",
    "parse_row",
    "read_groups",
]

OnBadRow = Literal["refuse", "skip"]


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


def read_groups(source: "Source", *, kind: Kind, on_bad_row: OnBadRow, report: Report) -> Iterator[Group]:
    """Reads one data source, all its groups in memory, in first-seen order (`messages` rows stream).

    kind: "sequence" for SFT data (groups without comparisons), "comparison" for preference data.
    on_bad_row: a malformed row either ends the reading or is counted in `report` and left out. Rows that are
        well formed but teach nothing (only ties, nothing correct) are always counted and left out.
    `source.limit` counts rows; `source.columns` maps the name a format needs to the name the file uses.
    Raises UserError: at once for an unknown format, kind, column or path; while iterating for a malformed row
        and for a source that gives no group at all.
    """
    form = check_source(source, kind)
    rows = itertools.islice(open_rows(source.path, source.split), source.limit)
    return _groups(rows, source, form, kind, on_bad_row, report)


def _groups(
    rows: Iterator[Row], source: "Source", form: Format, kind: Kind, on_bad_row: OnBadRow, report: Report
) -> Iterator[Group]:
    read = given = 0

    def parsed() -> Iterator[tuple[str, Parsed]]:
        nonlocal read
        for row in rows:
            read += 1
            found = parse_row(row, source, form, kind, on_bad_row, report)
            if found is not None:
                yield row.origin, found

    for group in assemble(parsed(), source, form, kind, on_bad_row, report):
        given += 1
        yield group
    if not read:
        raise UserError(f"data source {source.path}: it holds no rows")
    if not given:
        reasons = "; ".join(report.lines())
        raise UserError(f"data source {source.path}: none of its {read} rows can be used: {reasons}")


def check_source(source: "Source", kind: Kind) -> Format:
    """The format of a source; raises UserError where its keys cannot be meant."""
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
    if source.single_turn_pairs and not form.turns:
        fitting = ", ".join(name for name, other in FORMATS.items() if other.turns)
        raise UserError(
            f"data source {source.path}: single_turn_pairs is made from trees of turns, format {source.format} "
            f"has none; leave it out, or use {fitting}"
        )
    return form


def parse_row(
    row: Row, source: "Source", form: Format, kind: Kind, on_bad_row: OnBadRow, report: Report
) -> Parsed | None:
    """What a row says; None, counted, where it says nothing that teaches.

    Raises UserError for a malformed row, unless `on_bad_row` is "skip": then it is counted too.
    """
    try:
        parsed = form.parse(_fields(row, source, form), kind)
    except BadRow as bad:
        _refuse_or_count(bad, row.origin, source, on_bad_row, report)
        return None
    if not parsed.conversations:
        report.skip(parsed.reason, row.origin)
        return None
    for entry, count in parsed.left_out.items():
        report.add(entry, row.origin, count)
    return parsed


def assemble(
    rows: Iterable[tuple[str, Parsed]],
    source: "Source",
    form: Format,
    kind: Kind,
    on_bad_row: OnBadRow,
    report: Report,
) -> Iterator[Group]:
    """Merges rows into groups, in first-seen order.

    rows: (origin, row) in reading order; all rows of a tree stand in one call, with those of other trees between.
    Raises UserError for a row that does not fit its tree, unless `on_bad_row` is "skip": then it is counted.
    """
    trees: dict[str, _Tree] = {}
    for origin, parsed in rows:
        if not form.grouped:
            yield Group(origin, parsed.conversations, [], origin)
            continue
        # Looked up before the tree is made, so that a malformed row leaves no empty group behind.
        tree = trees.get(parsed.group) or _Tree(parsed, origin)
        try:
            tree.add(parsed, origin, source.absolute)
        except BadRow as bad:
            _refuse_or_count(bad, origin, source, on_bad_row, report)
        else:
            trees[parsed.group] = tree
    for tree in trees.values():
        if form.turns:
            tree.check_turns(report)
        if source.single_turn_pairs:
            tree.add_single_turn_pairs(source)
        yield tree.group


def _refuse_or_count(
    bad: BadRow, origin: str, source: "Source", on_bad_row: OnBadRow, report: Report
) -> None:
    if on_bad_row == "refuse":
        advice = "repair the row, or set data.on_bad_row=skip to count and leave out such rows"
        raise UserError(f"{origin}: {bad} (format {source.format}); {advice}") from None
    report.skip(bad.reason, origin)


class _Tree:
    """A group while its rows arrive; finds equal conversations by their text."""

    def __init__(self, parsed: Parsed, origin: str) -> None:
        self.group = Group(parsed.group, [], [], origin)
        self._root = root(parsed.conversations[0])
        self._index: dict[Conversation, int] = {}
        self._origins: list[str] = []  # of each comparison

    def add(self, parsed: Parsed, origin: str, absolute: bool) -> None:
        """Adds one row's conversations; raises BadRow, changing nothing, if a comparison has another root."""
        if not parsed.comparisons:
            # UltraInteract_sft folds a branch's history into `instruction`: the roots of one tree may differ.
            self.group.conversations.extend(parsed.conversations)
            return
        if any(root(conversation) != self._root for conversation in parsed.conversations):
            where = f"tree {parsed.group}, first seen at {self.group.origin}"
            raise BadRow("sequences of one tree have different instructions", where)
        places = [self._place(conversation) for conversation in parsed.conversations]
        for pair in parsed.comparisons:
            chosen, rejected = (None if side is None else places[side] for side in pair)
            self.group.comparisons.append(Comparison(chosen, rejected, absolute))
            self._origins.append(origin)

    def check_turns(self, report: Report) -> None:
        """Counts the rows that continue an action which no row of their tree rejects.

        They are used as they are: UltraInteract has no row for a turn whose correct action could not be sampled
        (the paper's appendix A.4).
        """
        pairs = self._pairs()
        rejected = {below for _, below in pairs}
        for origin, (chosen, _) in zip(self._origins, pairs, strict=True):
            action_before = chosen[:-2]  # up to the last action, without what was observed after it
            if action_before[1:] and action_before not in rejected:
                report.note("the trajectory continues an action that no row of its tree rejects", origin)

    def add_single_turn_pairs(self, source: "Source") -> None:
        """Adds the pairs of actions of different turns, each as an answer to the instruction itself."""
        for pair in single_turn_pairs(self._pairs(), source.single_turn_seed):
            chosen, rejected = map(self._place, pair)
            self.group.comparisons.append(Comparison(chosen, rejected, source.absolute))

    def _pairs(self) -> list[tuple[Conversation, Conversation]]:
        """(chosen, rejected) of comparisons that have both."""
        found = self.group.conversations
        return [
            (found[each.chosen], found[each.rejected])
            for each in self.group.comparisons
            if each.chosen is not None and each.rejected is not None
        ]

    def _place(self, conversation: Conversation) -> int:
        index = self._index.setdefault(conversation, len(self.group.conversations))
        if index == len(self.group.conversations):
            self.group.conversations.append(conversation)
        return index


def _fields(row: Row, source: "Source", form: Format) -> dict[str, Any]:
    """The row with its columns renamed; a field that is null counts as absent (that is how Parquet pads)."""
    if row.fields is None:
        raise BadRow(row.problem, row.detail)
    outer = {name: theirs for name, theirs in source.columns.items() if "." not in name}
    fields = _renamed(row.fields, outer)
    for name in {name.partition(".")[0] for name in source.columns if "." in name}:
        inner = {
            field.partition(".")[2]: theirs
            for field, theirs in source.columns.items()
            if field.startswith(f"{name}.")
        }
        if isinstance(fields.get(name), list):
            fields[name] = [
                _renamed(item, inner) if isinstance(item, Mapping) else item for item in fields[name]
            ]
    missing = [name for name in form.needs if name not in fields]
    if missing:
        wanted, found = ", ".join(missing), ", ".join(row.fields) or "nothing"
        raise BadRow(
            f"the row has no {wanted}",
            f"it has {found}; name it with columns: {{{missing[0]}: <file's field>}} or set another format",
        )
    return fields


def _renamed(fields: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    own = {name: value for name, value in fields.items() if value is not None}
    # a renamed field is read from nowhere else: a misspelt column must not fall back on a field of the same name
    kept = {name: value for name, value in own.items() if name not in columns}
    return kept | {name: own[theirs] for name, theirs in columns.items() if theirs in own}
