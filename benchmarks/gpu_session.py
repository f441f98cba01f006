"""Provides what the processes of `gpu.py`'s parts share: lines measured once, a deadline, and facts of the machine."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.gpu_record import GO_ON, Record, Row
from silva.engine.errors import UserError

PACKAGES = ("megatron-core", "transformers", "triton", "numpy", "liger-kernel", "flash-attn", "flash-attn-4")


class Outcome(NamedTuple):
    """Holds rows that stay in the record although something failed.

    Attributes:
        rows: each is one line of a table.
        failed: what failed, or None.
    """

    rows: Sequence[Row]
    failed: str | None


class Session:
    """Measures the lines of one part in its process, until its deadline.

    Attributes:
        part: its name.
        smoke: whether it is a smoke run.
        record: the results file.
        until: the deadline, in seconds of the monotonic clock.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.part, self.smoke = arguments.part, arguments.smoke
        self.record = Record(arguments.out)
        self.until = time.monotonic() + arguments.seconds
        self._summary: Callable[[Sequence[Row]], Mapping[str, Any]] = lambda rows: {}

    @property
    def left(self) -> float:
        """Return the seconds that are left until the deadline."""
        return self.until - time.monotonic()

    def lines(self, key: str, measure: Callable[[], Sequence[Row] | Outcome]) -> bool:
        """Measure and record rows, unless they are there or the time is up.

        Whatever is raised is recorded as the line's failure, and the next line is tried: in this process, or in a new
        one where the GPU no longer answers this one.

        Args:
            key: of the line.
            measure: returns its rows.

        Returns:
            Whether the rows are in the record.
        """
        if not self.record.done(self.part, key):
            if self.left <= 0:
                self.record.add(self.part, key, failed="no time was left; run this part again")
                return False
            try:
                found = measure()
                failed = found.failed if isinstance(found, Outcome) else None
                rows = found.rows if isinstance(found, Outcome) else found
                self._add(key, rows=[*map(dict, rows)], **({"failed": failed} if failed else {}))
            except (Exception, SystemExit) as error:
                # a peer's failure is a line of the table, whatever it is
                traceback.print_exc()
                words = str(error).strip().splitlines() or [""]
                self._add(key, failed=f"{type(error).__name__}: {words[0]}"[:300])
                self._check_gpu()
        return any("rows" in e for e in self.record.entries(self.part) if e["key"] == key)

    def line(self, key: str, measure: Callable[[], Row]) -> bool:
        """Measure and record one row, as `lines` does."""
        return self.lines(key, lambda: [measure()])

    def missing(self, key: str, why: str) -> None:
        """Record a peer that cannot be measured here."""
        if not self.record.done(self.part, key):
            self._add(key, missing=why)

    def summarize(self, summary: Callable[[Sequence[Row]], Mapping[str, Any]]) -> None:
        """Have figures made of the part's rows now and after every line, so that they exist however the part ends."""
        self._summary = summary
        self._summarize()

    def _summarize(self) -> None:
        self.record.data["figures"] |= self._summary(self.record.rows(self.part))
        self.record.write()

    def _add(self, key: str, **what: Any) -> None:
        self.record.add(self.part, key, **what)
        self._summarize()
        for row in what.get("rows", [what]):
            words = (f"{n}={v:.4g}" if isinstance(v, float) else f"{n}={v}" for n, v in row.items())
            print(f"   {key}: {' '.join(words)}", flush=True)

    def _check_gpu(self) -> None:
        if torch.cuda.is_available():
            try:
                torch.cuda.empty_cache()
                torch.cuda.synchronize()
            except RuntimeError:
                # after an illegal access only another process can use the GPU
                sys.exit(GO_ON)


def begin(parts: Mapping[str, Callable[[Session], None]]) -> None:
    """Run the part that the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=list(parts))
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    parts[arguments.part](Session(arguments))


def version(name: str) -> str:
    """Return the version of an installed package, or "none"."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def facts() -> dict[str, Any]:
    """Return what results depend on besides the code."""
    found = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "cores": len(os.sched_getaffinity(0)),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.split()
        except (OSError, subprocess.TimeoutExpired):
            # nvidia-smi is not on every container's path, and a driver may not answer
            driver = []
        found |= {
            "driver": driver[0] if driver else "unknown",
            "GiB": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cudnn": torch.backends.cudnn.version(),
        }
    return found | {name: version(name) for name in PACKAGES}


def main() -> int:
    """Begin a run by writing the facts into the record.

    Returns:
        0; 2 after one line that says what is wrong with the request.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    try:
        if name == "cpu" and not arguments.smoke:
            raise UserError("torch finds no NVIDIA GPU here; --smoke proves the script on a CPU")
        Record(arguments.out).begin(facts(), smoke=arguments.smoke, device=name)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
