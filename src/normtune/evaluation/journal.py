"""The answers of an evaluation as they come: in memory to be scored, and on disk so that it can be interrupted.

Scope: `journal.jsonl`, first a line of settings, then a line per batch, each on disk before the next batch is asked. A
line that was cut off by a crash is dropped with its batch. Not here: the official formats (`formats`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from normtune.errors import InputError
from normtune.evaluation.answering import TIE, Answer
from normtune.evaluation.questions import Asked
from normtune.runlog import lock, sync_folder, wrapped_disk_errors

NAME = "journal.jsonl"
FORMAT = 1
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_BEGINNING = json.dumps({"format": FORMAT, "settings": {}}).encode()[:-2]


class Given:
    """The answers to the questions of one benchmark so far; `place in given` says whether one is there."""

    def __init__(self, count: int) -> None:
        self.texts: list[str | None] = [None] * count
        self.ties: list[int] = []
        self._same: dict[str, str] = {}

    def __contains__(self, place: object) -> bool:
        return isinstance(place, int) and self.texts[place] is not None

    def __len__(self) -> int:
        return sum(text is not None for text in self.texts)

    def add(self, place: int, answer: Answer) -> None:
        self.put(place, answer.text, answer.margin < TIE)

    def put(self, place: int, text: str, tie: bool) -> None:
        if tie:
            self.ties.append(place)
        self.texts[place] = self._same.setdefault(text, text) if len(text) < 20 else text  # "Yes" is one object

    def complete(self) -> list[str]:
        return [text for text in self.texts if text is not None]


class Journal:
    """The journal in `folder`; `given` are the answers in it, by benchmark. Open it with `Journal.open`."""

    def __init__(self, file: IO[bytes], path: Path, asked: Sequence[Asked]) -> None:
        self.file, self.path = file, path
        self.given = {one.name: Given(len(one)) for one in asked}
        self.items = {one.name: one.items for one in asked}

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path, settings: Mapping[str, Any], asked: Sequence[Asked]) -> Iterator[Journal]:
        """A new journal, or the one that is there, with the answers in it.

        InputError: it was written under other settings, by another version, or is being written by another process;
            nothing can be written there.
        JobError: the disk is full."""
        path = folder / NAME
        make_folder(folder)
        with wrong_place(path):
            file = path.open("ab+")
        with file:
            lock(
                file.fileno(), f"{path} is being written by another evaluation.\nWait for it, or choose another --out."
            )
            journal = cls(file, path, asked)
            if not journal._recover(settings):
                journal._write({"format": FORMAT, "settings": settings})
                sync_folder(folder)
            yield journal

    def add(self, name: str, batch: Sequence[tuple[int, Answer]]) -> None:
        """Writes the answers of a batch; when this returns they are on disk."""
        records = []
        for place, answer in batch:
            record: dict[str, Any] = {"id": self.items[name][place].id, "answer": answer.text}
            if answer.margin < TIE:
                record["tie"] = True
            if answer.log_probabilities is not None:
                record["log_probabilities"] = answer.log_probabilities
            records.append(record)
        self._write({"benchmark": name, "answers": records})

    def _write(self, record: dict[str, Any]) -> None:
        with wrapped_disk_errors(self.path):
            self.file.write(json.dumps(record).encode() + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())

    def _recover(self, settings: Mapping[str, Any]) -> bool:
        """Reads what is there and cuts off a torn last line; whether there were settings, which are checked."""
        places: dict[str, dict[str, int]] = {}
        good, found = 0, False
        for record, end in _complete_lines(self.file, self.path):
            if not found:
                _check_same(settings, record, self.path)
                found = True
            else:
                places = places or {n: {item.id: k for k, item in enumerate(own)} for n, own in self.items.items()}
                _take(record, places, self.given, self.path)
            good = end
        with wrapped_disk_errors(self.path):
            self.file.truncate(good)
            self.file.seek(0, os.SEEK_END)
        return found


@contextlib.contextmanager
def wrong_place(path: Path) -> Iterator[None]:
    """InputError for a path at which nothing can be written (below a file, no permission, too long a name); JobError,
    as elsewhere, where the disk is full or broken."""
    with wrapped_disk_errors(path):
        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
                raise
            raise InputError(f"cannot write {path}: {error.strerror or error}.\nChoose another --out.") from None


def make_folder(folder: Path) -> None:
    """The folder with those above it. InputError or JobError, as `wrong_place`."""
    with wrong_place(folder):
        folder.mkdir(parents=True, exist_ok=True)


def read_answers(folder: Path) -> dict[str, dict[str, str]]:
    """The answers in the journal of a folder: {benchmark: {id: text}}. InputError where none can be read."""
    try:
        with (folder / NAME).open("rb") as file:
            records = [record for record, _ in _complete_lines(file, folder / NAME)]
    except OSError as error:
        raise InputError(
            f"{folder / NAME}: {error.strerror}; a comparison needs the answers behind a result.\n"
            "Keep the folder of predictions beside the result's file."
        ) from None
    found: dict[str, dict[str, str]] = {}
    for number, record in enumerate(records[1:], 2):
        try:
            for own in record["answers"]:
                found.setdefault(record["benchmark"], {})[own["id"]] = own["answer"]
        except (KeyError, TypeError):
            raise _damaged(folder / NAME, number, "compare with another result") from None
    return found


def _complete_lines(file: IO[bytes], path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Each line's record, and where it ends in the file; without a last line that a crash cut off.

    InputError for a whole line that is no record, and for a torn first line that no journal begins with."""
    file.seek(0)
    end = 0
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            if number == 1 and not line.startswith(_BEGINNING[: len(line)]):
                raise _damaged(path, number)
            return
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise _damaged(path, number)
        end += len(line)
        yield record, end


def _damaged(path: Path, number: int, otherwise: str = "choose another --out") -> InputError:
    return InputError(f"{path}: line {number} is damaged, or this is no journal.\nRemove {path.parent} or {otherwise}.")


def _take(
    record: dict[str, Any], places: Mapping[str, Mapping[str, int]], given: Mapping[str, Given], path: Path
) -> None:
    try:
        name = record["benchmark"]
        for own in record["answers"]:
            given[name].put(places[name][own["id"]], own["answer"], own.get("tie", False))
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}).\nRemove the folder {path.parent} to start anew.") from None


def _check_same(settings: Mapping[str, Any], record: dict[str, Any], path: Path) -> None:
    """InputError, with the settings that differ, unless the journal was written under the same ones."""
    before = record.get("settings")
    if record.get("format") != FORMAT or not isinstance(before, dict):
        raise InputError(f"{path} is not a journal of this version.\nRemove {path.parent} or choose another --out.")
    now = json.loads(json.dumps(settings))
    other = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if other:
        shown = ", ".join(
            f"{key} ({before.get(key)!r:.60} then, {now.get(key)!r:.60} now)" if key in ("limit", "mode") else key
            for key in other
        )
        raise InputError(
            f"{path.parent} holds answers under other settings; these differ: {shown}.\n"
            "Choose another --out, or remove that folder to start anew."
        )
