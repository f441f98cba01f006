"""Defines the exceptions that end a program in one whole, clear line, and how such a line shows a value."""


def shown(value: object) -> str:
    """Return a value as an error shows it: at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class UserError(Exception):
    """Reports bad input of any kind (recipe, data, checkpoint, layout).

    The message names the file and the row or key, what was found and what to do. The command-line programs print it as
    one line and exit with code 2.
    """


class Stopped(Exception):
    """Says that a run has stopped because it was asked to; started again, it goes on."""
