"""Entries of a JSON list or a JSONL file one after another, however large the file: each parsed, and where it stands.

Scope: bytes to JSON values, with the line and column of what is no JSON. Non-scope: what a sample is (samples.py).
Source: the grammar and the messages are those of Python's `json`, whose decoder parses each entry.

Memory: a window of the file, `CHUNK` bytes or the longest entry, which may have `MOST`.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from normtune.errors import InputError

CHUNK = 1 << 22  # bytes read at a time
MOST = 1 << 26  # bytes or characters of an entry: parsed, it takes about five times that
_TOO_LONG = f"more than {MOST:,} characters are no sample"
_MARGIN = 16  # characters, more than what tells a token from the beginning of another, such as "-Infinity"
_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()
_BOM = codecs.BOM_UTF8


@dataclass(frozen=True)
class Entry:
    """An entry of a file, or the line that should have been one.

    Attributes:
        value: the parsed JSON; None where `problem` says why it is none.
        number: of the entry in a list, or of the line in a JSONL file, from 1.
        start, length: the bytes of the file that hold it.
    """

    value: Any
    number: int
    start: int
    length: int
    problem: InputError | None = None


def is_lines(path: Path) -> bool:
    """Whether a file has an entry per line, by its name."""
    return path.suffix.lower() in (".jsonl", ".ndjson")


def read_entries(path: Path) -> Iterator[Entry]:
    """The entries of a file, in its order. A line of a JSONL file that is no JSON comes as its `problem`.

    Raises:
        InputError: the file cannot be read, is no list, or is no JSON or no UTF-8 (with line and column, or byte).
    """
    try:
        with path.open("rb") as file:
            yield from _lines(file, path) if is_lines(path) else _list(_Window(file, path))
    except OSError as error:
        raise InputError(f"data file {path} (from the current directory) cannot be read: {error.strerror}") from error


def parse(text: str, path: Path, line: int) -> Any:
    """The JSON value in a line of a file. InputError if it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _invalid(path, line + error.lineno - 1, error.colno, error.msg) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists nested without end
        raise InputError(f"{path}, line {line}: no usable JSON: {error}") from error


def kind_of(value: Any) -> str:
    """What a JSON value is, in JSON's words."""
    names = {list: "a list", dict: "an object", str: "a string", bool: "true or false", type(None): "nothing"}
    return ("an empty list" if value == [] else "") or names.get(type(value), "a number")


def _lines(file: BinaryIO, path: Path) -> Iterator[Entry]:
    start = 0
    for number, line in enumerate(iter(lambda: file.readline(MOST + 1), b""), 1):
        if len(line) > MOST:
            raise InputError(f"{path}, line {number}: {_TOO_LONG} (is it one list? Then name it .json)")
        skipped = len(_BOM) if number == 1 and line.startswith(_BOM) else 0
        value, problem = None, None
        try:
            text = line[skipped:].decode()
            empty = not text.strip()
            value = None if empty else parse(text.removesuffix("\n"), path, number)
        except UnicodeDecodeError as error:
            empty, problem = False, _no_text(path, start + skipped + error.start)
        except InputError as error:
            empty, problem = False, error
        if not empty:
            yield Entry(value, number, start + skipped, len(line) - skipped, problem)
        start += len(line)


def _list(window: _Window) -> Iterator[Entry]:
    if window.peek() != "[":
        value, _, _ = window.value()
        if window.peek():
            window.fail("Extra data")
        raise InputError(f"{window.path}: expected a list of samples, found {kind_of(value)}")
    window.skip()
    number, more = 0, window.peek() != "]"
    while more:
        number += 1
        value, start, length = window.value()
        yield Entry(value, number, start, length)
        mark = window.peek()
        if mark not in (",", "]"):
            window.fail("Expecting ',' delimiter")
        more = mark == ","
        if more:
            window.skip()
    window.skip()
    if window.peek():
        window.fail("Extra data")


class _Window:
    """A file's text from a place on, as much of it as is needed."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.text, self.at = "", 0  # what is here of the file, and how much of it is done
        self.ended = False  # nothing is left behind `text`
        self.line, self.column = 1, 1  # of the first character of `text`
        self.byte = len(_BOM) if file.read(len(_BOM)) == _BOM else 0  # where the character `at` stands in the file
        file.seek(self.byte)
        self._read, self._cut = self.byte, b""  # where the next bytes come from; the first bytes of a character

    def peek(self) -> str:
        """The next character that is no space, "" at the end."""
        while True:
            self._go(_SPACE.match(self.text, self.at).end())  # type: ignore[union-attr]
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._more()

    def skip(self) -> None:
        """Passes over a character."""
        self._go(self.at + 1)

    def value(self) -> tuple[Any, int, int]:
        """The next JSON value, the byte that it begins with, and its length in bytes."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                if self.ended or end + _MARGIN <= len(self.text):  # what looks like its end may be that of the window
                    start = self.byte
                    self._go(end)
                    return value, start, self.byte - start
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos + _MARGIN > len(self.text)
                if self.ended or not cut:
                    self.fail(error.msg, error.pos)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{self.path}: no usable JSON: {error}") from error
            if len(self.text) - self.at > MOST:
                line, column = self._place(self.at)
                raise InputError(f"{self.path}, line {line}, column {column}: {_TOO_LONG}; expected a list of samples")
            self._more()

    def fail(self, message: str, at: int | None = None) -> NoReturn:
        """InputError with the line and column of a character of `text`, of the next one by default."""
        line, column = self._place(self.at if at is None else at)
        raise _invalid(self.path, line, column, message)

    def _place(self, at: int) -> tuple[int, int]:
        last = self.text.rfind("\n", 0, at)
        lines = self.text.count("\n", 0, at)
        return self.line + lines, at - last if lines else self.column + at

    def _go(self, at: int) -> None:
        self.byte += len(self.text[self.at : at].encode())
        self.at = at

    def _more(self) -> None:
        """Drops what is done and reads on; twice as much where that was too little, so no entry is parsed often."""
        data = self.file.read(max(CHUNK, 2 * (len(self.text) - self.at)))
        self.ended = not data
        try:
            text, used = codecs.utf_8_decode(self._cut + data, "strict", self.ended)
        except UnicodeDecodeError as error:
            raise _no_text(self.path, self._read - len(self._cut) + error.start) from error
        self._read += len(data)
        self._cut = (self._cut + data)[used:]
        self.line, self.column = self._place(self.at)
        self.text, self.at = self.text[self.at :] + text, 0


def _invalid(path: Path, line: int, column: int, message: str) -> InputError:
    hint = " (is it one object per line? Then name it .jsonl)" if message == "Extra data" else ""
    return InputError(f"{path}, line {line}, column {column}: no valid JSON: {message}{hint}")


def _no_text(path: Path, byte: int) -> InputError:
    return InputError(f"{path}: it is not UTF-8 text (byte {byte})")
