"""LLaVA JSON and JSONL files to samples, and mixtures of them.

Scope: read and check files, order samples by seed and epoch. Non-scope: batches (batches.py), how an image file
becomes RGB (`images.py`).
Source: LLaVA's training format (Liu et al., 2023; Finetune_Custom_Data.md in its repository).

A sample is an object with `conversations` (from: human | gpt, value) or `messages` (role, content), and `image` or
`images`, names relative to the source's images folder, or neither. Each `<image>` in a user's turn is the place of
the next image; images without any `<image>` go before the first user's text, each as "<image>" and a line break, as
LLaVA does. Everything that can be checked without decoding an image is checked when the file is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from normtune.chat import PLACEHOLDER, Turn
from normtune.errors import InputError
from normtune.images import find_image, image_names
from normtune.recipe import DataSource

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Sample:
    """One conversation: at most a system turn, then user and assistant in turn, the assistant last."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[Path, ...]  # as many as there are "<image>" in the turns
    kind: str
    where: str  # for messages: "file.json, item 17 (id 'x')"


def read_samples(source: DataSource) -> list[Sample]:
    """The first `source.limit` samples of a file, in its order.

    The data file and the images folder are relative to the current directory; `kind` defaults to the file's stem.

    Raises:
        InputError: the file is missing or no JSON (with line and column); a sample is malformed, its turns do not
            alternate, its images are missing or do not match its "<image>" (with item and id).
    """
    path = Path(source.path)
    folder = None if source.images is None else Path(source.images)
    if folder is not None and not folder.is_dir():
        raise InputError(f"{path}: there is no images folder {folder} (relative to the current directory)")
    samples: list[Sample] = []
    known: dict[str, Path] = {}  # one look at the disk, and one Path, for each image of many samples
    for item, where in _items(path):
        samples.append(_sample(item, where, source.kind or path.stem, folder, known))
        if len(samples) == source.limit:
            break
    if not samples:
        raise InputError(f"{path}: it holds no samples")
    return samples


def _items(path: Path) -> Iterator[tuple[Any, str]]:
    """The entries of a JSON list or a JSONL file, each with its name for messages."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"data file {path} (from the current directory) cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: it is not UTF-8 text (byte {error.start})") from error
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield from _named([_parse(line, path, number)], path, "line", number)
        return
    data = _parse(text, path, 1)
    if not isinstance(data, list):
        raise InputError(f"{path}: expected a list of samples, found {_kind(data)}")
    yield from _named(data, path, "item", 1)


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {first_line + error.lineno - 1}, column {error.colno}"
        hint = " (is it one object per line? Then name it .jsonl)" if error.msg == "Extra data" else ""
        raise InputError(f"{path}, {place}: no valid JSON: {error.msg}{hint}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists nested without end
        raise InputError(f"{path}: no usable JSON: {error}") from error


def _named(items: list[Any], path: Path, unit: str, first: int) -> Iterator[tuple[Any, str]]:
    for number, item in enumerate(items, first):
        name = item.get("id") if isinstance(item, dict) else None
        yield item, f"{path}, {unit} {number}" + (f" (id {name!r})" if name is not None else "")


def _sample(item: Any, where: str, kind: str, folder: Path | None, known: dict[str, Path]) -> Sample:
    """One entry, checked."""
    if not isinstance(item, dict):
        raise InputError(f"{where}: expected an object, found {_kind(item)}")
    field = next((name for name in ("conversations", "messages") if item.get(name) is not None), None)
    if field is None:
        raise InputError(f"{where}: it has neither `conversations` nor `messages`")
    entries = item[field]
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{where}: `{field}` must be a list of turns, found {_kind(entries)}")
    names = image_names(item, where)
    inline: list[str] = []
    turns = [_turn(entry, f"{where}, `{field}`, turn {n}", inline) for n, entry in enumerate(entries, 1)]
    if names and inline:
        raise InputError(f"{where}: it names images both in the sample and in the parts of its messages")
    names = names or inline
    turns = _with_images(turns, len(names), where)
    _check_order(turns, f"{where}, `{field}`")
    for name in names:
        if name not in known:
            known[name] = find_image(folder, name, where)
    return Sample(str(item.get("id", where)), tuple(turns), tuple(known[name] for name in names), kind, where)


def _turn(entry: Any, where: str, images: list[str]) -> Turn:
    """One turn of either dialect; names of images in its parts are appended to `images`."""
    if not isinstance(entry, dict):
        raise InputError(f"{where}: expected an object, found {_kind(entry)}")
    name = entry.get("from", entry.get("role"))
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise InputError(f"{where}: unknown role {name!r}; known are {', '.join(_ROLES)}")
    text = entry.get("value", entry.get("content"))
    if isinstance(text, list):
        text = "".join(_part(part, where, images) for part in text)
    if not isinstance(text, str):
        raise InputError(f"{where}: its text must be a string (or a list of parts), found {_kind(text)}")
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
            raise InputError(f"{where}: the image of a part must be a file name, found {_kind(name)}")
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


def _kind(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    names = {list: "a list", dict: "an object", str: "a string", bool: "true or false", type(None): "nothing"}
    return ("an empty list" if value == [] else "") or names.get(type(value), "a number")


class Mixture:
    """All files of a stage as one sequence of samples, `mixture[i]`.

    A file of n samples with weight w contributes round(w * n) of them to each epoch: all of them as often as that
    goes, and for the rest a subset that is drawn anew for each epoch. InputError as in `read_samples`, and for a
    weight that leaves nothing of a file.
    """

    def __init__(self, sources: Sequence[DataSource]) -> None:
        self.samples: list[Sample] = []
        self._parts: list[tuple[int, int, int]] = []  # first index, samples, samples per epoch
        for source in sources:
            samples = read_samples(source)
            wanted = round(source.weight * len(samples))
            if wanted == 0:
                raise InputError(f"{source.path}: weight {source.weight:g} of {len(samples)} samples leaves none")
            self._parts.append((len(self.samples), len(samples), wanted))
            self.samples += samples
        self._last: tuple[tuple[int, int], list[int]] | None = None

    def __len__(self) -> int:
        """The number of different samples; an epoch has `per_epoch`."""
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]

    @property
    def per_epoch(self) -> int:
        """The number of samples in an epoch."""
        return sum(wanted for _, _, wanted in self._parts)

    def order(self, seed: int, epoch: int) -> list[int]:
        """The indices of one epoch in their order: the same for the same seed and epoch, wherever it runs."""
        if self._last is None or self._last[0] != (seed, epoch):
            generator = np.random.default_rng([seed, epoch])
            chosen = [
                first + np.concatenate([np.tile(np.arange(n), wanted // n), generator.permutation(n)[: wanted % n]])
                for first, n, wanted in self._parts
            ]
            self._last = (seed, epoch), generator.permutation(np.concatenate(chosen)).tolist()
        return list(self._last[1])
