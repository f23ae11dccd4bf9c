"""Parquet files and Hugging Face `datasets` folders, images inside or beside them, as JSONL and image files.

Scope: rows with the columns `conversations` or `messages`, and perhaps `id`, `image`, `images`, as samples.py takes
them. A table is read once, a few rows at a time: its rows become a JSONL file in the cache folder, and images that it
holds files there, named by their SHA-256 (random reads from compressed row groups would decode a hundred images for
one; `datasets` itself makes such a copy of parquet). Non-scope: what a sample is (samples.py).
Source: `datasets.save_to_disk` (Arrow streams that `state.json` lists) and its `Image` feature, {bytes, path}.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from normtune.errors import InputError, JobError
from normtune.progress import say
from normtune.runlog import cache_folder, read_json, write_bytes

COLUMNS = ("id", "conversations", "messages", "image", "images")
ROWS = 32  # in memory at a time
STALE = 24 * 3600.0  # seconds after which an unfinished file is one that nobody finishes
_SPLIT = re.compile(r"(.+)-\d{5}-of-\d{5}\.parquet")  # as the Hub names the files of a split


def is_table(path: Path) -> bool:
    """Whether a path is a parquet file, a folder with parquet files, or one that `datasets` saved."""
    if not path.is_dir():
        return path.suffix.lower() == ".parquet"
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json")) or any(path.glob("*.parquet"))


def convert(path: Path, limit: int | None) -> tuple[Path, Path | None]:
    """A JSONL file with a line per row (the first `limit`), and the folder of the images that the table holds.

    None for a table that holds none: its images are names. Both are made when they are asked for first, and again
    when a file of the table has changed.

    Raises:
        InputError: the table cannot be read or lacks the columns; pyarrow is not installed.
        JobError: the cache folder cannot be written.
    """
    files = _files(path)
    cache = cache_folder() / "tables"
    images = cache / "images"
    stats = [file.stat() for file in files]
    facts = [(os.path.abspath(f), s.st_size, s.st_mtime_ns) for f, s in zip(files, stats, strict=True)]
    key = hashlib.sha256(json.dumps([facts, limit]).encode()).hexdigest()[:32]
    for inside in (True, False):
        done = cache / f"{key}{'-images' if inside else ''}.jsonl"
        if done.is_file():
            return done, images if inside else None
    say(f"reading {path} once; its rows and images are kept in {cache}")
    part = cache / f".{uuid.uuid4().hex}.part"
    inside = False
    try:
        images.mkdir(parents=True, exist_ok=True)
        for left in cache.glob(".*.part"):  # by a process that was killed
            if time.time() - left.stat().st_mtime > STALE:
                left.unlink(missing_ok=True)
        with part.open("w", encoding="utf-8") as lines:
            for row in islice(_rows(path, files), limit):
                inside |= _move_images(row, images)
                lines.write(json.dumps(row, default=str) + "\n")
            lines.flush()
            if inside:
                os.sync()  # the images, thousands of files: the rows must not outlive them when the power fails
            os.fsync(lines.fileno())
        done = cache / f"{key}{'-images' if inside else ''}.jsonl"
        os.replace(part, done)
    except OSError as error:
        reason = error.strerror or error
        raise JobError(
            f"cannot keep the rows of {path} in {cache}: {reason}.\n"
            "Free some space, or set NORMTUNE_CACHE to a folder on another disk."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return done, images if inside else None


def _files(path: Path) -> list[Path]:
    """The files of a table, in their order."""
    if not path.is_dir():
        files = [path]
    elif (path / "dataset_dict.json").is_file():
        splits = sorted(child.name for child in path.iterdir() if (child / "state.json").is_file())
        raise InputError(f"{path} holds several splits; give one of {', '.join(splits)}: {path}/{splits and splits[0]}")
    elif (path / "state.json").is_file():
        try:
            listed = [entry["filename"] for entry in read_json(path / "state.json", "dataset")["_data_files"]]
            files = [path / Path(name).name for name in listed]
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}/state.json: it does not list the files of a dataset") from error
    else:
        files = sorted(path.glob("*.parquet"))
        several = sorted({match[1] for file in files if (match := _SPLIT.fullmatch(file.name))})
        if len(several) > 1:
            raise InputError(
                f"{path} holds several splits, {', '.join(several)}: give a folder or a file of one of them"
            )
    for file in files:
        if not file.is_file():
            raise InputError(f"data file {file} (from the current directory) cannot be read: No such file")
    return files


def _rows(path: Path, files: list[Path]) -> Iterator[dict[str, Any]]:
    """The rows of all files, null columns left out."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{path}: parquet and datasets need pyarrow; pip install 'normtune[parquet]'") from None
    for file in files:
        try:
            with contextlib.ExitStack() as stack:
                if file.suffix.lower() == ".parquet":
                    opened = stack.enter_context(parquet.ParquetFile(file))
                    columns = _columns(opened.schema_arrow.names, file)
                    batches = opened.iter_batches(ROWS, columns=columns)
                else:
                    opened = pyarrow.ipc.open_stream(stack.enter_context(pyarrow.memory_map(str(file))))
                    columns = _columns(opened.schema.names, file)
                    batches = (b.slice(n, ROWS) for b in opened for n in range(0, b.num_rows, ROWS))
                for batch in batches:
                    for row in batch.select(columns).to_pylist():
                        yield {name: _turns(value) for name, value in row.items() if value is not None}
        except InputError:
            raise
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # text that is no UTF-8, dates
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise InputError(f"{file}: it cannot be read as a table: {reason}") from error


def _columns(names: list[str], file: Path) -> list[str]:
    found = [name for name in COLUMNS if name in names]
    if not {"conversations", "messages"} & set(found):
        raise InputError(f"{file}: it has no column `conversations` or `messages`, but {', '.join(names)[:200]}")
    return found


def _turns(value: Any) -> Any:
    """A dictionary of lists, as older `datasets` kept a list of dictionaries, as that list; others as they are."""
    if not isinstance(value, dict) or not value or not all(isinstance(part, list) for part in value.values()):
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=False)]


def _move_images(row: dict[str, Any], folder: Path) -> bool:
    """Writes the images that a row holds, and puts names in their place. Whether there were any.

    One that has neither bytes nor a name becomes null, which is refused as such when the row is read as a sample.
    """
    held = False
    for column in ("image", "images"):
        value = row.get(column)
        for image in value if isinstance(value, list) else [value]:
            held |= isinstance(image, dict) and isinstance(image.get("bytes"), bytes)
        if isinstance(value, list):
            row[column] = [_name(image, folder) for image in value]
        elif isinstance(value, dict):
            row[column] = [_name(value, folder)]
    return held


def _name(image: Any, folder: Path) -> Any:
    if not isinstance(image, dict):
        return image
    data = image.get("bytes")
    if not isinstance(data, bytes):
        return image.get("path")
    digest = hashlib.sha256(data).hexdigest()
    name = f"{digest[:2]}/{digest}"
    path = folder / name
    if not path.is_file() or path.stat().st_size != len(data):
        write_bytes(path, data, sync=False)
    return name
