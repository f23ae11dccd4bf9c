"""Readers of official files that name what is wrong in them: file, line or place, and what to do.

Scope: text, JSON, JSON Lines, and the rows of a Hugging Face data set as JSON, JSON Lines or parquet. Not here: what
any one benchmark makes of a record.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from normtune.errors import InputError
from normtune.tasks.items import Item


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
    content = _parsed(path, read_text(path))
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}, not an object.\nUse the official file, unchanged.")
    return content


def read_list(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object of the JSON list in `path` with its place, "FILE, entry N" (from 0); InputError for another kind of
    content, an empty file too."""
    content = _parsed(path, read_text(path))
    if not isinstance(content, list):
        raise InputError(f"{path}: holds a {type(content).__name__}, not a list.\nGive a JSON list of objects.")
    yield from _objects(path, content)


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every non-empty line's object with its place, "FILE, line N"; InputError when a line is not an object."""
    yield from _lines(path, read_text(path))


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a data set with their places: a JSON list, JSON Lines or, where pyarrow is installed, parquet."""
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    text = read_text(path)
    if text.lstrip().startswith("["):
        yield from _objects(path, _parsed(path, text))
    else:
        yield from _lines(path, text)


def row_files(folder: Path, names: Sequence[str]) -> dict[str, list[Path]]:
    """Files of rows in `folder` or its `data/` for each of `names`: NAME.jsonl, NAME.json or NAME[-...].parquet."""
    found = {}
    for name in names:
        single = [folder / f"{name}{suffix}" for suffix in (".jsonl", ".json", ".parquet")]
        parts = [path for place in (folder, folder / "data") for path in sorted(place.glob(f"{name}-*.parquet"))]
        files = [path for path in single if path.is_file()][:1] or parts
        if files:
            found[name] = files
    return found


def first_existing(*candidates: Path) -> Path:
    """The first of `candidates` that exists, or the first, so that an error names it."""
    return next((path for path in candidates if path.exists()), candidates[0])


def within(folder: Path, name: str, where: str) -> Path:
    """The file that `name` means below `folder`, or where it would be. InputError for a name that leads out of it."""
    first = os.path.normpath(name).split(os.sep)[0]
    if os.path.isabs(name) or "\0" in name or first == os.pardir:
        raise InputError(f"{where}: image {name!r:.80} leads out of {folder}.\nUse the official file, unchanged.")
    return folder / name


def stored_image(record: dict[str, Any], name: str, folders: Sequence[Path], where: str) -> Path:
    """Where the image `name` of a row lies: in one of `folders`, or embedded in the row; then it is written into the
    last of them, once. InputError when that is not possible, and for a name that leads out of them."""
    places = [within(folder, name, where) for folder in folders]
    found = next((place for place in places if place.exists()), None)
    image = record.get("image")
    content = image.get("bytes") if isinstance(image, dict) else None
    if found is not None or not isinstance(content, bytes):
        return found or places[0]
    target = places[-1]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.{os.getpid()}")
        unfinished.write_bytes(content)
        unfinished.replace(target)
    except OSError as error:
        raise InputError(
            f"{where}: cannot write its image to {target}: {error.strerror}.\nMake the folder writable."
        ) from None
    return target


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


def add_prediction(given: dict[Any, str], key: Any, text: str, by: str, where: str) -> None:
    """Puts a prediction under its key; InputError when there is one already (official scorers keep the last)."""
    if key in given:
        raise InputError(f"{where}: {by} {key!r} occurs twice.\nKeep one prediction for it.")
    given[key] = text


def single(paths: Sequence[Path], what: str) -> Path:
    """The only one of `paths`; InputError for another number."""
    if len(paths) != 1:
        raise InputError(f"{len(paths)} files of {what}, not 1.\nGive --{what} once.")
    return paths[0]


def _objects(path: Path, content: list[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, record in enumerate(content):
        if not isinstance(record, dict):
            raise InputError(f"{path}, entry {place}: not a JSON object.\nThe file is a list of objects.")
        yield f"{path}, entry {place}", record


def _lines(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        record = _loads(line, path, number)
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number}: not a JSON object.\nThe file is JSON Lines: one object per line.")
        yield f"{path}, line {number}", record


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(
            f"{path}: parquet files need pyarrow.\nRun: pip install pyarrow; or export the rows as JSON Lines."
        ) from None
    try:
        number = 0
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=64):
            for record in batch.to_pylist():
                yield f"{path}, row {number}", record
                number += 1
    except (OSError, pyarrow.ArrowInvalid) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: not a readable parquet file ({reason:.80}).\nDownload it again.") from None


def _parsed(path: Path, text: str) -> Any:
    if not text.strip():
        raise InputError(f"{path}: the file is empty.\nWrite or download it again.")
    return _loads(text, path)


def _loads(text: str, path: Path, first: int = 1) -> Any:
    """The JSON in `text`, which begins at line `first` of `path`; InputError for what Python cannot read, which besides
    wrong syntax is an integer of more than 4,300 digits and deep nesting."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _not_json(path, first + error.lineno - 1, error.colno, error.msg) from None
    except ValueError:
        problem = "an integer with too many digits"
    except RecursionError:
        problem = "JSON nested too deeply"
    raise InputError(f"{path}, from line {first}: {problem}.\nUse the official file, unchanged.")


def _not_json(path: Path, line: int, column: int, message: str) -> InputError:
    return InputError(
        f"{path}, line {line}, column {column}: not JSON ({message}).\nRepair the line or download the file again."
    )
