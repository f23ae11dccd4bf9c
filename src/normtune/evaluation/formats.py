"""Answers in the official prediction formats, in files that grow with the answers and that `normtune score` reads.

Scope: POPE's JSON Lines (a file per split), MME's result files (one per subtask), the results lists of VQA and COCO.
Answers are appended as they come; when all are there the files are written once more in the official order. Not here:
what an interrupted evaluation goes on from, which is the journal.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

from normtune.evaluation.journal import Given, make_folder
from normtune.evaluation.questions import Asked
from normtune.runlog import wrapped_disk_errors
from normtune.tasks import Item

_END = "\n]\n"
_BLANKS = dict.fromkeys(map(ord, "\t\n\v\f\r\x1c\x1d\x1e\x85\u2028\u2029"), " ")  # all that str.splitlines knows
Row = tuple[str, str]
"""A file's name and what is written there: a line of .jsonl or .txt, an element of a .json list."""


def _number(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _json(**record: Any) -> str:
    return json.dumps(record)


def _pope(item: Item, text: str) -> Row:
    key = _number(item.id.rpartition("/")[2])
    return f"coco_pope_{item.group}.jsonl", _json(question_id=key, question=item.question, answer=text)


def _mme(item: Item, text: str) -> Row:
    """The official program takes lines apart at tabs: a blank stands for each of them and for each line break. One for
    one, because answers are read from their first four characters."""
    image = item.image.name if item.image else item.id
    fields = (image, item.question, item.answer.capitalize(), text)
    return f"{item.group}.txt", "\t".join(field.translate(_BLANKS) for field in fields)


def _vqav2(item: Item, text: str) -> Row:
    return "results.json", _json(question_id=_number(item.id), answer=text)


def _caption(item: Item, text: str) -> Row:
    return "results.json", _json(image_id=_number(item.id), caption=text)


def _text(item: Item, text: str) -> Row:
    return "answers.jsonl", _json(question_id=item.id, answer=text)


ROWS: dict[str, Callable[[Item, str], Row]] = {
    "pope": _pope,
    "mme": _mme,
    "vqav2": _vqav2,
    "coco": _caption,
    "flickr30k": _caption,
    "text": _text,
}


class Predictions:
    """The prediction files of one benchmark in `folder`, beginning with the answers that are there already."""

    def __init__(self, folder: Path, asked: Asked, given: Given) -> None:
        self.folder, self.asked, self.given = folder, asked, given
        make_folder(folder)
        self._rewrite()

    def append(self, places: Iterable[int]) -> None:
        """The answers at `places`, at the end of their files."""
        for name, rows in self._rows(places).items():
            path = self.folder / name
            listed = path.suffix == ".json"
            with wrapped_disk_errors(path), path.open("ab+") as file:
                text = (",\n" if listed else "\n").join(rows)
                if listed and file.tell():
                    file.truncate(file.tell() - len(_END))  # the list stays closed and readable
                    text = ",\n" + text
                elif listed:
                    text = "[\n" + text
                file.write((text + (_END if listed else "\n")).encode())

    def finish(self) -> None:
        """All answers in the official order: POPE's program pairs by position, MME's lines of an image adjoin."""
        self._rewrite()

    def _rewrite(self) -> None:
        """Row by row, so that no file is held in memory."""
        with wrapped_disk_errors(self.folder), contextlib.ExitStack() as stack:
            files: dict[str, IO[str]] = {}
            for place, text in enumerate(self.given.texts):
                if text is None:
                    continue
                name, row = ROWS[self.asked.name](self.asked.items[place], text)
                listed = name.endswith(".json")
                if name not in files:
                    new = (self.folder / f".{name}.part").open("w", encoding="utf-8", newline="\n")
                    files[name] = stack.enter_context(new)
                    new.write("[\n" + row if listed else row)
                else:
                    files[name].write(",\n" + row if listed else "\n" + row)
            for name, file in files.items():
                file.write(_END if name.endswith(".json") else "\n")
                file.close()
                os.replace(self.folder / f".{name}.part", self.folder / name)

    def _rows(self, places: Iterable[int]) -> dict[str, list[str]]:
        files: dict[str, list[str]] = {}
        for place in places:
            name, row = ROWS[self.asked.name](self.asked.items[place], self.given.texts[place] or "")
            files.setdefault(name, []).append(row)
        return files
