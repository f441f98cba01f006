"""One data source to a folder of tokenized shards: rows are read once, trees tokenized in parallel, kept on disk.

1. *Reading* (one process): every row is parsed and appended to a spool file; beside it stand where each row lies
   and which tree it belongs to. Rows of one tree need not be adjacent in the source.
2. *Tokenizing* (all cores): trees in order of their first rows are cut into shards by size; a worker merges the
   rows of a shard's trees, tokenizes them and writes one Arrow file.

Memory: about 200 bytes per tree and 24 per row in the reading process, one shard per worker. A killed run goes on
with the shards that are missing. The folder's name is a digest of everything its content depends on, and it gets
that name only when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from silva.engine.data import store
from silva.engine.data.encoding import Encoder, instructions
from silva.engine.data.reading.files import fingerprint
from silva.engine.data.reading.parsed import Parsed
from silva.engine.data.reading.source import Group, SourceReader
from silva.engine.data.report import Report
from silva.engine.data.text.decontaminate import Decontaminator, Match
from silva.engine.errors import UserError
from silva.engine.progress import ProgressBar

if TYPE_CHECKING:
    from silva.engine.recipe.schema import Source

Say = Callable[[str], None]
VERSION = 1  # raised whenever the same input would give other shards
SHARD_BYTES = (
    8 << 20
)  # parsed text of one shard: what a worker holds at a time, some ten times over in objects
_READ_EVERY = 1000  # rows between two updates of the progress bar


@dataclass(frozen=True)
class SourceTask:
    """What the tokens of one source depend on."""

    source: Source
    encoder: Encoder
    decontaminator: Decontaminator | None = None

    @cached_property
    def reader(self) -> SourceReader:
        """Return the source's reader; raises UserError where the source's keys cannot be meant."""
        return SourceReader(self.source, self.encoder.unit, self.encoder.settings.on_bad_row)

    @property
    def key(self) -> str:
        """Digest of data, tokenizer, template and settings; reads every byte of the source's files."""
        settings = self.encoder.settings
        parts = {
            "version": VERSION,
            "data": fingerprint(self.source.path, self.source.split),
            # how much of it an epoch takes is decided later
            "source": self.source.model_dump(exclude={"path", "count", "weight"}),
            "tokenizer": self.encoder.tokenizer.fingerprint,
            "unit": self.encoder.unit,
            "settings": settings.model_dump(
                include={"score", "row_length", "max_length", "too_long", "on_bad_row"}
            ),
            "decontaminate": self.decontaminator.fingerprint if self.decontaminator else "",
        }
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def build(task: SourceTask, cache: Path, *, workers: int | None = None, say: Say | None = None) -> Path:
    """The folder of a source's shards, made unless it is there. Several processes may call it at once.

    Args:
        cache: the folder's parent.
        workers: processes that tokenize; None: one per core this process may run on.
        say: told what is being done, where it is not there already; with it, progress bars show on a terminal.

    Raises:
        UserError: unreadable or malformed data (see `formats`, `encoding`), or a worker that was killed.
    """
    _ = task.reader  # keys that cannot be meant are refused before any byte of the source is read
    folder = cache / task.key
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _make(task, folder, workers or len(os.sched_getaffinity(0)), say)
    return folder


def shards(folder: Path) -> list[store.Shard]:
    """The shards of a finished folder, in reading order."""
    return [store.Shard.open(path) for path in sorted(folder.glob("*.arrow"))]


def report(folder: Path) -> Report:
    """What reading and tokenizing left out."""
    whole = Report()
    for path in sorted(folder.glob("*.report.json")):
        whole.merge(Report.from_json(path.read_text(encoding="utf-8")))
    return whole


def decontaminated(folder: Path) -> Iterator[str]:
    """JSON lines: the instructions that were left out for being in a test set."""
    for path in sorted(folder.glob("*.decontaminated.jsonl")):
        yield from path.read_text(encoding="utf-8").splitlines()


def _make(task: SourceTask, folder: Path, workers: int, say: Say | None) -> None:
    work = folder.with_suffix(".partial")
    work.mkdir(exist_ok=True)
    if say is not None:
        say(f"tokenizing {task.source.path}, kept in {folder}")
    try:
        if not (work / "spooled").is_file():
            _spool(task, work, visible=say is not None)
        _tokenize(task, work, workers, visible=say is not None)
    except BrokenProcessPool:
        raise UserError(
            f"data source {task.source.path}: a tokenizing process was killed, most likely for want of memory; "
            f"set data.workers below {workers}. What is finished stays in {work}"
        ) from None
    except UserError:
        shutil.rmtree(work)  # whatever mends it gives another key
        raise
    for name in ("rows", "rows.npy", "shards.npy", "spooled"):
        (work / name).unlink()
    work.rename(folder)


# ---------------------------------------------------------------- reading


def _spool(task: SourceTask, work: Path, *, visible: bool) -> None:
    """Parse every row into `rows`; `rows.npy` (n, 2): where each lies, sorted by tree; `shards.npy`: cuts in it."""
    found = Report()
    offsets, trees = array("q", [0]), array("q")
    numbers: dict[bytes, int] = {}
    with (
        (work / "rows").open("wb") as spool,
        ProgressBar("reading", None, visible=visible, passing=True) as bar,
    ):

        def watch(read: int) -> None:
            if read % _READ_EVERY == 0:
                bar.advance(steps=_READ_EVERY)

        for origin, parsed in task.reader.rows(found, watch=watch):
            name = parsed.group if task.reader.format.grouped else origin
            tree = hashlib.blake2b(name.encode(), digest_size=16).digest()
            trees.append(numbers.setdefault(tree, len(numbers)))
            offsets.append(offsets[-1] + spool.write(_line(origin, parsed)))
    order = np.argsort(np.array(trees), kind="stable")
    lies = np.array(offsets)
    rows = np.stack([lies[:-1], lies[1:]], 1)[order]
    np.save(work / "rows.npy", rows)
    np.save(work / "shards.npy", _cuts(np.array(trees)[order], rows[:, 1] - rows[:, 0]))
    _write(work / "reading.report.json", found.to_json())
    _write(work / "spooled", "")


def _cuts(trees: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where shards begin, and the end: at the first tree that begins after another `SHARD_BYTES`."""
    begins = np.flatnonzero(np.diff(trees, prepend=-1))
    before = np.cumsum(sizes) - sizes
    shard = before[begins] // SHARD_BYTES
    return np.append(begins[np.flatnonzero(np.diff(shard, prepend=-1))], len(trees))


def _line(origin: str, parsed: Parsed) -> bytes:
    return f"{json.dumps(origin)}\t{parsed.to_json()}\n".encode()


def _parse_line(line: bytes) -> tuple[str, Parsed]:
    origin, _, parsed = line.decode().partition("\t")
    return json.loads(origin), Parsed.from_json(parsed)


# ---------------------------------------------------------------- tokenizing

_worker_job: tuple[SourceTask, Path] | None = None  # set in each worker when it is forked


def _tokenize(task: SourceTask, work: Path, workers: int, *, visible: bool) -> None:
    """Make every shard that is missing."""
    count = len(np.load(work / "shards.npy")) - 1
    missing = [number for number in range(count) if not _shard_path(work, number).is_file()]
    done = count - len(missing)
    with ProgressBar("tokenizing", count, visible=visible, start=done, passing=True) as bar:
        if min(workers, len(missing)) < 2:
            for number in missing:
                _make_shard(task, work, number)
                bar.advance()
            return
        # Forked like torch's data loaders: the tokenizer is inherited, and no worker touches a device.
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(
            min(workers, len(missing)), context, initializer=_start_worker, initargs=(task, work)
        ) as pool:
            try:
                for _ in pool.map(_work, missing):  # in order, so the first error is that of the first row
                    bar.advance()
            except UserError:
                pool.shutdown(cancel_futures=True)
                raise


def _start_worker(task: SourceTask, work: Path) -> None:
    global _worker_job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker
    _worker_job = task, work


def _work(number: int) -> None:
    assert _worker_job is not None
    _make_shard(*_worker_job, number)


def _make_shard(task: SourceTask, work: Path, number: int) -> None:
    """Tokenize the trees of one shard; its Arrow file appears last, and whole."""
    begin, end = np.load(work / "shards.npy")[number : number + 2].tolist()
    lies = np.load(work / "rows.npy", mmap_mode="r")[begin:end]
    found, groups, removed = Report(), [], []
    with (work / "rows").open("rb") as spool:
        rows = (_parse_line(_read(spool, *place)) for place in lies.tolist())
        for group in task.reader.groups(rows, found):
            match = _in_a_test_set(group, task.decontaminator)
            if match is not None:
                found.skip(f"instruction is in test set {match.name}", group.origin)
                removed.append({"origin": group.origin, "test_set": match.name, "matched": match.text})
                continue
            tokenized = task.encoder(group, found)
            if tokenized is not None:
                groups.append(tokenized)
    path = _shard_path(work, number)
    _write(path.with_suffix(".report.json"), found.to_json())
    if removed:
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in removed)
        _write(path.with_suffix(".decontaminated.jsonl"), lines)
    partial = path.with_suffix(".writing")
    store.write(partial, groups)
    partial.rename(path)


def _in_a_test_set(group: Group, decontaminator: Decontaminator | None) -> Match | None:
    """The first match of any of the group's instructions; SFT data may fold a history into some of them."""
    if decontaminator is None:
        return None
    matches = map(decontaminator.match, instructions(group))
    return next((match for match in matches if match is not None), None)


def _shard_path(work: Path, number: int) -> Path:
    return work / f"{number + 1:06d}.arrow"


def _read(file: IO[bytes], start: int, stop: int) -> bytes:
    file.seek(start)
    return file.read(stop - start)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
