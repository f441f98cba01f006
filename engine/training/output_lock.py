"""Keeps two runs out of one folder: a file says which process uses it, and is renewed while that process lives.

Assumed of the file system, a shared one too: creating a file that must not exist and renaming a file are atomic, and
all hosts see a new modification time within seconds. Ages are taken by the file system's clock, not by the hosts'.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from silva.engine.errors import UserError

NAME = ".lock"
# seconds between two renewals, and after which a lock that was not renewed is taken over
RENEWED, STALE = 5.0, 60.0


class OutputLock:
    """Holds a folder while its context lasts.

    Args:
        folder: made if it does not exist.

    Raises:
        UserError: on entering, if another process uses the folder.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / NAME
        self._mine = {"host": socket.gethostname(), "pid": os.getpid(), "began": time.strftime("%F %T %Z")}
        self._ended = threading.Event()
        self._made = False
        self._renewing = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> OutputLock:
        self._made = not self._file.parent.exists()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        while not self._taken():
            self._remove_stale()
        self._renewing.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._renewing.join()
        if self._read() == self._mine:
            self._file.unlink(missing_ok=True)
        # a run that was refused leaves nothing behind; a folder that holds anything stays
        if self._made and not any(self._file.parent.iterdir()):
            self._file.parent.rmdir()

    def _taken(self) -> bool:
        try:
            number = os.open(self._file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(number, "w", encoding="utf-8") as file:
            file.write(json.dumps(self._mine) + "\n")
        return True

    def _read(self, file: Path | None = None) -> dict[str, Any] | None:
        """Return what the lock says; None if there is none, an empty dict if it is being written or damaged."""
        try:
            found = json.loads((file or self._file).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _remove_stale(self) -> None:
        """Remove the lock of a process that has ended; wait where only time can tell."""
        found = self._read()
        if found is None:
            return
        here = found.get("host") == self._mine["host"]
        if here and not _alive(found.get("pid")):
            self._take_away(found)
            return
        if here or self._age() < RENEWED * 3:
            who = f"process {found.get('pid')} on {found.get('host')}, since {found.get('began')}"
            raise UserError(
                f"{self._file.parent}: is used by another run ({who}); give this run another `output`, or wait. If "
                f"there is no such process, its lock {self._file} is taken over {STALE:.0f} seconds after it ended"
            )
        while self._read() == found and self._age() < STALE:
            time.sleep(0.5)
        if self._read() == found:
            self._take_away(found)

    def _take_away(self, found: dict[str, Any]) -> None:
        """Remove a lock by renaming it, which only one of several processes can; put another's back."""
        aside = self._file.with_name(f"{NAME}.{socket.gethostname()}.{os.getpid()}")
        try:
            self._file.rename(aside)
        except FileNotFoundError:
            return
        if self._read(aside) == found or self._file.exists():
            aside.unlink()
        else:
            aside.rename(self._file)

    def _age(self) -> float:
        """Return the seconds since the last renewal, by the file system's clock."""
        with tempfile.NamedTemporaryFile(dir=self._file.parent, prefix=f"{NAME}.now.") as now:
            try:
                return os.stat(now.name).st_mtime - self._file.stat().st_mtime
            except FileNotFoundError:
                return STALE

    def _renew(self) -> None:
        while not self._ended.wait(RENEWED):
            # gone with the folder, which a user may remove
            if self._read() == self._mine:
                os.utime(self._file)


def _alive(pid: object) -> bool:
    """Tell whether a process of this host lives; one that has ended and was not waited for does not."""
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return True
    return state not in ("Z", "X")
