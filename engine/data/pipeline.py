"""Turns one data source into a folder of tokenized shards: reads rows once, and tokenizes trees in parallel.

1. *Reading* (one process): every row is parsed and appended to a spool file; files beside it say where each row lies
   and which rows belong to one tree. Rows of one tree need not be adjacent in the source.
2. *Tokenizing* (all cores): the trees, in the order of their first rows, are cut into shards by size; a worker merges
   the rows of a shard's trees, tokenizes them and writes one Arrow file.

The reading process takes about 200 bytes of memory per tree and 24 per row; a worker takes one shard. A run that was
killed continues with the shards that are missing. The folder's name is a digest of everything that its content depends
on, and the folder gets that name only when it is complete.
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

from silva.engine import digests, file_errors
from silva.engine.data import store
from silva.engine.data.encoding import Encoder, first_user, instructions
from silva.engine.data.reading.files import fingerprint
from silva.engine.data.reading.messages import quoted
from silva.engine.data.reading.parsed import Parsed
from silva.engine.data.reading.source import Group, SourceReader
from silva.engine.data.report import Report
from silva.engine.data.text.decontaminate import Decontaminator, Match, SourceWords
from silva.engine.errors import UserError
from silva.engine.progress import ProgressBar

if TYPE_CHECKING:
    from silva.engine.recipe.schema import Source

Say = Callable[[str], None]
# names every file's digest
DIGESTS = "digests.json"
# raised whenever the same input would give other shards
VERSION = 5
# parsed text of one shard; a worker holds one shard at a time, as objects that take about ten times as many bytes
SHARD_BYTES = 8 << 20
# rows between two updates of the progress bar
_READ_EVERY = 1000


@dataclass(frozen=True)
class SourceTask:
    """Holds what the tokens of one source depend on.

    Attributes:
        source: where the data lie, and how they are read.
        encoder: tokenizes the groups.
        decontaminator: leaves out instructions that are in a test set; None leaves out none.
    """

    source: Source
    encoder: Encoder
    decontaminator: Decontaminator | None = None

    @cached_property
    def reader(self) -> SourceReader:
        """Return the source's reader.

        Raises:
            UserError: keys of the source are invalid; see `SourceReader`.
        """
        return SourceReader(self.source, self.encoder.unit, self.encoder.settings.on_bad_row)

    @property
    def key(self) -> str:
        """Return the digest of data, tokenizer, template and settings; every byte of the source's files is read."""
        settings = self.encoder.settings
        parts = {
            "version": VERSION,
            "data": fingerprint(self.source.path, self.source.split),
            # without the keys that say how much of the source an epoch takes: that is decided later, by `mixture`
            "source": self.source.model_dump(exclude={"path", "count", "weight"}),
            "tokenizer": self.encoder.tokenizer.fingerprint,
            "unit": self.encoder.unit,
            "score": self.encoder.score,
            "settings": settings.model_dump(include={"row_length", "max_length", "too_long", "on_bad_row"}),
            "decontaminate": self.decontaminator.fingerprint if self.decontaminator else "",
        }
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def build(task: SourceTask, cache: Path, *, workers: int | None = None, say: Say | None = None) -> Path:
    """Return the folder of a source's shards, which is made unless it exists.

    Several processes may call this at once.

    Args:
        task: what the shards depend on.
        cache: the folder's parent.
        workers: number of processes that tokenize; None for one per core that this process may run on.
        say: told when the folder has to be made; if given, progress bars show on a terminal. The bytes of a folder that
            is there are compared with those that were written only then: one process of several does it.

    Raises:
        UserError: unreadable or malformed data (see `formats`, `encoding`), or a worker that was killed.
    """
    # invalid keys are refused before any byte of the source is read
    _ = task.reader
    folder = cache / task.key
    if say is not None and folder.is_dir():
        damaged = _damage(folder)
        if damaged is not None:
            say(f"damaged    {damaged}: is not what was written; the source is tokenized again")
            with file_errors.named(folder):
                shutil.rmtree(folder)
    if not folder.is_dir():
        with file_errors.named(cache):
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_suffix(".lock")):
                if not folder.is_dir():
                    _make(task, folder, workers or len(os.sched_getaffinity(0)), say)
    return folder


def shards(folder: Path) -> list[store.Shard]:
    """Return the shards of a finished folder, in reading order."""
    return [store.Shard.open(path) for path in sorted(folder.glob("*.arrow"))]


def report(folder: Path) -> Report:
    """Return what reading and tokenizing left out."""
    whole = Report()
    for path in sorted(folder.glob("*.report.json")):
        whole.merge(Report.from_json(path.read_text(encoding="utf-8")))
    return whole


def decontaminated(folder: Path) -> Iterator[str]:
    """Yield the instructions that were left out because they are in a test set, each as one line of JSON."""
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
            f"data source {task.source.path}: a tokenizing process was killed, most likely because memory ran out; "
            f"set data.workers below {workers}. Finished shards are kept in {work}"
        ) from None
    except UserError:
        # repairing the data or the settings changes the key, so this work could not be used again
        shutil.rmtree(work)
        raise
    for name in ("rows", "rows.npy", "shards.npy", "boilerplate.npy", "spooled"):
        (work / name).unlink()
    written = {path.name: _file_digest(path) for path in sorted(work.iterdir())}
    # with the folder's own name, so that another source's folder is not taken for it
    _write(work / DIGESTS, json.dumps({"key": folder.name, "files": written}, indent=1))
    work.rename(folder)


def _damage(folder: Path) -> Path | None:
    """Return the first file of a finished folder that is not what was written; None if all are."""
    try:
        found = json.loads((folder / DIGESTS).read_text(encoding="utf-8"))
        written = found["files"]
        if found["key"] != folder.name:
            return folder / DIGESTS
        return next(
            (
                folder / name
                for name in sorted({*written, *(path.name for path in folder.iterdir())} - {DIGESTS})
                if _file_digest(folder / name) != written.get(name)
            ),
            None,
        )
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError):
        return folder / DIGESTS


def _file_digest(path: Path) -> str | None:
    return digests.of_file(path) if path.is_file() else None


# ---------------------------------------------------------------- reading


def _spool(task: SourceTask, work: Path, *, visible: bool) -> None:
    """Parse every row and write it to the file `rows`.

    Beside it, `rows.npy` holds (n, 2) int64, the [start, stop) bytes of each row, sorted by tree; `shards.npy` holds
    where shards begin in `rows.npy`, as computed by `_cuts`.
    """
    found = Report()
    offsets, trees = array("q", [0]), array("q")
    numbers: dict[bytes, int] = {}
    words = SourceWords(task.decontaminator) if task.decontaminator else None
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
            if words is not None and tree not in numbers:
                words.add(parsed.instruction or first_user(parsed.conversations[0]))
            trees.append(numbers.setdefault(tree, len(numbers)))
            offsets.append(offsets[-1] + spool.write(_line(origin, parsed)))
    order = np.argsort(np.array(trees), kind="stable")
    lies = np.array(offsets)
    rows = np.stack([lies[:-1], lies[1:]], 1)[order]
    np.save(work / "rows.npy", rows)
    np.save(work / "shards.npy", _cuts(np.array(trees)[order], rows[:, 1] - rows[:, 0]))
    hashes = _say_boilerplate(words, task, found) if words is not None else []
    np.save(work / "boilerplate.npy", np.array(hashes, np.uint64))
    _write(work / "reading.report.json", found.to_json())
    _write(work / "spooled", "")


def _say_boilerplate(words: SourceWords, task: SourceTask, report: Report) -> list[int]:
    """Name the n-grams that say nothing about contamination, and return those of the source itself."""
    assert task.decontaminator is not None
    hashes, common = words.boilerplate()
    named = [(task.source.path, "instructions", each) for each in common]
    named += [(path, "test texts", each) for path, each in task.decontaminator.boilerplate]
    for path, what, each in named:
        entry = f"noted: taken for boilerplate and not for a test text: {quoted(each.text)}, in {path}"
        report.add(f"{entry}, of {each.texts} {what} in", path, each.having)
    return hashes


def _cuts(trees: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Compute where shards begin, and the end; a shard begins at the first tree after another `SHARD_BYTES` bytes.

    Args:
        trees: (n,) int64, the tree of each row, sorted.
        sizes: (n,) int64, the bytes of each row.

    Returns:
        (shards + 1,) int64, indices of rows.
    """
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

# set in each worker when it is forked
_worker_job: tuple[SourceTask, Path] | None = None


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
        # workers are forked, as torch's data loaders are: they inherit the tokenizer, and none of them uses a device
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(
            min(workers, len(missing)), context, initializer=_start_worker, initargs=(task, work)
        ) as pool:
            try:
                # results come in order, so the first error is that of the first row
                for _ in pool.map(_work, missing):
                    bar.advance()
            except UserError:
                pool.shutdown(cancel_futures=True)
                raise


def _start_worker(task: SourceTask, work: Path) -> None:
    global _worker_job
    # one thread per worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_job = task, work


def _work(number: int) -> None:
    assert _worker_job is not None
    _make_shard(*_worker_job, number)


def _make_shard(task: SourceTask, work: Path, number: int) -> None:
    """Tokenize the trees of one shard; its Arrow file appears last, and only when it is complete."""
    begin, end = np.load(work / "shards.npy")[number : number + 2].tolist()
    lies = np.load(work / "rows.npy", mmap_mode="r")[begin:end]
    ignored = frozenset(np.load(work / "boilerplate.npy").tolist())
    found, groups, removed = Report(), [], []
    with (work / "rows").open("rb") as spool:
        rows = (_parse_line(_read(spool, *place)) for place in lies.tolist())
        for group in task.reader.groups(rows, found):
            match = _in_a_test_set(group, task.decontaminator, ignored)
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


def _in_a_test_set(
    group: Group, decontaminator: Decontaminator | None, ignored: frozenset[int]
) -> Match | None:
    """Return the first match of any instruction of the group."""
    if decontaminator is None:
        return None
    matches = (decontaminator.match(each, ignored) for each in instructions(group))
    return next((match for match in matches if match is not None), None)


def _shard_path(work: Path, number: int) -> Path:
    return work / f"{number + 1:06d}.arrow"


def _read(file: IO[bytes], start: int, stop: int) -> bytes:
    file.seek(start)
    return file.read(stop - start)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
