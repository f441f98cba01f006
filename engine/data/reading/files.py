"""Opens a data set and iterates over its rows: JSONL, JSON, Parquet, `datasets` folders, folders of files, the hub.

Rows are streamed; only a `.json` list is held as a whole. A row that cannot be read is still yielded, with its
problem, so that one bad line can be counted instead of ending the run. Of Parquet files and `datasets`, only the fields
that are asked for are converted.
"""

import codecs
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from silva.engine.errors import UserError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Of one row as JSON, and of a JSON file that is held as a whole. A tree of a thousand long conversations has some
# megabytes; a line that gzip makes of nothing may have any number.
ROW_BYTES, WHOLE_BYTES = 1 << 28, 1 << 32
_SPLIT_NAME = re.compile(r"(train|test|validation|valid|val|dev|eval)(?=[-_.]|$)")


@dataclass(frozen=True, slots=True)
class Row:
    """Holds one row.

    Attributes:
        origin: place of the row, such as "file:12"; rows and lines count from 1.
        fields: the row's fields by name; None where the row cannot be read.
        problem: the kind of fault of a row that cannot be read.
        detail: what was found in a row that cannot be read.
        unread: fields that the row has and that were not asked for.
    """

    origin: str
    fields: dict[str, Any] | None
    problem: str = ""
    detail: str = ""
    unread: tuple[str, ...] = ()


# names of the fields that are read; None: all
Fields = frozenset[str] | None
Reader = Callable[[Path, str, Fields], Iterator[Row]]


def open_rows(path: str, split: str, fields: Fields = None) -> Iterator[Row]:
    """Find out what `path` is and return its rows.

    What cannot be opened is refused at once, before the first row is asked for.

    Args:
        path: a file, a folder of files, a folder written by `datasets`, or a name on the Hugging Face hub.
        split: names the part of a `datasets` folder or hub data set; in a folder of files it selects the files whose
            names begin with it, or all files when none is named after any split.
        fields: those that will be read; None: all. JSON rows have all of theirs anyway.

    Raises:
        UserError: nothing is there, the split does not exist, or a file is damaged or of unknown kind.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return _reader(place)(place, place.name, fields)
    if place.is_dir():
        if _is_saved_dataset(place):
            return _dataset(_saved_dataset(place, split), place.name, fields)
        files = [(file, file.relative_to(place).as_posix()) for file in _files(place, split)]
        return (row for file, name in files for row in _reader(file)(file, name, fields))
    if _HUB_NAME.fullmatch(path) and not _kind(place):
        return _dataset(_hub(path, split), path, fields)
    raise _nothing_there(path)


def _kind(file: Path) -> str:
    """Return the known suffix that a file name ends with, or ""."""
    return next((suffix for suffix in READERS if file.name.endswith(suffix)), "")


def _reader(file: Path) -> Reader:
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
    for file in files:
        if not _is_text(file.name):
            raise UserError(f"data source {folder}: the file name {file.name!r} is not UTF-8; rename it")
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


def _is_text(name: str) -> bool:
    """Tell whether a name can be written; of one that is not UTF-8, Python makes what it cannot write."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _open_bytes(file: Path) -> IO[bytes]:
    if file.name.endswith(".gz"):
        return gzip.open(file, "rb")  # type: ignore[return-value]
    return file.open("rb")


def _json_lines(file: Path, name: str, fields: Fields) -> Iterator[Row]:
    try:
        with _open_bytes(file) as lines:
            for number, line in enumerate(_bounded_lines(lines), start=1):
                if len(line) > ROW_BYTES:
                    yield Row(
                        f"{name}:{number}", None, "the line is too long", f"more than {ROW_BYTES:,} bytes"
                    )
                elif line.strip():
                    yield _json_row(line, f"{name}:{number}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file}: the gzip file is damaged or cut short ({error}); fetch it again") from None


def _bounded_lines(lines: IO[bytes]) -> Iterator[bytes]:
    """Yield every line; of a line that is too long only its beginning, one byte longer than it may be."""
    while line := lines.readline(ROW_BYTES + 1):
        yield line
        while line and not line.endswith(b"\n"):
            line = lines.readline(1 << 20)


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


def _json_file(file: Path, name: str, fields: Fields) -> Iterator[Row]:
    """Read a `.json` file: a list of rows, an object that holds such a list, one row, or JSON lines under this name."""
    try:
        if _is_lines(file):
            yield from _json_lines(file, name, fields)
            return
        with _open_bytes(file) as content:
            read = content.read(WHOLE_BYTES + 1)
        if len(read) > WHOLE_BYTES:
            raise UserError(
                f"{file}: has more than {WHOLE_BYTES:,} bytes, and is read as a whole; make it JSON lines"
            )
        whole = json.loads(read)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file}: the gzip file is damaged or cut short ({error}); fetch it again") from None
    # JSONDecodeError and UnicodeDecodeError are ValueErrors; RecursionError means that the nesting is too deep
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not a JSON list ({error}); JSON lines belong in a .jsonl file") from None
    for number, value in enumerate(_rows_of(whole, file), start=1):
        yield _checked(value, f"{name}:{number}")


def _is_lines(file: Path) -> bool:
    """Tell whether a `.json` file holds JSON lines: whether its second line that is not blank begins an object."""
    with _open_bytes(file) as lines:
        shown = (
            text for line in _bounded_lines(lines) if (text := line.removeprefix(codecs.BOM_UTF8).strip())
        )
        first, second = next(shown, b""), next(shown, b"")
    return first.startswith(b"{") and len(first) > 1 and second.startswith(b"{")


def _rows_of(whole: Any, file: Path) -> list[Any]:
    """Return the rows that a JSON value holds.

    Raises:
        UserError: it is neither a list nor an object, or an object that holds several lists of rows.
    """
    if isinstance(whole, list):
        return whole
    if not isinstance(whole, dict):
        raise UserError(f"{file}: holds a {type(whole).__name__}; a list of objects is needed")
    lists = [name for name, value in whole.items() if _is_rows(value)]
    if len(lists) > 1:
        raise UserError(
            f"{file}: holds {len(lists)} lists of rows ({', '.join(lists)}); write the one "
            "that is meant to its own file"
        )
    return whole[lists[0]] if lists else [whole]


def _is_rows(value: Any) -> bool:
    """Tell whether a value is a list of objects that are not messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and not {"role", "from"} & item.keys() for item in value)
    )


def _parquet(file: Path, name: str, fields: Fields) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        kept = [each for each in names if fields is None or each in fields]
        if not kept:
            # without a column there are no rows, and the error has to name a row
            kept = names
        others = tuple(each for each in names if each not in kept)
        yield from _arrow_rows(table.iter_batches(batch_size=1024, columns=kept), name, others)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: cannot be read as Parquet ({_one_line(error)})") from None


def _arrow_rows(batches: Iterable[Any], name: str, unread: tuple[str, ...]) -> Iterator[Row]:
    """Yield the rows of Arrow tables.

    Args:
        batches: tables or record batches.
        name: of the data set, for the rows' places.
        unread: what the data set has beside the tables' columns.
    """
    number = 0
    for batch in batches:
        columns = {each: _values(batch.column(each), each) for each in batch.schema.names}
        for k in range(batch.num_rows):
            number += 1
            row = {each: values[k] for each, values in columns.items()}
            bad = next((each for each, value in row.items() if isinstance(value, _Unreadable)), None)
            if bad is None:
                yield Row(f"{name}:{number}", row, unread=unread)
            else:
                yield Row(f"{name}:{number}", None, f"{bad} cannot be converted", row[bad].reason)


@dataclass(frozen=True)
class _Unreadable:
    """Stands for a value that Arrow cannot convert."""

    reason: str


def _values(column: Any, name: str) -> list[Any]:
    """Return the values of an Arrow column.

    Arrow gives all objects of a column the same keys, and null for those that an object does not have. Within tools and
    their calls, which templates write out as they are, such nulls are taken away again.
    """
    import pyarrow

    try:
        values = column.to_pylist()
    # a string that is not UTF-8, a time beyond Python's range
    except (ValueError, OverflowError, pyarrow.ArrowException):
        values = []
        for value in column:
            try:
                values.append(value.as_py())
            except (ValueError, OverflowError, pyarrow.ArrowException) as error:
                values.append(_Unreadable(_one_line(error)))
    if "struct" not in str(column.type):
        return values
    return [_unpadded(value, inside=name in _OPEN_OBJECTS) for value in values]


_OPEN_OBJECTS = ("tools", "tool_calls", "chat_template_kwargs")


def _unpadded(value: Any, *, inside: bool) -> Any:
    if isinstance(value, list):
        return [_unpadded(item, inside=inside) for item in value]
    if isinstance(value, dict):
        return {
            key: _unpadded(item, inside=inside or key in _OPEN_OBJECTS)
            for key, item in value.items()
            if item is not None or not inside
        }
    return value


READERS: dict[str, Reader] = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".json": _json_file,
    ".json.gz": _json_file,
    ".parquet": _parquet,
}


def _saved_dataset(folder: Path, split: str) -> Any:
    """Load a folder written by `save_to_disk`: one data set, or one per split."""
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    # whatever files with other keys and types lead to
    except Exception as error:
        raise UserError(f"data source {folder}: datasets cannot load it ({_one_line(error)})") from None
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise UserError(
                f"data source {folder}: no split {split!r}; it has {', '.join(found)}; set data.*.split"
            )
        found = found[split]
    return found


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


def _dataset(found: Any, name: str, fields: Fields) -> Iterator[Row]:
    """Yield the rows of a `datasets.Dataset`."""
    kept = [each for each in found.column_names if fields is None or each in fields] or found.column_names
    others = tuple(each for each in found.column_names if each not in kept)
    import pyarrow

    try:
        tables = found.select_columns(kept).with_format("arrow").iter(batch_size=1024)
        yield from _arrow_rows(tables, name, others)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"data source {name}: its files are damaged ({_one_line(error)}); fetch them again"
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
