"""Defines the exception that a user's mistake raises; its text is a whole, clear line."""


class UserError(Exception):
    """Reports bad input of any kind (recipe, data, checkpoint, layout).

    The message names the file and the row or key, what was found and what to do. The command-line programs print it as
    one line and exit with code 2.
    """


class Stopped(Exception):
    """Says that a run has stopped because it was asked to; started again, it goes on."""
