"""Data files of any content: each row is read, counted as bad, or the file is refused in one short line."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from foreign import ANY, BYTES, changed, fuzz, refused_in_a_line, written
from hypothesis import given
from hypothesis import strategies as st

from silva.engine.data.reading import files
from silva.engine.data.reading.files import open_rows
from silva.engine.errors import UserError

ROWS = [{"prompt": "a", "chosen": "b", "rejected": f"{n}"} for n in range(20)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder that `datasets` has written: two splits."""
    folder = tmp_path_factory.mktemp("saved")
    whole = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": whole, "test": whole}).save_to_disk(folder)
    return folder


def copied(saved: Path, folder: Path) -> Path:
    return Path(shutil.copytree(saved, folder, dirs_exist_ok=True))


def all_rows(path: Path) -> list[files.Row]:
    files.fingerprint(str(path), "train")
    return list(open_rows(str(path), "train"))


@fuzz(120)
@given(data=st.data())
def test_a_saved_data_set_with_other_descriptions(data, saved, tmp_path):
    folder = copied(saved, tmp_path / "set")
    file = data.draw(st.sampled_from(sorted(folder.rglob("*.json"))))
    before = json.loads(file.read_text())
    file.write_text(
        written(data.draw(ANY) if data.draw(st.integers(0, 9)) == 0 else changed(data.draw, before))
    )
    refused_in_a_line(lambda: all_rows(folder))


@fuzz(60)
@given(data=st.data(), content=BYTES)
def test_a_saved_data_set_with_files_of_any_bytes(data, content, saved, tmp_path):
    folder = copied(saved, tmp_path / "set")
    chosen = [file for file in folder.rglob("*") if file.is_file()]
    data.draw(st.sampled_from(sorted(chosen))).write_bytes(content)
    refused_in_a_line(lambda: all_rows(folder))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl.gz", "rows.json.gz"])
@fuzz(80)
@given(place=st.integers(0, 4000), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_file(name, place, bit, cut, tmp_path):
    file = tmp_path / name
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    else:
        lines = "\n".join(map(json.dumps, ROWS)) if "jsonl" in name else json.dumps(ROWS)
        file.write_bytes(gzip.compress(lines.encode(), mtime=0))
    content = bytearray(file.read_bytes())
    place %= len(content)
    content[place] ^= 1 << bit
    file.write_bytes(content[:place] if cut else content)
    refused_in_a_line(lambda: all_rows(file))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.json.gz"])
@fuzz(40)
@given(content=BYTES)
def test_a_file_of_any_bytes(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    refused_in_a_line(lambda: all_rows(tmp_path / name))


# ---------------------------------------------------------------- what unpacks to more than it is


def test_a_line_that_is_too_long_is_a_bad_row_and_the_next_ones_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROW_BYTES", 1000)
    fits = json.dumps({"a": "b" * (1000 - len('{"a": ""}\n'))})
    lines = [fits, fits + " ", json.dumps({"a": "b" * 3_000_000}), '{"a": "c"}']
    for name, opened in (("rows.jsonl", open), ("rows.jsonl.gz", gzip.open)):
        with opened(tmp_path / name, "wt") as file:
            file.write("\n".join(lines))
        found = list(open_rows(str(tmp_path / name), "train"))
        assert [row.problem for row in found] == ["", *["the line is too long"] * 2, ""]
        assert [row.origin for row in found] == [f"{name}:{n}" for n in (1, 2, 3, 4)]
        assert found[1].detail == "more than 1,000 bytes"
        assert found[3].fields == {"a": "c"}


def test_the_last_line_may_be_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROW_BYTES", 1000)
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n' + "x" * 5_000_000)
    assert [row.problem for row in open_rows(str(tmp_path / "rows.jsonl"), "train")] == [
        "",
        "the line is too long",
    ]


@pytest.mark.parametrize("name", ["rows.json", "rows.json.gz"])
def test_a_json_file_that_is_too_large_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WHOLE_BYTES", 10_000)
    with (gzip.open if name.endswith("gz") else open)(tmp_path / name, "wt") as file:
        file.write(json.dumps([{"a": "b" * 10_000}]))
    with pytest.raises(UserError, match=r"rows.json.*has more than 10,000 bytes.*make it JSON lines"):
        all_rows(tmp_path / name)


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / b"train-\xff.jsonl".decode(errors="surrogateescape")).write_text("{}")
    with pytest.raises(UserError, match=r"the file name 'train-.udcff.jsonl' is not UTF-8; rename it"):
        all_rows(tmp_path)
