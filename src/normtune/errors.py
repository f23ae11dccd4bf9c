"""The two kinds of failure that a user sees; every module raises these; and the hint at a misspelt name.

`InputError` is wrong input (exit code 2): the message says what is wrong, where, and what to do, in one
to three lines. `JobError` is a job that failed although its input was right (exit code 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NormtuneError(Exception):
    """Base of the errors whose message is meant for the user; the command line prints no traceback."""

    exit_code = 1


class InputError(NormtuneError, ValueError):
    """Wrong input: a recipe, a path, a file, an item, a name."""

    exit_code = 2


class JobError(NormtuneError, RuntimeError):
    """A job that could not finish: disk full, a loss that is not finite, gains that do not move."""

    exit_code = 1


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` with the closest of `known`, or nothing: the end of a message about a name."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""
