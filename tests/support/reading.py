"""Reads a source's groups as the pipeline does, in one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from silva.engine.data.reading.source import Group, SourceReader
from silva.engine.data.report import Report


def groups(source: Any, *, kind: Any, on_bad_row: Any, report: Report) -> Iterator[Group]:
    """Parse every row, then merge them; what is refused at once is refused here."""
    reader = SourceReader(source, kind, on_bad_row)
    return reader.groups(reader.rows(report), report)


def judged(report: Report) -> Report:
    """The report without the fields that the format does not read."""
    kept = Report()
    for entry, count in report.counts.items():
        if not entry.startswith("not read: "):
            kept.add(entry, report.examples[entry], count)
    return kept
