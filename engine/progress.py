"""Prints the lines and progress bars of a run, on its first process only."""

from __future__ import annotations

import os
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column


def is_first_process() -> bool:
    """Tell whether this process prints for the run; works before there is a process group."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print a line, on the first process only."""
    if is_first_process():
        print(text, flush=True)


def _fixed(width: int) -> Column:
    """Make a column that keeps its width on a narrow terminal, where the bar becomes shorter instead."""
    return Column(no_wrap=True, min_width=width)


class ProgressBar:
    """Shows how far a piece of work is, from entering the context to leaving it.

    Args:
        title: what the work is.
        total: its number of steps; without it, the bar only counts.
        visible: whether anything is shown.
        start: number of steps that are done already.
        passing: whether the bar is shown on terminals only, and removed at the end.
    """

    def __init__(
        self, title: str, total: int | None, *, visible: bool, start: int = 0, passing: bool = False
    ) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description:<20}", table_column=_fixed(20)),
            BarColumn(bar_width=None, table_column=Column(ratio=1, max_width=24)),
            MofNCompleteColumn(table_column=_fixed(2 * len(str(total or 0)) + 1)),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True, table_column=_fixed(5)),
            TextColumn("{task.fields[note]}", table_column=_fixed(38)),
            console=console,
            disable=not visible or (passing and not console.is_terminal),
            transient=passing,
        )
        self._task: TaskID = self._bar.add_task(title, total=total, completed=start, note="")

    def advance(self, note: str = "", *, steps: int = 1) -> None:
        """Count `steps` more as done, and show a note beside the bar."""
        self._bar.update(self._task, advance=steps, note=note)

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
