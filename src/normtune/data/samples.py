"""Entries in LLaVA's format to samples.

Scope: what an entry must be, and what is wrong with one. Non-scope: reading files (entries.py, index.py), batches
(batches.py), how an image file becomes RGB (`images.py`).
Source: LLaVA's training format (Liu et al., 2023; Finetune_Custom_Data.md in its repository).

A sample is an object with `conversations` (from: human | gpt, value) or `messages` (role, content), and `image` or
`images`, names relative to the source's images folder, or neither. Each `<image>` in a user's turn is the place of
the next image; images without any `<image>` go before the first user's text, each as "<image>" and a line break, as
LLaVA does. Everything that can be checked without decoding an image is checked when the file is read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normtune.chat import PLACEHOLDER, Turn
from normtune.data.entries import Entry, kind_of
from normtune.errors import InputError
from normtune.images import find_image, image_names

KNOWN = 1 << 16  # images whose places are remembered: some ten megabytes

Find = Callable[[str, str], Path]  # the file of an image's name, for the sample that is named second

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Sample:
    """One conversation: at most a system turn, then user and assistant in turn, the assistant last."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[Path, ...]  # as many as there are "<image>" in the turns
    kind: str
    where: str  # for messages: "file.json, item 17 (id 'x')"


@dataclass(frozen=True)
class Scanned:
    """What an entry of a data file turned out to be: a sample, or why it is none."""

    where: str
    entry: Entry
    sample: Sample | None
    problem: InputError | None = None

    @property
    def reason(self) -> str:
        """The problem without `where`."""
        return str(self.problem or "").removeprefix(self.where).lstrip(":, ")


@dataclass(frozen=True)
class Form:
    """How the entries of a file become samples.

    Attributes:
        path: the file as messages name it.
        unit: what messages call an entry: item, line, row.
        folder: what names of images are relative to.
        kind: of its samples.
    """

    path: Path
    unit: str
    folder: Path | None
    kind: str

    def sample(self, entry: Entry, find: Find) -> Sample:
        """An entry, checked.

        Raises:
            InputError: naming the entry, for anything that is wrong in it, and as `find`.
        """
        if entry.problem is not None:
            raise entry.problem
        return _sample(entry.value, self.where(entry), self.kind, find)

    def again(self, entry: Entry) -> Sample:
        """The sample of an entry that `scan` has found good; its images are where they were then."""
        return self.sample(entry, lambda name, _: (self.folder or Path()) / os.path.normpath(name))

    def where(self, entry: Entry) -> str:
        """The name of an entry for messages: "file.json, item 17 (id 'x')"."""
        name = entry.value.get("id") if isinstance(entry.value, dict) else None
        return f"{self.path}, {self.unit} {entry.number}" + (f" (id {name!r})" if name is not None else "")

    def scan(self, entries: Iterable[Entry]) -> Iterator[Scanned]:
        """Each entry as a sample, or with what is wrong in it."""
        known: dict[str, Path] = {}  # one look at the disk, and one Path, for each image of many samples

        def find(name: str, where: str) -> Path:
            if name not in known:
                if len(known) >= KNOWN:
                    known.clear()
                known[name] = find_image(self.folder, name, where)
            return known[name]

        for entry in entries:
            where = self.where(entry)
            try:
                scanned = Scanned(where, entry, self.sample(entry, find))
            except InputError as error:
                scanned = Scanned(where, entry, None, error)
            yield scanned


def _sample(item: Any, where: str, kind: str, find: Find) -> Sample:
    """One entry, checked."""
    if not isinstance(item, dict):
        raise InputError(f"{where}: expected an object, found {kind_of(item)}")
    field = next((name for name in ("conversations", "messages") if item.get(name) is not None), None)
    if field is None:
        raise InputError(f"{where}: it has neither `conversations` nor `messages`")
    entries = item[field]
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{where}: `{field}` must be a list of turns, found {kind_of(entries)}")
    names = image_names(item, where)
    inline: list[str] = []
    turns = [_turn(entry, f"{where}, `{field}`, turn {n}", inline) for n, entry in enumerate(entries, 1)]
    if names and inline:
        raise InputError(f"{where}: it names images both in the sample and in the parts of its messages")
    names = names or inline
    turns = _with_images(turns, len(names), where)
    _check_order(turns, f"{where}, `{field}`")
    return Sample(str(item.get("id", where)), tuple(turns), tuple(find(name, where) for name in names), kind, where)


def _turn(entry: Any, where: str, images: list[str]) -> Turn:
    """One turn of either dialect; names of images in its parts are appended to `images`."""
    if not isinstance(entry, dict):
        raise InputError(f"{where}: expected an object, found {kind_of(entry)}")
    name = entry.get("from", entry.get("role"))
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise InputError(f"{where}: unknown role {name!r}; known are {', '.join(_ROLES)}")
    text = entry.get("value", entry.get("content"))
    if isinstance(text, list):
        text = "".join(_part(part, where, images) for part in text)
    if not isinstance(text, str):
        raise InputError(f"{where}: its text must be a string (or a list of parts), found {kind_of(text)}")
    if role != "user" and PLACEHOLDER in text:
        raise InputError(f"{where}: {PLACEHOLDER} stands in the {role}'s text; only a user's turn can hold images")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: half of a surrogate pair (\\u{ord(text[error.start]):04x}) is no text") from error
    return Turn(role, text)


def _part(part: Any, where: str, images: list[str]) -> str:
    """A part of a message's content as text, an image as "<image>" and a line break."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind != "image":
        raise InputError(f'{where}: a part must be {{"type": "text", "text": ...}} or {{"type": "image"}}')
    name = part.get("image", part.get("path"))
    if name is not None:
        if not isinstance(name, str) or not name:
            raise InputError(f"{where}: the image of a part must be a file name, found {kind_of(name)}")
        images.append(name)
    return f"{PLACEHOLDER}\n"


def _with_images(turns: list[Turn], images: int, where: str) -> list[Turn]:
    """The turns with as many "<image>" as there are images; see the module's docstring."""
    places = sum(turn.text.count(PLACEHOLDER) for turn in turns)
    if places == images:
        return turns
    if places:
        more = "more" if places > images else "fewer"
        raise InputError(f"{where}: {more} {PLACEHOLDER} than images: {places} in the text, {images} given")
    first = next((n for n, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None:
        raise InputError(f"{where}: it has images, but no turn of a user")
    return [Turn(t.role, f"{PLACEHOLDER}\n" * images + t.text) if n == first else t for n, t in enumerate(turns)]


def _check_order(turns: list[Turn], where: str) -> None:
    """InputError unless a user and the assistant alternate, after at most one system turn, and all say something."""
    offset = int(turns[0].role == "system")
    for number, turn in enumerate(turns, 1):
        expected = "system" if number <= offset else ("user", "assistant")[(number - offset - 1) % 2]
        if turn.role != expected:
            raise InputError(f"{where}, turn {number}: it is the {turn.role}'s; expected the {expected}'s")
        if not turn.text.strip():
            raise InputError(f"{where}, turn {number} ({turn.role}): its text is empty")
    if turns[-1].role != "assistant":
        raise InputError(f"{where}: its last turn is the {turns[-1].role}'s; the assistant's must follow")
