"""Counts everything that did not reach training, so that nothing is dropped silently."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import PurePosixPath


@dataclass
class Report:
    """Holds what was skipped or truncated, by reason, and the first place where each reason was met.

    The first place is that of the lowest file name and row, not that of the first call, so reports of parallel readers
    merge to the same whole in any order.

    Attributes:
        counts: rows (or sequences) per entry; an entry reads "skipped: <reason>", "truncated: <reason>",
            "noted: <reason>" or "not read: <field>".
        examples: the first place of each entry, such as "train.jsonl:12".
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def skip(self, reason: str, where: str) -> None:
        """Count one thing that was left out; `reason` names a class of rows and never holds the text of one row."""
        self.add(f"skipped: {reason}", where)

    def truncate(self, reason: str, where: str) -> None:
        """Count one thing that was shortened."""
        self.add(f"truncated: {reason}", where)

    def note(self, reason: str, where: str) -> None:
        """Count one thing that was kept although it is not as it should be."""
        self.add(f"noted: {reason}", where)

    def add(self, entry: str, where: str, count: int = 1) -> None:
        """Count `count` things under an entry, which is given with its "skipped: ", "truncated: " and so on."""
        self.counts[entry] += count
        known = self.examples.setdefault(entry, where)
        if known != where and _place(where) < _place(known):
            self.examples[entry] = where

    def merge(self, other: Report) -> None:
        """Add what another report counted."""
        for entry, count in other.counts.items():
            self.add(entry, other.examples[entry], count)

    def lines(self) -> list[str]:
        """Return one line per entry, the most frequent first; an empty list when nothing was counted.

        Fields that are not read share a line if the same rows have them.
        """
        lines: dict[tuple[str, int, str], list[str]] = {}
        for entry, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0])):
            start, _, name = entry.partition("not read: ")
            lines.setdefault((start or "not read: ", count, self.examples[entry]), []).append(name)
        return [
            f"{start}{', '.join(names)}: {count} (first: {where})"
            for (start, count, where), names in lines.items()
        ]

    def to_json(self) -> str:
        """Return the report as one line of JSON that gives [count, first place] for each entry."""
        return json.dumps({entry: [count, self.examples[entry]] for entry, count in self.counts.items()})

    @classmethod
    def from_json(cls, line: str) -> Report:
        """Return the report that `to_json` was called on."""
        report = cls()
        for entry, (count, where) in json.loads(line).items():
            report.add(entry, where, count)
        return report


def _place(where: str) -> tuple[tuple[str, ...], int, str]:
    """Return a key that sorts "file:row" as files are read: by the parts of the path, then by row."""
    name, _, row = where.rpartition(":")
    return (PurePosixPath(name).parts, int(row), "") if row.isdecimal() else ((where,), 0, where)
