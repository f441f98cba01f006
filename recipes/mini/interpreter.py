"""Executes actions in a real Python interpreter: one worker process, a fresh namespace per action.

Imported, this file gives `Interpreter`. Run as a script, it is the worker that `Interpreter` talks to, and so it
needs nothing but the standard library.
"""

import contextlib
import io
import json
import subprocess
import sys
import threading
from fractions import Fraction


class Interpreter:
    """Executes code in a worker process and returns what it printed; it is to be used as a context manager.

    The worker is isolated (`-I`) from the environment and the user's packages, so output depends on the code alone.

    Attributes:
        timeout_seconds: the longest time that one piece of code may take.
    """

    def __init__(self, timeout_seconds: float = 10.0) -> None:
        self.timeout_seconds = timeout_seconds
        self._worker: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Interpreter":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def run(self, code: str) -> str:
        """Return what the interpreter prints for `code`, without newlines at the end.

        After an exception the text ends with the last line of its traceback, such as "NameError: name 'x' is not
        defined". The rest is left out, because frames and "Did you mean" hints differ between Python versions.

        Raises:
            TimeoutError: the code takes longer than the limit (or ends the worker); the next call starts a new worker.
        """
        worker = self._worker or self._start()
        assert worker.stdin is not None
        assert worker.stdout is not None
        timer = threading.Timer(self.timeout_seconds, worker.kill)
        timer.start()
        try:
            worker.stdin.write(json.dumps(code) + "\n")
            worker.stdin.flush()
            reply = worker.stdout.readline()
        finally:
            timer.cancel()
        if not reply:
            self._stop()
            raise TimeoutError(f"no answer from the interpreter within {self.timeout_seconds} s: {code!r}")
        printed: str = json.loads(reply)
        return printed.rstrip("\n")

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-I", __file__]
        self._worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self._worker

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None


def code_of(action: str) -> str:
    """Return the Python code of an action: the text of its one ```python fence."""
    return action.split("```python\n", 1)[1].split("```", 1)[0]


def is_correct(printed: str, answer: Fraction) -> bool:
    """Tell whether the last printed line is a number equal to `answer`, exactly ("12.0" is 12, "7.5" is 15/2)."""
    try:
        return Fraction(printed.rsplit("\n", 1)[-1]) == answer
    except ValueError:
        # nothing was printed, or an error message
        return False


def _execute(code: str) -> str:
    """Run `code` in a fresh namespace; return what it printed and, after an exception, the exception's last line."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            exec(compile(code, "<action>", "exec"), {"__name__": "__main__"})
        except Exception as error:
            # any error of the executed code belongs to its output
            print(f"{type(error).__name__}: {error}")
    return printed.getvalue()


def _serve() -> None:
    """Serve as the worker: one JSON string of code per line in, one JSON string of output per line out."""
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_execute(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
