"""Data files to sequences of samples: small ones in memory, large ones by an index of where their samples stand.

Scope: `read_samples`, and the index: 24 bytes per sample, built while everything is checked, mapped into memory later.
Non-scope: JSON (entries.py), what a sample is (samples.py), mixtures (mixture.py).

An index lies in the cache folder, named for the data file and its images folder. It is used again while the file's
size, time and first and last bytes are as they were, and so the times of all folders that hold an image of it: what was
found then is there still. It is written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from normtune.data.entries import Entry, is_lines, read_entries
from normtune.data.samples import Form, Sample, Scanned
from normtune.data.skipping import OnBad
from normtune.data.tables import convert, is_table
from normtune.errors import InputError, JobError
from normtune.progress import Bar, say
from normtune.recipe import DataSource
from normtune.runlog import cache_folder, file_hash, write_bytes

LARGE = 20_000_000  # bytes of a file from which on its samples are not held in memory
FORMAT = 2  # of an index: a new one leaves older ones alone
_ENDS = 1 << 16  # bytes at the beginning and at the end of a file that tell it from another
_EVERY = 4096  # samples between two looks at the progress


def read_samples(source: DataSource, on_bad: OnBad | None = None) -> Sequence[Sample]:
    """The first `source.limit` samples of a file, in its order.

    LLaVA JSON or JSONL, parquet, or a folder of `datasets` (see tables.py). Data and images folder are relative to the
    current directory; `kind` defaults to the file's stem. Samples of a large file are read when they are asked for.

    Args:
        on_bad: is told where and why, each time, of an entry that is no usable sample; such are left out. Without it
            the first one raises.

    Raises:
        InputError: the file is missing or no JSON (with line and column); a sample is malformed, its turns do not
            alternate, its images are missing or do not match its "<image>" (with item and id).
    """
    form, file = _form(source)
    found = _indexed(form, file, source.limit, on_bad) if _size(file) >= LARGE else None
    samples: Sequence[Sample] = found if found is not None else list(_good(scan(source), on_bad))
    if not samples:
        raise InputError(f"{form.path}: it holds no samples")
    return samples


def scan(source: DataSource) -> Iterator[Scanned]:
    """The entries of a file up to the sample that is number `source.limit`, each as a sample or with what is wrong.

    Raises:
        InputError: the file cannot be read, or from some place on not be understood.
    """
    form, file = _form(source)
    found = 0
    for one in form.scan(read_entries(file)):
        yield one
        found += one.sample is not None
        if found == source.limit:
            return


def has_images(samples: Sequence[Sample]) -> bool:
    """Whether one of the samples that `read_samples` gave has an image."""
    return samples.has_images if isinstance(samples, Indexed) else any(sample.images for sample in samples)


def content_of(source: DataSource, samples: Sequence[Sample]) -> str:
    """SHA-256 of the file that `read_samples` gave these of (of a table its rows as JSON lines): whatever its time and
    place. A large file is not read again for it."""
    if isinstance(samples, Indexed):
        return samples.content
    file = _form(source)[1]
    try:
        return file_hash(file)
    except OSError as error:
        raise InputError(f"data file {file} cannot be read any more: {error.strerror}") from error


class Indexed(Sequence[Sample]):
    """The samples of a large file: places [n, 3] int64 (first byte, bytes, number of the entry), parsed when asked for.

    Raises:
        JobError: on access, where the file was changed in place.
    """

    def __init__(self, form: Form, file: Path, places: np.ndarray, has_images: bool, content: str) -> None:
        self.form, self.has_images, self.content = form, has_images, content
        self._places = places
        self._file = os.open(file, os.O_RDONLY)  # stays readable where the file is replaced or removed
        weakref.finalize(self, os.close, self._file)
        self._version = _version(self._file)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        start, length, number = self._places[index].tolist()
        if _version(self._file) != self._version:
            raise JobError(f"{self.form.path}: it changed while it was in use; start again")
        value = json.loads(os.pread(self._file, length, start))
        return self.form.again(Entry(value, number, start, length))


def _form(source: DataSource) -> tuple[Form, Path]:
    """How the entries of a source become samples, and the file in which they are."""
    path = Path(source.path)
    folder = None if source.images is None else Path(source.images)
    if folder is not None and not folder.is_dir():
        raise InputError(f"{path}: there is no images folder {folder} (relative to the current directory)")
    kind = source.kind or path.stem
    if is_table(path):
        file, own = convert(path, source.limit)
        return Form(path, "row", own or folder, kind), file
    return Form(path, "line" if is_lines(path) else "item", folder, kind), path


def _good(scanned: Iterator[Scanned], on_bad: OnBad | None) -> Iterator[Sample]:
    for one in scanned:
        if one.sample is not None:
            yield one.sample
        else:
            _leave_out(one, on_bad)


def _leave_out(one: Scanned, on_bad: OnBad | None) -> None:
    if on_bad is None:
        assert one.problem is not None
        raise one.problem
    on_bad(one.where, one.reason)


def _size(file: Path) -> int:
    """0 where there is none, which reading it says better."""
    try:
        return file.stat().st_size
    except OSError:
        return 0


# --- the index


@dataclass
class _Index:
    """`content`: SHA-256 of the whole file. `first_image`: the first sample with an image. `bad` entries: how many
    samples stand before, where, why."""

    places: np.ndarray
    content: str
    first_image: int | None = None
    bad: list[tuple[int, str, str]] = field(default_factory=list)


def _indexed(form: Form, file: Path, limit: int | None, on_bad: OnBad | None) -> Indexed | None:
    """The samples of a file by its index, which is made where there is none. None where the file cannot be opened."""
    try:
        facts = _facts(form, file)
    except OSError:
        return None
    names = "\0".join(str(facts[key]) for key in ("file", "images"))
    target = cache_folder() / "index" / f"{hashlib.sha256(names.encode()).hexdigest()[:32]}.idx"
    index = _load(target, facts, limit, skips=on_bad is not None)
    if index is None:
        index = _build(form, file, limit, on_bad, facts, target)
    elif on_bad is not None:
        for _, where, why in index.bad:
            on_bad(f"{form.path}{where}", why)
    places = index.places[:limit]
    has_images = index.first_image is not None and index.first_image < len(places)
    return Indexed(form, file, places, has_images, index.content)


def _facts(form: Form, file: Path) -> dict[str, Any]:
    """What an index is of."""
    with file.open("rb") as opened:
        size, time = _version(opened.fileno())
        ends = hashlib.sha256(opened.read(_ENDS))
        opened.seek(max(0, size - _ENDS))
        ends.update(opened.read(_ENDS))
    return {
        "format": FORMAT,
        "file": os.path.abspath(file),
        "images": None if form.folder is None else os.path.abspath(form.folder),
        "size": size,
        "time": time,
        "ends": ends.hexdigest(),
    }


def _version(file: int) -> tuple[int, int]:
    """Bytes of an open file, and when it was written to last, in nanoseconds."""
    found = os.fstat(file)
    return found.st_size, found.st_mtime_ns


def _load(target: Path, facts: dict[str, Any], limit: int | None, skips: bool) -> _Index | None:
    """An index that was written earlier, if it says all that is asked: None for a missing, older or damaged one."""
    try:
        with target.open("rb") as opened:
            header = json.loads(opened.readline())
            start, count = opened.tell(), int(header["count"])
        as_before = {key: header[key] for key in facts} == facts
        folders = {name: os.stat(name).st_mtime_ns for name in header["folders"]}
        enough = header["complete"] or (limit is not None and count >= limit)
        bad = [(n, str(where), str(why)) for n, where, why in header["bad"] if limit is None or n < limit]
        if not (as_before and folders == header["folders"] and enough and (skips or not bad)):
            return None
        if target.stat().st_size != start + 24 * count:
            return None
        places = np.memmap(target, np.int64, "r", start, (count, 3))
        return _Index(places, str(header["content"]), header["first_image"], bad)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build(
    form: Form, file: Path, limit: int | None, on_bad: OnBad | None, facts: dict[str, Any], target: Path
) -> _Index:
    """Reads and checks a file to its end or `limit`, and writes down where its samples are."""
    places, folders, bad = array("q"), dict[str, int](), list[tuple[int, str, str]]()
    count, first_image, complete = 0, None, True
    with Bar(f"indexing {form.path.name}, MB", facts["size"] >> 20) as bar:
        for one in form.scan(read_entries(file)):
            if one.sample is None:
                _leave_out(one, on_bad)
                bad.append((count, one.where.removeprefix(str(form.path)), one.reason))
                continue
            places.extend((one.entry.start, one.entry.length, one.entry.number))
            for image in one.sample.images:
                above = os.path.dirname(image)
                if above not in folders:
                    folders[above] = os.stat(above).st_mtime_ns
            if one.sample.images and first_image is None:
                first_image = count
            count += 1
            if count % _EVERY == 0:
                bar.update(one.entry.start >> 20)
            if count == limit:
                complete = False
                break
    content = file_hash(file)
    if _facts(form, file) != facts:
        raise JobError(f"{form.path}: it changed while it was read; start again when it is complete")
    index = _Index(np.frombuffer(places, np.int64).reshape(-1, 3), content, first_image, bad)
    times = {os.path.abspath(name): time for name, time in folders.items()}
    header = facts | {"content": content, "count": count, "complete": complete, "folders": times}
    header |= {"first_image": first_image, "bad": bad}
    if not count:
        return index
    try:
        write_bytes(target, json.dumps(header).encode() + b"\n" + index.places.tobytes())
    except JobError as error:  # the work is done: only the next start has to do it again
        say(f"the index of {form.path} is not kept: {error}")
    return index
