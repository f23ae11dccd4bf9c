"""Answers to POPE in a file, joined to the labels.

Scope: the official form (JSON Lines of `answer`, in the labels' order, no id) and LLaVA's (`question_id` and `text`).
LLaVA's ids are its own: 1.. adversarial, 10000001.. random, 20000001.. popular. Which join was used is said in the
result.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normtune.errors import InputError
from normtune.tasks.files import add_prediction, field, read_json_lines
from normtune.tasks.items import Item, Joined, chosen, joined
from normtune.tasks.pope import SPLITS, read_labels, wording

_FIRST = {"adversarial": 1, "random": 10000001, "popular": 20000001}  # LLaVA's first id of each category

Record = tuple[str, dict[str, Any]]


def join(
    predictions: Sequence[Path], annotations: Sequence[Path], split: str | None = None, allow_missing: bool = False
) -> Joined:
    """Answers and labels: one file of answers for all label files, or as many as label files, split by split. With
    `split` the answers to it, whatever else is in the files; with `allow_missing` whole splits may be absent, too.

    Answers with a `question_id` are joined by it where the ids are the labels'; else as LLaVA's ids, by category and
    order. Answers without one are joined by position. InputError for anything else, and for missing, extra or
    repeated answers."""
    labels = {name: read_labels(path, name) for name, path in _label_files(annotations).items()}
    if split is not None:
        chosen([item for items in labels.values() for item in items], split, annotations[0])  # there is such a split
    files = [path for given in predictions for path in _files(given)]
    if len(files) == 1 and not (allow_missing and split is None and _is_one_split(files[0], labels)):
        return _join(files[0], labels, split, allow_missing)
    by_split = {_split_of(path): path for path in files}
    unlabelled, unanswered = set(by_split) - set(labels), set(labels) - set(by_split)
    if split is not None:
        unanswered &= {split}
    if len(by_split) != len(files) or unlabelled or (unanswered and not allow_missing):
        raise InputError(
            f"predictions of {', '.join(map(_split_of, files))} for labels of {', '.join(labels)}.\n"
            "Give one file for all of them, or one per split with random, popular or adversarial in its name."
        )
    wanted = [name for name in labels if name in by_split and split in (None, name)]
    if not wanted:
        raise InputError(f"{predictions[0]}: holds no answers to split '{split}'.\nGive the file of that split.")
    parts = [_join(by_split[name], {name: labels[name]}, None, allow_missing) for name in wanted]
    ways = ", ".join(dict.fromkeys(part.join for part in parts))
    items = [item for part in parts for item in part.items]
    absent = sum(part.absent for part in parts) + sum(len(labels[name]) for name in unanswered)
    return Joined(items, [answer for part in parts for answer in part.answers], absent, ways)


def _files(given: Path) -> list[Path]:
    """The POPE files of a folder; a file itself."""
    if not given.is_dir():
        return [given]
    found = [path for path in sorted(given.iterdir()) if path.suffix in (".json", ".jsonl")]
    found = [path for path in found if any(split in path.stem for split in SPLITS)]
    if not found:
        raise InputError(f"{given}: no file of random, popular or adversarial in it.\nGive POPE's files themselves.")
    return found


def _split_of(path: Path) -> str:
    return next((split for split in SPLITS if split in path.stem), path.stem)


def _is_one_split(path: Path, labels: dict[str, list[Item]]) -> bool:
    """Whether a file of answers is named after a labelled split and not longer than it."""
    name = _split_of(path)
    return name in labels and len(list(read_json_lines(path))) <= len(labels[name])


def _label_files(annotations: Sequence[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in (path for given in annotations for path in _files(given)):
        name = _split_of(path)
        if name in found:
            raise InputError(f"{path}: a second file of split '{name}', beside {found[name]}.\nGive each split once.")
        found[name] = path
    return found


def _join(path: Path, labels: dict[str, list[Item]], split: str | None, allow_missing: bool) -> Joined:
    """One file of answers, joined to all labels; of these the answers to `split`. A file that can hold no more than the
    split's answers, by its length and its name or its want of ids, is joined to the split's labels alone."""
    records = list(read_json_lines(path))
    if not records:
        raise InputError(f"{path}: holds no answer.\nGive the file that the model's answers were written to.")
    with_id = ["question_id" in record for _, record in records]
    if split is not None:
        own = labels[split]
        alone = len(records) <= len(own) and (split == _split_of(path) or not any(with_id))
        if not alone and len(labels) > 1:
            found = _join(path, labels, None, allow_missing or any(with_id))
            kept = {i.id: answer for i, answer in zip(found.items, found.answers, strict=True) if i.group == split}
            only = joined(own, kept, [item.id for item in own], path, by="question", allow_missing=allow_missing)
            return Joined(only.items, only.answers, only.absent, found.join)
        labels = {split: own}
    if not any(with_id):
        return _by_position(path, records, [i for items in labels.values() for i in items], allow_missing)
    if not all(with_id):
        raise InputError(
            f"{records[with_id.index(False)][0]}: no question_id, but other lines have one.\n"
            "Give all answers an id or none."
        )
    given: dict[str, str] = {}
    asked: dict[str, tuple[str, str]] = {}
    for where, record in records:
        text = field(record, "text" if "text" in record or "answer" not in record else "answer", str, where)
        key = field(record, "question_id", (int, str), where)
        if isinstance(key, str) and key.isdecimal():
            raise InputError(f"{where}: question_id is the text {key!r}.\nWrite it as a number, without quotes.")
        add_prediction(given, str(key), text, "question_id", where)
        asked[str(key)] = (where, wording(str(record.get("prompt") or record.get("question") or "")))
    return _by_id(path, given, asked, labels, allow_missing)


def _by_id(
    path: Path,
    given: dict[str, str],
    asked: dict[str, tuple[str, str]],
    labels: dict[str, list[Item]],
    allow_missing: bool,
) -> Joined:
    """The join by the labels' ids or LLaVA's; `asked` holds each answer's place and question, which may be empty."""
    items = [item for own in labels.values() for item in own]
    own_ids = [item.id.partition("/")[2] for item in items]
    within = len(set(own_ids)) == len(own_ids) and set(given) <= set(own_ids)
    llava = {str(first + place) for name, first in _FIRST.items() for place in range(len(labels.get(name, ())))}
    is_llava = set(labels) <= set(_FIRST) and set(given) <= llava
    if within and (allow_missing or len(given) == len(own_ids) or not is_llava):
        _check_wording(items, own_ids, asked)
        return joined(items, given, own_ids, path, by="question_id", allow_missing=allow_missing)
    if not is_llava:
        strange = sorted(given, key=lambda key: (key in own_ids, key in llava))[0]
        raise InputError(
            f"{path}: question_id {strange} and others are not the labels' ids, nor LLaVA's ({_numbering(labels)}).\n"
            "Give the label files of all splits that were asked, or answers with the labels' ids."
        )
    keys = [str(_FIRST[name] + place) for name, own in labels.items() for place in range(len(own))]
    _check_wording(items, keys, asked)
    way = "LLaVA's question_id: category and order"
    found = joined(items, given, keys, path, by="question_id", allow_missing=allow_missing)
    return Joined(found.items, found.answers, found.absent, way)


def _check_wording(items: list[Item], keys: list[str], asked: dict[str, tuple[str, str]]) -> None:
    """InputError for an answer that quotes another question than the one under its key: the two published versions
    number some questions differently."""
    for item, key in zip(items, keys, strict=True):
        where, question = asked.get(key, ("", ""))
        if question and not question.startswith(wording(item.question)):
            raise InputError(
                f"{where}: question_id {key} answers '{question:.60}', the labels ask '{wording(item.question):.60}'.\n"
                "Give the label files of the version that was asked (3,000 or 2,910 questions in random)."
            )


def _numbering(labels: dict[str, list[Item]]) -> str:
    known = [(name, _FIRST[name], len(own)) for name, own in labels.items() if name in _FIRST]
    return ", ".join(f"{name} {first}..{first + count - 1}" for name, first, count in known) or "no split of its"


def _by_position(path: Path, records: list[Record], items: list[Item], allow_missing: bool) -> Joined:
    """Official answers, line by line. The official program cuts silently to the shorter file."""
    count = len(records)
    if count > len(items) or (count < len(items) and not allow_missing):
        raise InputError(
            f"{path}: {count} answers for {len(items)} questions, and no question_id to join them by.\n"
            "Give one line per question in the label file's order"
            + (", or score the first ones with --allow-missing." if count < len(items) else ".")
        )
    places = {item.question.strip(): place for place, item in enumerate(items)}
    answers = []
    for place, (where, record) in enumerate(records):
        answers.append(field(record, "answer" if "answer" in record or "text" not in record else "text", str, where))
        asked = str(record.get("question", "")).strip()
        if asked in places and asked != items[place].question.strip():
            raise InputError(
                f"{where}: answers '{asked:.60}', but question {place + 1} is another one.\n"
                "Bring the answers into the label file's order."
            )
    return Joined(items[:count], answers, len(items) - count, "position")
