"""Keeps the results file of `gpu.py`, every measured line as soon as it is measured, and makes the page from it.

An entry is what was measured together. It has its part, its key, the run that it was measured in, and either rows
(each is one line of a table) or the reason why there are none: "missing" (a peer that is not installed) or "failed".
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from silva.engine.errors import UserError

NAME, PAGE = "results.json", "results.md"
# exit code of a part's process that cannot go on although a fresh one can
GO_ON = 75
Row = Mapping[str, Any]


class Record:
    """Holds `results.json` of a folder; one process at a time has it open.

    Attributes:
        folder: of the results.
        path: of the file.
        data: what the file holds.

    Raises:
        UserError: the folder cannot be written, or what lies there is no results file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / NAME
        self.data: dict[str, Any] = {"smoke": None, "device": None, "runs": [], "figures": {}, "entries": []}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = self.path.read_text(encoding="utf-8") if self.path.exists() else None
            if text is None:
                self.write()
        except OSError as error:
            raise UserError(f"--out: {folder} cannot be written ({error.strerror}); choose another") from None
        if text is not None:
            try:
                found = json.loads(text)
            except ValueError as error:
                raise UserError(
                    f"{self.path}: not JSON ({error}); move it away or choose another --out"
                ) from None
            if not isinstance(found, dict) or found.keys() != self.data.keys():
                raise UserError(
                    f"{self.path}: not a results file of this script; move it away or choose another --out"
                )
            self.data = found

    def begin(self, facts: Mapping[str, Any], *, smoke: bool, device: str) -> None:
        """Open a run; results of two devices, or of smoke and measurement, never stand in one file.

        Args:
            facts: what results depend on besides the code.
            smoke: whether it is a smoke run.
            device: its name.

        Raises:
            UserError: the file holds results of another device, or smoke and measurement would be mixed.
        """
        before = self.data["device"], self.data["smoke"]
        if before not in ((None, None), (device, smoke)):
            raise UserError(
                f"{self.path}: holds results of {before[0]}{' (smoke)' if before[1] else ''}, this is "
                f"{device}{' (smoke)' if smoke else ''}; choose another --out"
            )
        self.data |= {"device": device, "smoke": smoke}
        self.data["runs"].append(dict(facts))
        self.write()

    @property
    def run(self) -> int:
        """Return the number of the run that was opened last."""
        return len(self.data["runs"]) - 1

    def entries(self, part: str) -> list[dict[str, Any]]:
        """Return the entries of a part."""
        return [entry for entry in self.data["entries"] if entry["part"] == part]

    def rows(self, part: str) -> list[dict[str, Any]]:
        """Return the rows of all entries of a part."""
        return [row for entry in self.entries(part) for row in entry.get("rows", ())]

    def done(self, part: str, key: str) -> bool:
        """Return whether a line has been measured, or has already been tried in this run."""
        found = (entry for entry in self.entries(part) if entry["key"] == key)
        return any(("failed" not in e and "rows" in e) or e["run"] == self.run for e in found)

    def add(self, part: str, key: str, **what: Any) -> None:
        """Add an entry with `rows`, `missing` or `failed`; it replaces an entry of the same key."""
        entry = {"part": part, "key": key, "run": self.run, **what}
        self.data["entries"] = [*self._without(part, key), entry]
        self.write()

    def drop(self, part: str, key: str) -> None:
        """Remove an entry."""
        self.data["entries"] = self._without(part, key)
        self.write()

    def _without(self, part: str, key: str) -> list[dict[str, Any]]:
        return [entry for entry in self.data["entries"] if (entry["part"], entry["key"]) != (part, key)]

    def forget(self, parts: Sequence[str]) -> None:
        """Remove all entries of some parts."""
        self.data["entries"] = [entry for entry in self.data["entries"] if entry["part"] not in parts]
        self.write()

    def write(self) -> None:
        """Replace the file as a whole, so that a kill leaves the old one or the new one."""
        draft = self.folder / f".{NAME}.new"
        with draft.open("w", encoding="utf-8") as file:
            json.dump(self.data, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.path)


# ---------------------------------------------------------------- the page


def page(record: Record, titles: Mapping[str, str]) -> str:
    """Return the whole record as markdown.

    Args:
        record: the results.
        titles: of the parts, in their order.
    """
    data = record.data
    lines = [f"# Silva on {data['device']}", ""]
    if data["smoke"]:
        lines += [
            "**A smoke run: it only shows that the script runs. Times and ratios below mean nothing.**",
            "",
        ]
    for number, facts in enumerate(data["runs"]):
        lines.append(f"- run {number}: " + ", ".join(f"{name} {value}" for name, value in facts.items()))
    for part, title in titles.items():
        entries = record.entries(part)
        if entries:
            lines += ["", f"## {title}", ""]
            for rows in tables([row for entry in entries for row in entry.get("rows", ())]):
                lines += [*markdown(rows), ""]
            for why in ("missing", "failed"):
                lines += [f"- {why}: {e['key']}: {e[why]}" for e in entries if why in e]
    if data["figures"]:
        lines += ["", "## Figures", "", *(f"- {name}: {text(v)}" for name, v in data["figures"].items())]
    return "\n".join(lines) + "\n"


def tables(rows: Sequence[Row]) -> list[list[Row]]:
    """Group the rows that have the same "table", in the order in which tables begin."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(row.get("table"), []).append(row)
    return list(found.values())


def markdown(rows: Sequence[Row]) -> list[str]:
    """Return the lines of one table."""
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name != "table"]
    lines = [f"**{rows[0]['table']}**", ""] if "table" in rows[0] else []
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(text(row.get(name, "")) for name in columns) + " |" for row in rows]


def text(value: Any) -> str:
    """Return the text of one cell."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return str(value).replace("|", "/").replace("\n", " ")
