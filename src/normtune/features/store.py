"""Features of images on disk: complete files that are only ever added, found by what is in the image.

A store is a folder `features/KEY` with `store.json` and shards, safetensors files with one tensor "features"
[n, P, D] and the SHA-256 of the n image files in their metadata. A shard is written beside its place, synced and
renamed, so that any number of processes may fill a store and be killed at any moment: what they had not finished is
missing, nothing is wrong. Non-scope: whose features they are (identity.py), how they are made (filling.py).

Shapes: U images, P tokens of a feature, D values of a token.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from normtune.errors import InputError, JobError
from normtune.progress import Bar, say
from normtune.runlog import file_hash, read_json, sync_folder, wrapped_disk_errors, write_json

FACTS = "store.json"
STALE = 24 * 3600.0  # seconds after which an unfinished file is one that nobody finishes
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # safetensors' names


class Store:
    """The features of one encoder, in `folder`; nothing is written before `describe` or `add`.

    Raises:
        InputError: a `store.json` that is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = {}
        self._keys: dict[Path, str] = {}  # image file -> SHA-256 of its content
        self._places: dict[str, tuple[str, int]] = {}  # SHA-256 -> shard, row
        self._shards: dict[str, Any] = {}  # name -> open file, mapped into memory
        self.refresh()

    @property
    def tokens(self) -> int:
        """Tokens of an image in the LLM's sequence. JobError before anything is stored."""
        if "tokens" not in self.facts:
            self.refresh()  # another process may have filled it
        if "tokens" not in self.facts:
            raise JobError(f"feature cache {self.folder} is empty: fill it before samples are encoded")
        return int(self.facts["tokens"])

    def refresh(self) -> None:
        """Takes notice of what this and other processes have added; a damaged shard is removed, with a message."""
        if (self.folder / FACTS).is_file():
            self.facts = read_json(self.folder / FACTS, "description of a feature cache")
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self._shards:
                self._open(path)

    def _open(self, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")  # compares the size of the file with its header
            keys = json.loads(file.metadata()["images"])
            part = file.get_slice("features")
            if part.get_shape() != [len(keys), *self.facts["shape"]]:
                raise ValueError(f"{part.get_shape()} features of {len(keys)} images")
            if str(_DTYPES.get(part.get_dtype())) != self.facts["dtype"]:
                raise ValueError(f"dtype {part.get_dtype()}")
        except FileNotFoundError:  # another process found it damaged, too
            return
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            say(f"feature cache: {path} is damaged ({error}); its images are encoded again")
            path.unlink(missing_ok=True)
            return
        self._shards[path.name] = part
        for row, key in enumerate(keys):
            self._places.setdefault(key, (path.name, row))

    def recognize(self, wanted: Mapping[Path, str], quiet: bool = True, skip: bool = False) -> None:
        """Reads every image file once, for its SHA-256.

        Args:
            wanted: image file -> what names it, for messages.

        Raises:
            InputError: a file that cannot be read, unless `skip` leaves it out.
        """
        new = [path for path in wanted if path not in self._keys]
        with ThreadPoolExecutor(4) as pool, Bar("looking at images", len(new), quiet=quiet) as bar:
            for number, (path, key) in enumerate(zip(new, pool.map(content_key, new), strict=True), 1):
                if key is not None:
                    self._keys[path] = key
                elif not skip:
                    raise InputError(f"{wanted[path]}: image {path} cannot be read")
                bar.update(number)

    def stored(self, wanted: Mapping[Path, str]) -> list[Path]:
        """Those of the image files, each with what names it, whose features are here. Reads and raises as
        `recognize`."""
        self.recognize(wanted)
        return [path for path in wanted if self._keys[path] in self]

    def contents(self, paths: Iterable[Path]) -> dict[str, Path]:
        """SHA-256 -> one of the recognized files with this content."""
        return {self._keys[path]: path for path in paths if path in self._keys}

    def __contains__(self, key: str) -> bool:
        """Whether features of an image with this SHA-256 are stored."""
        return key in self._places

    def holds(self, path: Path) -> bool:
        """Whether `lookup` has this image file, which was recognized or left out."""
        if path in self._keys and self._keys[path] not in self:  # another process may have added it
            self.refresh()
        return self._keys.get(path) in self._places

    def lookup(self, paths: Sequence[Path]) -> torch.Tensor:
        """Features [U, P, D] of image files, in the dtype that they were stored in; reads these rows alone.

        Raises:
            JobError: an image that is not stored.
        """
        return torch.stack([self._row(path) for path in paths])

    def _row(self, path: Path) -> torch.Tensor:
        if path not in self._keys:
            self.recognize({path: "feature cache"})
        if self._keys[path] not in self:  # another process may have added it
            self.refresh()
        place = self._places.get(self._keys[path])
        if place is None:
            raise JobError(f"feature cache {self.folder} has no image {path}: it changed while it was in use")
        shard, row = place
        return self._shards[shard][row]

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Writes down what the store holds: at least `tokens`, `shape` [P, D], `dtype` (as torch prints it)."""
        with wrapped_disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for part in self.folder.glob(".*.part"):  # left by a process that was killed
                if time.time() - part.stat().st_mtime > STALE:
                    part.unlink(missing_ok=True)
        write_json(self.folder / FACTS, dict(facts))
        self.facts = dict(facts)

    def add(self, keys: Sequence[str], features: torch.Tensor) -> None:
        """Adds the features [n, P, D] of n images as one shard, complete or not at all.

        Raises:
            JobError: the disk is full, or writing failed otherwise.
        """
        name = f"{uuid.uuid4().hex}.safetensors"
        part = self.folder / f".{name}.part"
        try:
            with wrapped_disk_errors(part):
                tensors = {"features": features.contiguous().cpu()}
                save_file(tensors, part, metadata={"images": json.dumps(list(keys))})
                with part.open("rb+") as file:
                    os.fsync(file.fileno())
                os.replace(part, self.folder / name)
                sync_folder(self.folder)
        finally:
            part.unlink(missing_ok=True)
        self._open(self.folder / name)

    def check_room(self, images: int, bytes_each: int) -> str:
        """What `images` more will take, for the person who waits.

        Raises:
            InputError: the disk has no room for them.
        """
        above = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        needed, free = images * bytes_each, shutil.disk_usage(above).free
        if needed > free:
            raise InputError(
                f"feature cache: {images:,} images take {size(needed)} in {self.folder}, and {size(free)} are free.\n"
                "Free some space, set NORMTUNE_CACHE to a folder on another disk, or leave cache_features off."
            )
        each = f"{size(bytes_each)} each"
        return f"feature cache: {images:,} images x {each} = {size(needed)} in {self.folder}; {size(free)} free"


def content_key(path: Path) -> str | None:
    """SHA-256 of a file's content; None where it cannot be read."""
    try:
        return file_hash(path)
    except OSError:
        return None


def size(count: float) -> str:
    """Bytes in the largest unit that leaves a figure of 1 or more: 1.2 MB, 94 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            break
        count, unit = count / 1000, "TB"
    return f"{count:.3g} {unit}"
