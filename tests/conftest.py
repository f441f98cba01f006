"""Fixtures every test folder uses, and what a test run says about the tests that it skipped."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import own_inputs
import pytest

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Inputs:
    """A folder of data sets, tokenizers and a model, and whether they are the public ones."""

    folder: Path
    real: bool

    def __truediv__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="session")
def _own_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_inputs.make(tmp_path_factory.mktemp("own_inputs"))


@pytest.fixture(scope="session", params=["own", "public"])
def inputs(request: pytest.FixtureRequest) -> Inputs:
    """Small inputs of the project's own making, then public data sets nobody on this project wrote.

    The latter are not part of the project: they lie beside a checkout of its developers.
    """
    if request.param == "own":
        return Inputs(request.getfixturevalue("_own_inputs"), real=False)
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(
            "the public data sets are not beside this checkout; the same was tested on the project's own"
        )
    return Inputs(folder, real=True)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many tests were skipped and why, also where nobody asked for it."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    terminalreporter.write_sep("-", f"{len(skipped)} skipped")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:4}  {reason}")
