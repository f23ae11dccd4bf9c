"""Samples that a training leaves out: each named with its reason, never silently, and never too many.

Scope: the ledger behind `bad_samples: skip`, its file `RUN/skipped.jsonl`, and the bound `max_bad`. Non-scope: what is
wrong with a sample; that is found where it is read (samples.py), opened and tokenized (batches.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from normtune.errors import JobError
from normtune.recipe import Recipe
from normtune.runlog import append_line, read_lines

OnBad = Callable[[str, str], None]
"""`on_bad(where, why)`: which sample cannot be used, and why. Where it returns, the sample is left out."""


def policy(recipe: Recipe) -> OnBad | None:
    """For those who read a training's data without training on it: what it left out, they leave out unsaid."""
    return None if recipe.bad_samples == "error" else lambda where, why: None


class Skipped:
    """`skipped(where, why)` records a sample once, however often an epoch comes to it.

    Attributes:
        most: of samples that may be left out: a number (int), or a share of all samples (float).
        reasons: where -> why, of every sample that this process left out so far, and of those that others of the same
            training had left out when `keep` was called: an interrupted one too. The bound counts all of theirs.
    """

    def __init__(self, most: int | float) -> None:
        self.most = most
        self.reasons: dict[str, str] = {}
        self._total: int | None = None
        self._path: Path | None = None

    def __call__(self, where: str, why: str) -> None:
        """Records that a sample is left out. JobError when there are more of them than `most` allows."""
        if where in self.reasons:
            return
        self.reasons[where] = why
        if self._path is not None and where not in self._others():
            append_line(self._path, {"what": where, "why": why})
        self._check()

    def count(self, good: int) -> None:
        """Says how many samples were read well, once all files were: what a share is of. JobError as in a call."""
        self._total = good + len(self.reasons)
        self._check()

    def keep(self, path: Path) -> None:
        """Writes what was recorded so far, and from now on each further sample, as lines {"what", "why"} of a file.
        What an earlier process or another of the same training (`skipped.1.jsonl`) wrote there counts as recorded.
        JobError where it cannot be written."""
        self._path = path
        earlier = self._others() | written(path)
        for where, why in self.reasons.items():
            if where not in earlier:
                append_line(path, {"what": where, "why": why})
        self.reasons = earlier | self.reasons
        self._check()

    def _others(self) -> dict[str, str]:
        """What other processes of this training have written by now."""
        if self._path is None:
            return {}
        files = sorted(self._path.parent.glob(f"{self._path.name.partition('.')[0]}*.jsonl"))
        return {where: why for file in files if file != self._path for where, why in written(file).items()}

    def _check(self) -> None:
        if isinstance(self.most, int):
            allowed = self.most
        elif self._total is None:  # a share of what is not known yet
            return
        else:
            allowed = int(self.most * self._total)
        others = self._others()
        reasons = others | self.reasons if others else self.reasons
        if len(reasons) > allowed:
            where, why = list(reasons.items())[-1]
            of = "" if self._total is None else f" of {self._total:,}"
            files = "" if self._path is None else f"{self._path.parent}/skipped*.jsonl"
            raise JobError(
                f"{len(reasons):,} samples{of} cannot be used, and max_bad allows {allowed:,}; the last of them:\n"
                f"{where}: {why.partition(chr(10))[0]}\n`normtune data check RECIPE` lists them all."
                + (f" Once they are mended, remove {files}." if files else "")
            )


def written(path: Path) -> dict[str, str]:
    """Where -> why, of a ledger's file."""
    return {line["what"]: line["why"] for line in read_lines(path) if {"what", "why"} <= line.keys()}
