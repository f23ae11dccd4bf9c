"""What the benchmarks share: an item, a task, and readers of official files that name what is wrong in them.

Scope: plain records and JSON. Not here: images (they are opened when a model is asked) and any one
benchmark's rules.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normtune.errors import InputError


@dataclass(frozen=True)
class Item:
    """One question. `question` is the whole official prompt without the image's place; `answer` is what the
    scorer needs; `group` is the split, subtask or other stratum that scores are kept by."""

    id: str
    image: Path | None
    question: str
    answer: Any
    group: str = ""


def _answer_of(item: Item) -> Any:
    return item.answer


@dataclass(frozen=True)
class Task:
    """A benchmark. `load(data)` reads the official files below the folder `data`; `score(items, answers)`
    returns figures for JSON with the headline, 0 to 1, under `score`; `truth(item)` is what a reader of the
    predictions is shown as the reference."""

    load: Callable[[Path], list[Item]]
    score: Callable[[Sequence[Item], Sequence[str]], dict[str, Any]]
    max_new_tokens: int
    truth: Callable[[Item], Any] = _answer_of


def ratio(part: float, whole: float) -> float:
    """`part / whole`, and 0.0 where `whole` is 0: the official programs divide by zero there."""
    return part / whole if whole else 0.0


def mean(values: Sequence[float]) -> float:
    """The mean, and 0.0 of nothing."""
    return ratio(sum(values), len(values))


def paired(items: Sequence[Item], answers: Sequence[str]) -> Iterator[tuple[Item, str]]:
    """Items with their answers, position by position; InputError when the numbers differ (official scorers
    cut silently to the shorter one)."""
    if len(items) != len(answers):
        raise InputError(
            f"{len(answers)} answers for {len(items)} items.\nGive one answer per item, in the items' order."
        )
    return zip(items, answers, strict=True)


def read_text(path: Path) -> str:
    """The UTF-8 text of `path`; InputError when it is missing or not text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file.\nPut the benchmark's official file there.") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 text (byte {error.start}).\nDownload the file again or re-encode it as UTF-8."
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}.\nCheck its kind and permissions.") from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; InputError with line and column when it is not one."""
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise _not_json(path, error.lineno, error.colno, error.msg) from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not an object.\nUse the official file, unchanged.")
    return content


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every non-empty line's object with its place, "FILE, line N"; InputError when a line is not an object."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise _not_json(path, number, error.colno, error.msg) from None
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number}: not a JSON object.\nThe file is JSON Lines: one object per line.")
        yield f"{path}, line {number}", record


def field(record: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """`record[name]`, checked to be of `kind`; InputError that says `where` the field is missing or wrong."""
    if not isinstance(record, dict):
        raise InputError(f"{where}: a {type(record).__name__} where an object should be.\nUse the official file.")
    if name not in record:
        raise InputError(
            f"{where}: field '{name}' is missing.\nAdd it, or use the benchmark's official file unchanged."
        )
    value = record[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(k.__name__ for k in kinds)
        raise InputError(
            f"{where}: field '{name}' is {value!r:.60}, not {wanted}.\nCorrect it, or use the official file."
        )
    return value


def unique(items: list[Item], path: Path) -> list[Item]:
    """`items`, if no id occurs twice and there is one at all; InputError otherwise."""
    if not items:
        raise InputError(f"{path}: holds no item.\nUse the benchmark's official file.")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise InputError(f"{path}: id '{item.id}' occurs twice.\nRemove one of the two entries.")
        seen.add(item.id)
    return items


def _not_json(path: Path, line: int, column: int, message: str) -> InputError:
    return InputError(
        f"{path}, line {line}, column {column}: not JSON ({message}).\nRepair the line or download the file again."
    )
