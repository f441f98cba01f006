"""Ends in one line what a file system refuses: no space, no permission, no writing at all, too many open files."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from silva.engine.errors import UserError

# what a user can mend, and how; any other OSError may be a fault of the program, and keeps its traceback
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free space there, or choose another folder"),
    **dict.fromkeys((errno.EFBIG,), "the file system or a limit (ulimit -f) allows no file of this size"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder that can be written"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENXIO), "look at the disk or the network file system"),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG), "choose another path"),
}


def line(error: OSError, place: str | os.PathLike[str] | None = None) -> str | None:
    """Say in one line what a file system has refused; None if the error is of another kind.

    Args:
        error: of a library or of Python.
        place: the file or folder in use, for an error that does not name its file.
    """
    # the second one is the target of a copy or a renaming
    names = (error.filename2, error.filename)
    where = next((name for name in names if isinstance(name, (str, Path))), place)
    # numpy's, for a file of which only a part could be written
    if error.errno is None and place is not None:
        return f"{where}: cannot be written ({error}); look at disk space and permissions, then start again"
    if error.errno not in _REMEDIES:
        return None
    return f"{where or 'a file'}: {os.strerror(error.errno)}; {_REMEDIES[error.errno]}, then start again"


@contextlib.contextmanager
def named(place: str | os.PathLike[str], *others: type[Exception]) -> Iterator[None]:
    """Name the file or folder that the block writes in the error of a file system.

    Args:
        place: what is written.
        *others: exceptions that a library raises instead of OSError; their text is told.

    Raises:
        UserError: the file system has refused something that a user can mend.
    """
    try:
        yield
    except OSError as error:
        said = line(error, place)
        if said is None:
            raise
        raise UserError(said) from error
    except others as error:
        raise UserError(
            f"{place}: cannot be written ({error}); look at disk space and permissions"
        ) from error
