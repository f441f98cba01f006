"""Counts everything that did not reach training, so that nothing is dropped silently."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Report:
    """What was skipped or truncated, by reason, and the first place where each reason was met.

    counts: rows (or sequences) per entry; an entry reads "skipped: <reason>" or "truncated: <reason>".
    examples: entry -> first place, such as "train.jsonl:12".
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def skip(self, reason: str, where: str) -> None:
        """Counts one thing that was left out; `reason` is a class of rows, never the text of one row."""
        self._add(f"skipped: {reason}", where)

    def truncate(self, reason: str, where: str) -> None:
        """Counts one thing that was shortened."""
        self._add(f"truncated: {reason}", where)

    def lines(self) -> list[str]:
        """One line per reason, the most frequent first; empty when nothing was left out."""
        return [
            f"{entry}: {count} (first: {self.examples[entry]})" for entry, count in self.counts.most_common()
        ]

    def _add(self, entry: str, where: str) -> None:
        self.counts[entry] += 1
        self.examples.setdefault(entry, where)
