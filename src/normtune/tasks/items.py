"""What the benchmarks share: an item, a task, its measurement, and predictions joined to items.

Scope: plain records. Not here: reading files (`files`), images (they are opened when a model is asked) and any one
benchmark's rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from normtune.errors import InputError, did_you_mean
from normtune.tasks.bootstrap import Statistics, intervals

Rules = Literal["official", "lmms-eval"]
RULES: tuple[Rules, ...] = ("official", "lmms-eval")


@dataclass(frozen=True, slots=True)
class Item:
    """One question. `question` is the whole official prompt without the image's place; `answer` is what the
    scorer needs; `group` is the split, subtask or other stratum that scores are kept by."""

    id: str
    image: Path | None
    question: str
    answer: Any
    group: str = ""

    @property
    def unit(self) -> str:
        """What is resampled as one: the image, or the item where there is none."""
        return self.id if self.image is None else str(self.image)


@dataclass(frozen=True)
class Measured:
    """Figures for JSON, with the headline (0 to 1) under `score`, and the sums that they come from."""

    scores: dict[str, Any]
    statistics: Statistics

    def with_intervals(self, seed: int = 0) -> dict[str, Any]:
        """The figures and, under `intervals`, the 95 % bootstrap interval of each."""
        return {**self.scores, "intervals": intervals(self.statistics, seed=seed)}


@dataclass(frozen=True)
class Joined:
    """Predictions of a file with the items that they answer. `absent` items had none; `join` says what was compared."""

    items: list[Item]
    answers: list[str]
    absent: int
    join: str


def _answer_of(item: Item) -> Any:
    return item.answer


@dataclass(frozen=True)
class Task:
    """A benchmark. `load(data, split=None)` reads the files below the folder `data`; `measure(items, answers, rules)`
    scores; `truth(item)` is what a reader of the predictions is shown as the reference. `join(predictions,
    annotations, split, allow_missing)` reads prediction files in the official format; None where there is none."""

    load: Callable[..., list[Item]]
    measure: Callable[..., Measured]
    max_new_tokens: int
    truth: Callable[[Item], Any] = _answer_of
    join: Callable[[Sequence[Path], Sequence[Path], str | None, bool], Joined] | None = None

    def score(self, items: Sequence[Item], answers: Sequence[str], rules: Rules = "official") -> dict[str, Any]:
        """The figures of `measure`. InputError for unknown rules, or when answers and items differ in number."""
        return self.measure(items, answers, rules).scores

    def reference(self, item: Item) -> str:
        """`truth` as one text: of several the first."""
        truth = self.truth(item)
        return str(truth[0] if isinstance(truth, list | tuple) else truth)


def check_rules(rules: str) -> None:
    """InputError unless `rules` is a name in RULES."""
    if rules not in RULES:
        raise InputError(f"rules '{rules}' are unknown{did_you_mean(rules, RULES)}.\nThere are {', '.join(RULES)}.")


def paired(items: Sequence[Item], answers: Sequence[str]) -> Iterator[tuple[Item, str]]:
    """Items with their answers, position by position; InputError when the numbers differ (official scorers
    cut silently to the shorter one)."""
    if len(items) != len(answers):
        raise InputError(
            f"{len(answers)} answers for {len(items)} items.\nGive one answer per item, in the items' order."
        )
    return zip(items, answers, strict=True)


def chosen(items: list[Item], split: str | None, where: Path) -> list[Item]:
    """The items whose group is `split`, all of them without one; InputError, with the splits there are, for none."""
    if split is None:
        return items
    found = [item for item in items if item.group == split]
    if not found:
        raise no_split(split, [item.group for item in items], where)
    return found


def no_split(split: str, known: Sequence[str], where: Path) -> InputError:
    """The error for a split that is not there."""
    names = list(dict.fromkeys(known))
    return InputError(f"{where}: no split '{split}'{did_you_mean(split, names)}.\nThere are {', '.join(names)}.")


def joined(
    items: Sequence[Item],
    given: Mapping[Any, str],
    keys: Sequence[Any],
    predictions: Path,
    *,
    by: str,
    allow_missing: bool,
) -> Joined:
    """Items with the prediction under each one's key, in the items' order.

    InputError for a prediction that belongs to no item and, unless `allow_missing`, for an item without one."""
    known = set(keys)
    extra = [key for key in given if key not in known]
    if extra:
        raise InputError(
            f"{predictions}: {by} {extra[0]!r} is not in the annotations ({len(extra)} such predictions).\n"
            "Give the annotations that belong to these predictions."
        )
    kept = [(item, given[key]) for item, key in zip(items, keys, strict=True) if key in given]
    absent = [key for key in keys if key not in given]
    if absent and not allow_missing:
        raise InputError(
            f"{predictions}: no prediction for {by} {absent[0]!r} ({len(absent)} of {len(keys)} are missing).\n"
            "Complete the file, or score what is there with --allow-missing."
        )
    if not kept:
        raise InputError(
            f"{predictions}: holds no prediction.\nGive the file that the model's answers were written to."
        )
    return Joined([item for item, _ in kept], [answer for _, answer in kept], len(absent), by)
