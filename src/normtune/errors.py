"""The two kinds of failure that a user sees; every module raises these and nothing imports more.

`InputError` is wrong input (exit code 2): the message says what is wrong, where, and what to do, in one
to three lines. `JobError` is a job that failed although its input was right (exit code 1).
"""

from __future__ import annotations


class NormtuneError(Exception):
    """Base of the errors whose message is meant for the user; the command line prints no traceback."""

    exit_code = 1


class InputError(NormtuneError, ValueError):
    """Wrong input: a recipe, a path, a file, an item, a name."""

    exit_code = 2


class JobError(NormtuneError, RuntimeError):
    """A job that could not finish: disk full, a loss that is not finite, gains that do not move."""

    exit_code = 1
