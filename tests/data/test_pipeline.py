"""The tokenized cache: the same trees as reading in memory, whatever the shards, workers, kills and neighbours."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import reading
import tiny

from silva.engine.data import pipeline
from silva.engine.data.dataset import scored
from silva.engine.data.encoding import Encoder
from silva.engine.data.reading import source as source_module
from silva.engine.data.report import Report
from silva.engine.data.text.chat import ChatTokenizer
from silva.engine.data.trees.group import TokenGroup
from silva.engine.errors import UserError
from silva.engine.recipe.schema import Data, Source


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> ChatTokenizer:
    folder = tiny.checkpoint(tmp_path_factory.mktemp("model"))
    return ChatTokenizer.load(str(folder), chat_template=None, add_bos=None, append_eos=True)


@pytest.fixture
def rows(tmp_path) -> Path:
    """Forty trees whose rows lie apart from each other."""
    found = tiny.rows("pair", 40)
    random.Random(0).shuffle(found)
    return tiny.write(tmp_path / "pair.jsonl", found)


def job(rows: Path, tokenizer: ChatTokenizer, **settings) -> pipeline.SourceTask:
    source = Source(path=str(rows), format="ultrainteract_pair", absolute=True)
    data = Data(train=[source], **({"row_length": 1024} | settings))
    return pipeline.SourceTask(
        source, Encoder(tokenizer, data, "comparison", scored(data, source, "comparison"))
    )


def in_memory(job: pipeline.SourceTask) -> tuple[list[TokenGroup], Report]:
    report = Report()
    rule = job.encoder.settings.on_bad_row
    read = reading.groups(job.source, kind=job.encoder.unit, on_bad_row=rule, report=report)
    tokenized = [job.encoder(group, report) for group in read]
    return [group for group in tokenized if group is not None], report


def trees(folder: Path) -> list[TokenGroup]:
    return [shard[k] for shard in pipeline.shards(folder) for k in range(len(shard))]


def assert_equal(found: list[TokenGroup], expected: list[TokenGroup]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for name in TokenGroup.__slots__:
            a, b = getattr(one, name), getattr(other, name)
            assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b, name
            assert not isinstance(a, np.ndarray) or a.dtype == b.dtype


@pytest.mark.parametrize(("shard_bytes", "workers"), [(1 << 20, 1), (2000, 1), (20_000, 3), (1, 2)])
def test_shards_hold_what_reading_in_memory_gives(
    rows, tokenizer, tmp_path, monkeypatch, shard_bytes, workers
):
    monkeypatch.setattr(pipeline, "SHARD_BYTES", shard_bytes)
    work = job(rows, tokenizer, max_length=300, too_long="drop")
    folder = pipeline.build(work, tmp_path / "cache", workers=workers)
    expected, report = in_memory(work)
    assert_equal(trees(folder), expected)
    assert pipeline.report(folder) == report
    assert report.counts
    assert len(pipeline.shards(folder)) == {1 << 20: 1, 1: 40}.get(shard_bytes, len(pipeline.shards(folder)))
    kept = {"".join(path.suffixes) for path in folder.iterdir()}
    assert kept <= {".arrow", ".report.json", ".json"}  # the spool is gone


def test_a_second_call_reads_the_cache(rows, tokenizer, tmp_path):
    folder = pipeline.build(job(rows, tokenizer), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert pipeline.build(job(rows, tokenizer), tmp_path) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_the_key_covers_what_the_tokens_depend_on(rows, tokenizer, tmp_path):
    base = job(rows, tokenizer)
    other_template = ChatTokenizer.load(
        str(tiny.checkpoint(tmp_path / "m")), chat_template="eurus", append_eos=False
    )
    (tmp_path / "fewer").mkdir()
    other_rows = tiny.write(tmp_path / "fewer" / "pair.jsonl", tiny.rows("pair", 39))
    keys = [
        base.key,
        job(rows, tokenizer, row_length=512).key,
        job(rows, tokenizer, score="all").key,
        job(rows, tokenizer, too_long="drop").key,
        job(rows, other_template).key,
        job(other_rows, tokenizer).key,
        pipeline.SourceTask(base.source.model_copy(update={"limit": 3}), base.encoder).key,
        pipeline.SourceTask(base.source.model_copy(update={"absolute": False}), base.encoder).key,
    ]
    assert len(set(keys)) == len(keys)
    # how much an epoch takes changes no token; neither does the place of the file
    assert pipeline.SourceTask(base.source.model_copy(update={"count": 3}), base.encoder).key == base.key
    moved = tmp_path / "elsewhere" / "pair.jsonl"
    moved.parent.mkdir()
    moved.write_bytes(rows.read_bytes())
    assert job(moved, tokenizer).key == base.key


def test_after_a_kill_only_missing_shards_are_made(rows, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "SHARD_BYTES", 20_000)
    work = job(rows, tokenizer)
    make = pipeline._make_shard

    def die_at_three(job: pipeline.SourceTask, folder: Path, number: int) -> None:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        make(job, folder, number)

    monkeypatch.setattr(pipeline, "_make_shard", die_at_three)
    with pytest.raises(UserError, match=r"data\.workers below 2"):
        pipeline.build(work, tmp_path, workers=2)
    partial = tmp_path / f"{work.key}.partial"
    finished = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.arrow")}
    assert finished

    def must_not_read(*_: object) -> None:
        raise AssertionError("the rows were read again")

    monkeypatch.setattr(pipeline, "_make_shard", make)
    monkeypatch.setattr(source_module, "open_rows", must_not_read)
    folder = pipeline.build(work, tmp_path, workers=2)
    assert {name: (folder / name).stat().st_mtime_ns for name in finished} == finished
    monkeypatch.undo()
    assert_equal(trees(folder), in_memory(work)[0])


def test_a_kill_while_reading_leaves_nothing_that_is_believed(rows, tokenizer, tmp_path, monkeypatch):
    work = job(rows, tokenizer)
    opened = source_module.open_rows

    def interrupted(*arguments):
        for number, row in enumerate(opened(*arguments)):
            if number == 20:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(source_module, "open_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipeline.build(work, tmp_path)
    monkeypatch.undo()
    assert_equal(trees(pipeline.build(work, tmp_path)), in_memory(work)[0])


def test_two_processes_make_one_folder(rows, tokenizer, tmp_path):
    context = multiprocessing.get_context("fork")
    work = job(rows, tokenizer)
    both = [context.Process(target=pipeline.build, args=(work, tmp_path)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert_equal(trees(tmp_path / work.key), in_memory(work)[0])


def test_the_first_error_in_reading_order_is_told(rows, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "SHARD_BYTES", 1)
    with pytest.raises(UserError) as alone:
        pipeline.build(job(rows, tokenizer, max_length=200), tmp_path, workers=1)
    with pytest.raises(UserError) as together:
        pipeline.build(job(rows, tokenizer, max_length=200), tmp_path / "b", workers=3)
    assert "longer than the 200" in str(alone.value)
    assert str(alone.value) == str(together.value)


def test_a_source_of_which_nothing_is_left_says_why(tokenizer, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"no": 1}) + "\n")
    with pytest.raises(UserError, match=r"none of its 1 rows can be used: .*the row has no"):
        pipeline.build(job(bad, tokenizer, on_bad_row="skip"), tmp_path / "cache")
    bad.write_text("")
    with pytest.raises(UserError, match="holds no rows"):
        pipeline.build(job(bad, tokenizer, on_bad_row="skip"), tmp_path / "cache")
