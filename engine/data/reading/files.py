"""Opens a data set and iterates over its rows: JSONL, JSON, Parquet, `datasets` folders, folders of files, the hub.

Rows are streamed; only a `.json` list is held as a whole. A row that cannot be read is still yielded, with its
problem, so that one bad line can be counted instead of ending the run.
"""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from silva.engine.errors import UserError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SPLIT_NAME = re.compile(r"(train|test|validation|valid|val|dev|eval)(?=[-_.]|$)")


@dataclass(frozen=True, slots=True)
class Row:
    """Holds one row.

    Attributes:
        origin: place of the row, such as "file:12"; rows and lines count from 1.
        fields: the row's fields by name; None where the row cannot be read.
        problem: the kind of fault of a row that cannot be read.
        detail: what was found in a row that cannot be read.
    """

    origin: str
    fields: dict[str, Any] | None
    problem: str = ""
    detail: str = ""


def open_rows(path: str, split: str) -> Iterator[Row]:
    """Find out what `path` is and return its rows.

    What cannot be opened is refused at once, before the first row is asked for.

    Args:
        path: a file, a folder of files, a folder written by `datasets`, or a name on the Hugging Face hub.
        split: names the part of a `datasets` folder or hub data set; in a folder of files it selects the files whose
            names begin with it, or all files when none is named after any split.

    Raises:
        UserError: nothing is there, the split does not exist, or a file is damaged or of unknown kind.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return _reader(place)(place, place.name)
    if place.is_dir():
        if _is_saved_dataset(place):
            return _saved_dataset(place, split)
        files = _files(place, split)
        return (row for file in files for row in _reader(file)(file, file.relative_to(place).as_posix()))
    if _HUB_NAME.fullmatch(path) and not _kind(place):
        return _numbered(_hub(path, split), path)
    raise _nothing_there(path)


def _kind(file: Path) -> str:
    """Return the known suffix that a file name ends with, or ""."""
    return next((suffix for suffix in READERS if file.name.endswith(suffix)), "")


def _reader(file: Path) -> Callable[[Path, str], Iterator[Row]]:
    suffix = _kind(file)
    if not suffix:
        raise UserError(f"data source {file}: unknown kind of file; use one of {', '.join(READERS)}")
    return READERS[suffix]


def fingerprint(path: str, split: str) -> str:
    """Compute the digest of everything that `open_rows(path, split)` reads.

    The digest is of the names and bytes of files, or it is the hub's own.

    Args:
        path: as in `open_rows`.
        split: as in `open_rows`.

    Raises:
        UserError: as in `open_rows`.
    """
    place = Path(path).expanduser()
    if place.is_file():
        _reader(place)
        files = [(place.name, place)]
    elif place.is_dir():
        saved = _is_saved_dataset(place)
        chosen = [f for f in sorted(place.rglob("*")) if f.is_file()] if saved else _files(place, split)
        files = [(file.relative_to(place).as_posix(), file) for file in chosen]
    elif _HUB_NAME.fullmatch(path) and not _kind(place):
        return str(_hub(path, split)._fingerprint)
    else:
        raise _nothing_there(path)
    digest = hashlib.blake2b(split.encode(), digest_size=16)
    for name, file in files:
        with file.open("rb") as content:
            digest.update(name.encode() + b"\0" + hashlib.file_digest(content, hashlib.blake2b).digest())
    return digest.hexdigest()


def _nothing_there(path: str) -> UserError:
    return UserError(f"data source {path}: there is no such file or folder; check data.*.path")


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file()


def _files(folder: Path, split: str) -> list[Path]:
    """List the data files of a folder that belong to `split`."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and _kind(file))
    files = [
        file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    # this file is the hub's description of a data set and holds no rows
    files = [file for file in files if file.name != "dataset_infos.json"]
    if not files:
        raise UserError(f"data source {folder}: the folder holds no file ending in {', '.join(READERS)}")
    named = {file: match[1] for file in files if (match := _SPLIT_NAME.match(file.name))}
    if named and len(named) < len(files):
        odd = next(file for file in files if file not in named)
        raise UserError(
            f"data source {folder}: {next(iter(named)).name} is named after a split and {odd.name} is not; "
            "name one file, or a folder whose files belong together"
        )
    if named:
        files = [file for file in files if re.match(rf"{re.escape(split)}(?=[-_.]|$)", file.name)]
    if not files:
        found = ", ".join(sorted(set(named.values())))
        raise UserError(
            f"data source {folder}: no file is named after split {split!r}; found {found}; set data.*.split"
        )
    return files


def _open_bytes(file: Path) -> IO[bytes]:
    if file.name.endswith(".gz"):
        return gzip.open(file, "rb")  # type: ignore[return-value]
    return file.open("rb")


def _json_lines(file: Path, name: str) -> Iterator[Row]:
    try:
        with _open_bytes(file) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _json_row(line, f"{name}:{number}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file}: the gzip file is damaged or cut short ({error}); fetch it again") from None


def _json_row(line: bytes, origin: str) -> Row:
    try:
        return _checked(json.loads(line), origin)
    except UnicodeDecodeError:
        return Row(origin, None, "the line is not UTF-8")
    except json.JSONDecodeError as error:
        return Row(origin, None, "the line is not JSON", f"{error.msg} at column {error.colno}")
    # the grammar is that of JSON, but a number is too long or the nesting too deep to be read
    except (ValueError, RecursionError) as error:
        return Row(origin, None, "the line cannot be read", _one_line(error))


def _checked(value: Any, origin: str) -> Row:
    if isinstance(value, dict):
        return Row(origin, value)
    return Row(origin, None, "the row is not an object with named fields", f"found {type(value).__name__}")


def _json_list(file: Path, name: str) -> Iterator[Row]:
    """Read a `.json` file: a list of objects, or JSON lines under the wrong name (then it starts with a brace)."""
    try:
        with _open_bytes(file) as content:
            head = content.read(4096).lstrip()
        if not head.startswith(b"["):
            yield from _json_lines(file, name)
            return
        with _open_bytes(file) as content:
            rows = json.load(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file}: the gzip file is damaged or cut short ({error}); fetch it again") from None
    # JSONDecodeError and UnicodeDecodeError are ValueErrors; RecursionError means that the nesting is too deep
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not a JSON list ({error}); JSON lines belong in a .jsonl file") from None
    for number, value in enumerate(rows, start=1):
        yield _checked(value, f"{name}:{number}")


def _parquet(file: Path, name: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for value in batch.to_pylist():
                number += 1
                yield Row(f"{name}:{number}", value)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{file}: cannot be read as Parquet ({error})") from None


READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".json": _json_list,
    ".json.gz": _json_list,
    ".parquet": _parquet,
}


def _saved_dataset(folder: Path, split: str) -> Iterator[Row]:
    """Read a folder written by `save_to_disk`: one data set, or one per split."""
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    # TypeError and KeyError mean that the files of `datasets` lack keys
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"data source {folder}: datasets cannot load it ({_one_line(error)})") from None
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise UserError(
                f"data source {folder}: no split {split!r}; it has {', '.join(found)}; set data.*.split"
            )
        found = found[split]
    return _numbered(found, folder.name)


def _hub(name: str, split: str) -> Any:
    """Load a data set of the Hugging Face hub; `datasets` caches what it has fetched."""
    import datasets

    try:
        return datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"data source {name}: no such file or folder here, and the Hugging Face hub did not give it as a "
            f"data set with split {split!r} ({_one_line(error)})"
        ) from None


def _numbered(rows: Any, name: str) -> Iterator[Row]:
    return (Row(f"{name}:{number}", dict(fields)) for number, fields in enumerate(rows, start=1))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
