"""A model and rows that the tests of this folder train on; a test may have others of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("rows") / "sft.jsonl", tiny.rows("sft", 9))
