"""Reads a data source into groups: opens it, parses every row, and merges the rows of one tree into one `Group`.

Parsing and merging are separate steps, so that one process can parse rows and others can merge them: parsing needs one
row, merging needs all rows of a tree. Rows of one tree (one `parent_id`, or the same prompt) need not be adjacent.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from silva.engine.data.reading.augment import single_turn_pairs
from silva.engine.data.reading.files import Row, open_rows
from silva.engine.data.reading.formats import FORMATS
from silva.engine.data.reading.messages import (
    BadRow,
    Conversation,
    Message,
    quoted,
    root,
    shared_prefix,
    text,
    typename,
    unread_keys,
)
from silva.engine.data.reading.parsed import Kind, Parsed, prompt_id
from silva.engine.data.report import Report
from silva.engine.errors import UserError

if TYPE_CHECKING:
    from silva.engine.recipe.schema import Source

OnBadRow = Literal["refuse", "skip"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Holds two indices into `Group.conversations`; if one is None, it is unpaired feedback, for objective kto only.

    Attributes:
        chosen: the better conversation.
        rejected: the worse conversation.
        absolute: whether the comparison also gets bt_dr's absolute-reward term.
        given: messages that both sides begin with and neither is judged by.
    """

    chosen: int | None
    rejected: int | None
    absolute: bool = False
    given: int = 0


@dataclass(slots=True)
class Group:
    """Holds one tree: all sequences of one root instruction.

    Where there are comparisons, equal conversations are kept once; in SFT groups duplicates are kept and count.

    Attributes:
        id: of the tree; see `Parsed.group`.
        conversations: the sequences.
        comparisons: empty in SFT groups.
        origin: place of the tree's first row, such as "train.jsonl:12".
        given: in SFT groups, messages of each conversation's prompt; 0 where the row does not say where it ends.
        instruction: of the tree, where a conversation may not begin with it alone; see `Parsed.instruction`.
    """

    id: str
    conversations: list[Conversation]
    comparisons: list[Comparison]
    origin: str
    given: list[int] = field(default_factory=list)
    instruction: str = ""


class SourceReader:
    """Reads one data source; its format and columns are checked once, when the reader is made.

    Args:
        source: `source.limit` counts rows; `source.columns` maps the name that a format needs to the name that the
            file uses.
        kind: "sequence" for SFT data (groups without comparisons), "comparison" for preference data.
        on_bad_row: whether a malformed row ends the reading, or is counted and left out. Rows that are well formed but
            teach nothing (only ties, nothing correct) are always counted and left out.

    Attributes:
        format: of the source.

    Raises:
        UserError: a format or a column that is not known, a kind of data that the format does not give, or
            `single_turn_pairs` for a format without turns.
    """

    def __init__(self, source: "Source", kind: Kind, on_bad_row: OnBadRow) -> None:
        self.source, self.kind, self.on_bad_row = source, kind, on_bad_row
        found = FORMATS.get(source.format)
        if found is None:
            raise UserError(
                f"data source {source.path}: unknown format {source.format!r}; known: {', '.join(FORMATS)}"
            )
        self.format = found
        self._check()
        # what `columns` renames, in the row itself and in the items of its lists
        self._columns = {name: theirs for name, theirs in source.columns.items() if "." not in name}
        self._inner: dict[str, dict[str, str]] = {}
        for name, theirs in source.columns.items():
            outer, dot, inner = name.partition(".")
            if dot:
                self._inner.setdefault(outer, {})[inner] = theirs
        # the file's fields that are read; None: all
        self._reads = (
            None
            if found.all_fields
            else frozenset(self._columns.get(name, name) for name in found.known if "." not in name)
        )

    def _check(self) -> None:
        source, form, kind = self.source, self.format, self.kind
        if kind not in form.kinds:
            fitting = ", ".join(name for name, other in FORMATS.items() if kind in other.kinds)
            gives = "sequences without comparisons" if kind == "comparison" else "comparisons"
            raise UserError(
                f"data source {source.path}: format {source.format} gives {gives}, this objective needs {kind}s; "
                f"formats that give them: {fitting}"
            )
        unknown = [name for name in source.columns if name not in form.known]
        if unknown:
            raise UserError(
                f"data source {source.path}: columns names {', '.join(unknown)}, but format {source.format} "
                f"reads {', '.join(form.known)}; write columns as {{field of the format: field of the file}}"
            )
        if source.single_turn_pairs and not form.turns:
            fitting = ", ".join(name for name, other in FORMATS.items() if other.turns)
            raise UserError(
                f"data source {source.path}: single_turn_pairs is made from trees of turns, format {source.format} "
                f"has none; leave it out, or use {fitting}"
            )

    # ------------------------------------------------------------ rows

    def rows(
        self, report: Report, *, watch: Callable[[int], None] | None = None
    ) -> Iterator[tuple[str, Parsed]]:
        """Open the source and yield every row that can be learned from.

        Args:
            report: counts the other rows.
            watch: called after each row with the number of rows read so far.

        Yields:
            (origin, row).

        Raises:
            UserError: the source cannot be opened (this is raised at once); or it holds no row, a malformed row under
                `on_bad_row: refuse`, or no row that can be used.
        """
        opened = open_rows(self.source.path, self.source.split, self._reads)
        return self._parsed(itertools.islice(opened, self.source.limit), report, watch)

    def _parsed(
        self, rows: Iterator[Row], report: Report, watch: Callable[[int], None] | None
    ) -> Iterator[tuple[str, Parsed]]:
        read = given = 0
        for row in rows:
            read += 1
            parsed = self.parse(row, report)
            if watch is not None:
                watch(read)
            if parsed is not None:
                given += 1
                yield row.origin, parsed
        if not read:
            raise UserError(f"data source {self.source.path}: it holds no rows")
        if not given:
            reasons = "; ".join(report.lines())
            raise UserError(f"data source {self.source.path}: none of its {read} rows can be used: {reasons}")

    def parse(self, row: Row, report: Report) -> Parsed | None:
        """Return what a row says.

        Args:
            row: as it was read.
            report: counts rows that are left out.

        Returns:
            What the row says; None where there is nothing to learn from.

        Raises:
            UserError: a malformed row, unless `on_bad_row` is "skip", which counts the row too.
        """
        try:
            fields = self._fields(row)
            parsed = _headed(self.format.parse(fields, self.kind), fields)
        except BadRow as bad:
            self._refuse_or_count(bad, row.origin, report)
            return None
        for name in self._unread(row):
            report.add(f"not read: {name}", row.origin)
        if not parsed.conversations:
            report.skip(parsed.reason, row.origin)
            return None
        for entry, count in parsed.left_out.items():
            report.add(entry, row.origin, count)
        return parsed

    def _unread(self, row: Row) -> Iterator[str]:
        """Yield what the row holds and nothing reads: its fields, and the keys of its messages."""
        assert row.fields is not None
        yield from row.unread
        for name, value in row.fields.items():
            if self._reads is not None and name not in self._reads:
                if value is not None:
                    yield name
            else:
                yield from (f"{name}[].{key}" for key in unread_keys(value))

    def _fields(self, row: Row) -> dict[str, Any]:
        """Rename a row's columns; a null field counts as absent, because Parquet stores absent fields as null."""
        if row.fields is None:
            raise BadRow(row.problem, row.detail)
        fields = _renamed(row.fields, self._columns)
        for name, inner in self._inner.items():
            if isinstance(fields.get(name), list):
                fields[name] = [
                    _renamed(item, inner) if isinstance(item, Mapping) else item for item in fields[name]
                ]
        for name in self.format.needs:
            if name in fields:
                continue
            theirs = self._columns.get(name, name)
            if theirs in row.fields:
                raise BadRow(f"{theirs} is null")
            wanted = ", ".join(each for each in self.format.needs if each not in fields)
            found = ", ".join([*row.fields, *row.unread]) or "nothing"
            raise BadRow(
                f"the row has no {wanted}",
                f"it has {found}; name it with columns: {{{name}: <file's field>}} or set another format",
            )
        return fields

    # ------------------------------------------------------------ trees

    def groups(self, rows: Iterable[tuple[str, Parsed]], report: Report) -> Iterator[Group]:
        """Merge rows into groups, in first-seen order.

        Args:
            rows: (origin, row) in reading order: all rows of each tree; rows of other trees may lie between them.
            report: counts the rows that do not fit their tree.

        Raises:
            UserError: a row does not fit its tree, and `on_bad_row` is not "skip".
        """
        trees: dict[str, _Tree] = {}
        for origin, parsed in rows:
            if not self.format.grouped:
                given = [parsed.given or 0] * len(parsed.conversations)
                yield Group(origin, parsed.conversations, [], origin, given)
                continue
            # the tree is stored only after its row was added, so that a malformed row leaves no empty group behind
            tree = trees.get(parsed.group) or _Tree(parsed, origin)
            try:
                tree.add(parsed, origin, self.source.absolute)
            except BadRow as bad:
                self._refuse_or_count(bad, origin, report)
            else:
                trees[parsed.group] = tree
        for tree in trees.values():
            if self.format.turns:
                tree.check_turns(report)
            if self.source.single_turn_pairs:
                tree.add_single_turn_pairs(self.source)
            yield tree.group

    def _refuse_or_count(self, bad: BadRow, origin: str, report: Report) -> None:
        if self.on_bad_row == "refuse":
            advice = "repair the row, or set data.on_bad_row=skip to count and leave out such rows"
            raise UserError(f"{origin}: {bad} (format {self.source.format}); {advice}") from None
        report.skip(bad.reason, origin)


class _Tree:
    """Holds a group while its rows are added, and finds equal conversations by their text."""

    def __init__(self, parsed: Parsed, origin: str) -> None:
        self.group = Group(parsed.group, [], [], origin, instruction=parsed.instruction)
        self._root = root(parsed.conversations[0])
        self._index: dict[Conversation, int] = {}
        # place of the row of each comparison
        self._origins: list[str] = []

    def add(self, parsed: Parsed, origin: str, absolute: bool) -> None:
        """Add one row's conversations and comparisons.

        Args:
            parsed: the row.
            origin: place of the row.
            absolute: whether the comparisons also get bt_dr's absolute-reward term.

        Raises:
            BadRow: a conversation of a comparison has another root than the tree; nothing is then changed.
        """
        if not parsed.comparisons:
            # UltraInteract_sft folds a branch's history into `instruction`, so the roots of one tree may differ
            self.group.conversations += parsed.conversations
            self.group.given += [parsed.given or 0] * len(parsed.conversations)
            return
        if any(root(conversation) != self._root for conversation in parsed.conversations):
            where = f"tree {parsed.group}, first seen at {self.group.origin}"
            raise BadRow("sequences of one tree have different instructions", where)
        places = [self._place(conversation) for conversation in parsed.conversations]
        for pair in parsed.comparisons:
            chosen, rejected = (None if side is None else places[side] for side in pair)
            self._compare(chosen, rejected, absolute, parsed.given)
            self._origins.append(origin)

    def _compare(
        self, chosen: int | None, rejected: int | None, absolute: bool, given: int | None = None
    ) -> None:
        if given is None and chosen is not None and rejected is not None:
            said = self.group.conversations
            given = len(shared_prefix(said[chosen], said[rejected]))
        self.group.comparisons.append(Comparison(chosen, rejected, absolute, given or 0))

    def check_turns(self, report: Report) -> None:
        """Count the rows that continue an action which no row of their tree rejects.

        Such rows are used as they are: UltraInteract has no row for a turn whose correct action could not be sampled
        (the paper's appendix A.4).
        """
        pairs = self._pairs()
        rejected = {below for _, below in pairs}
        for origin, (chosen, _) in zip(self._origins, pairs, strict=True):
            # up to the action before the chosen one, without what was observed after it
            action_before = chosen[:-2]
            if len(action_before) > len(self._root) and action_before not in rejected:
                report.note("the trajectory continues an action that no row of its tree rejects", origin)

    def add_single_turn_pairs(self, source: "Source") -> None:
        """Add the pairs of actions of different turns, each as an answer to the instruction itself."""
        for pair in single_turn_pairs(self._pairs(), source.single_turn_seed, source.single_turn_limit):
            chosen, rejected = map(self._place, pair)
            self._compare(chosen, rejected, source.absolute)

    def _pairs(self) -> list[tuple[Conversation, Conversation]]:
        """List (chosen, rejected) of the comparisons that have both."""
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


def _headed(parsed: Parsed, fields: Mapping[str, Any]) -> Parsed:
    """Put in front of a row's conversations what its own fields say: a system message, and what templates take.

    Args:
        parsed: of the row's format.
        fields: of the row.

    Raises:
        BadRow: one of the fields is malformed, or the conversations have another system message.
    """
    before: list[Message] = []
    context = {name: value for name in ("tools", "chat_template_kwargs") if (value := _json(fields, name))}
    if context:
        given = {"tools": context["tools"]} if "tools" in context else {}
        content = json.dumps(given | context.get("chat_template_kwargs", {}), ensure_ascii=False)
        before.append(Message("context", text(content, next(iter(context)))))
    said = fields.get("system")
    if said is not None and text(said, "system", blank=True).strip():
        before.append(Message("system", said))
    if not before:
        return parsed
    added = 0
    for place, conversation in enumerate(parsed.conversations):
        own = conversation[0] if conversation[0].role == "system" else None
        if own is not None and before[-1].role == "system" and own != before[-1]:
            raise BadRow("the row's system field and its system message differ")
        kept = before[:-1] if own is not None and own == before[-1] else before
        parsed.conversations[place] = (*kept, *conversation)
        added = len(kept)
    if parsed.conversations and parsed.given is not None:
        parsed.given += added
    if parsed.group:
        parsed.group = f"{parsed.group} {prompt_id(tuple(before))}"
    return parsed


def _json(fields: Mapping[str, Any], name: str) -> Any:
    """Return a field that is a list of tools or an object of variables, or JSON of it; None where there is none."""
    value, wanted = fields.get(name), {"tools": list, "chat_template_kwargs": dict}[name]
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise BadRow(f"{name} is not JSON", quoted(str(error))) from None
    if value is not None and not isinstance(value, wanted):
        raise BadRow(
            f"{name} is not {'a list' if wanted is list else 'an object'}", f"found {typename(value)}"
        )
    return value


def _renamed(fields: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    own = {name: value for name, value in fields.items() if value is not None}
    # a renamed field is read from nowhere else: a misspelt column must not fall back on a field of the same name
    kept = {name: value for name, value in own.items() if name not in columns}
    return kept | {name: own[theirs] for name, theirs in columns.items() if theirs in own}
