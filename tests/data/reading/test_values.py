"""Files whose values are damaged: every one of them is an error of its row, and files in unusual but clear shapes."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet
import pytest
import reading

from silva.engine.data.reading.files import open_rows
from silva.engine.data.report import Report
from silva.engine.errors import UserError
from silva.engine.recipe.schema import Source

ROW = {"prompt": "q", "chosen": "a", "rejected": "b"}


def read(path, form="preference", *, on_bad_row="refuse", report=None):
    source = Source(path=str(path), format=form)
    kind = "sequence" if form == "messages" else "comparison"
    return list(reading.groups(source, kind=kind, on_bad_row=on_bad_row, report=report or Report()))


def damaged(column: str) -> pa.Table:
    """Three rows; the second one's string in `column` is not UTF-8, and an unused column holds times out of range."""
    values = {name: [f"{value}{k}".encode() for k in range(3)] for name, value in ROW.items()}
    values[column][1] = b"\xff\xfe"
    arrays = {
        # a view, which does not look at the bytes
        name: pa.Array.from_buffers(pa.string(), 3, pa.array(items, pa.binary()).buffers())
        for name, items in values.items()
    }
    arrays["seen"] = pa.array([2**61] * 3, pa.int64()).cast(pa.timestamp("us"))
    return pa.table(arrays)


@pytest.mark.parametrize("column", list(ROW))
def test_a_parquet_value_that_is_no_text_is_its_rows_error(tmp_path, column):
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(damaged(column), path)
    with pytest.raises(UserError, match=rf"rows\.parquet:2: {column} cannot be converted: .*utf-8"):
        read(path)
    report = Report()
    assert len(read(path, on_bad_row="skip", report=report)) == 2
    assert report.lines() == [
        "not read: seen: 2 (first: rows.parquet:1)",
        f"skipped: {column} cannot be converted: 1 (first: rows.parquet:2)",
    ]


def test_a_time_out_of_range_is_an_error_only_where_it_is_read(tmp_path):
    path = tmp_path / "rows.parquet"
    table = pa.table(
        {name: [value] * 2 for name, value in ROW.items()} | {"seen": damaged("prompt")["seen"][:2]}
    )
    pyarrow.parquet.write_table(table, path)
    assert len(read(path)) == 1
    # without a list of fields, everything is converted
    rows = list(open_rows(str(path), "train"))
    assert [row.problem for row in rows] == ["seen cannot be converted"] * 2


def test_a_datasets_folder_with_damaged_values(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "saved"
    datasets.Dataset(damaged("chosen")).save_to_disk(folder)
    report = Report()
    assert len(read(folder, on_bad_row="skip", report=report)) == 2
    assert "skipped: chosen cannot be converted: 1 (first: saved:2)" in report.lines()


def test_nulls_with_which_arrow_pads_objects(tmp_path):
    """Arrow gives every call all arguments of all rows; a row's own absent ones are not null for the template."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a", "tool_calls": [{"name": name, "arguments": arguments}]},
            ]
        }
        for name, arguments in [("add", {"a": 1, "b": 2}), ("find", {"text": "x"})]
    ]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    found = [group.conversations[0][1].more()["tool_calls"] for group in read(path, "messages")]
    assert found == [row["messages"][1]["tool_calls"] for row in rows]
    del rows[1]["messages"][1]["content"]
    pyarrow.parquet.write_table(pa.Table.from_pylist([*rows, {"messages": [{"role": "user"}]}]), path)
    with pytest.raises(UserError, match=r"rows\.parquet:3: messages message content is null"):
        read(path, "messages")


@pytest.mark.parametrize(
    ("content", "count"),
    [
        (b"\xef\xbb\xbf" + json.dumps([ROW]).encode(), 1),
        (b"\n\n  \t" + b" " * 5000 + json.dumps([ROW]).encode(), 1),
        (json.dumps({"data": [ROW, ROW | {"prompt": "r"}], "version": 1}, indent=2).encode(), 2),
        (json.dumps({"data": [ROW]}).encode(), 1),
        (json.dumps(ROW, indent=2).encode(), 1),
        (b"\xef\xbb\xbf" + (json.dumps(ROW) + "\n").encode() + json.dumps(ROW | {"prompt": "r"}).encode(), 2),
    ],
)
def test_json_files_in_every_clear_shape(tmp_path, content, count):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    assert len(read(path)) == count


def test_a_json_file_that_is_one_conversation(tmp_path):
    path = tmp_path / "rows.json"
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path.write_text(json.dumps({"messages": said}, indent=2))
    assert len(read(path, "messages")) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (json.dumps({"train": [ROW], "test": [ROW]}, indent=2), r"holds 2 lists of rows \(train, test\)"),
        ("3", "holds a int; a list of objects is needed"),
        ('{"a": [', "not a JSON list"),
    ],
)
def test_json_files_that_are_not_clear(tmp_path, content, words):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        read(path)
    assert "\n" not in str(caught.value)
