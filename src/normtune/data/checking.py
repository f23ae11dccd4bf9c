"""The data of a stage, looked through from end to end before anything is trained on it.

Scope: every entry read, every distinct image decoded once, every sample tokenized as training would: what a training
would refuse or cut, what it would accept and be worse for (duplicates, images that the evaluation shows as well).
Non-scope: what is wrong with an entry (samples.py), a file of pixels (`images.py`) or a conversation (`chat.py`): their
errors are what is counted here. Memory: a few numbers per sample, and for an image its size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from normtune.chat import Encoded
from normtune.data.batches import Collator
from normtune.data.findings import DROPPED, Findings, kind_of
from normtune.data.index import scan
from normtune.data.samples import Sample, Scanned
from normtune.errors import InputError
from normtune.images import look_at
from normtune.recipe import DataSource, Stage
from normtune.runlog import file_hash

TOGETHER = 256  # entries whose images are decoded side by side


@dataclass(frozen=True)
class Shown:
    """A sample as the loss will see it, for a report."""

    sample: Sample
    encoded: Encoded


class Exam:
    """Images that an evaluation shows, told by their content; InputError for one that cannot be read."""

    def __init__(self, images: Iterable[Path]) -> None:
        paths = dict.fromkeys(images)
        try:
            self.sizes = {path.stat().st_size for path in paths}
            self.hashes = {file_hash(path): path for path in paths}
        except OSError as error:
            raise InputError(f"evaluation image {error.filename} cannot be read: {error.strerror}") from error

    def find(self, path: Path) -> Path | None:
        """The evaluation's image with the same bytes; a file is hashed only where its size is one of theirs."""
        return self.hashes.get(file_hash(path)) if path.stat().st_size in self.sizes else None


class Checker:
    """`checker.check(stage)` looks through a stage's files.

    Args:
        processor: of the model, as training has it.
        exam: images that training should not see.
        shown: samples to keep of each stage, the first ones.
        progress: is told the file and how many of its entries are done, now and then.
    """

    def __init__(
        self,
        processor: Any,
        exam: Exam | None = None,
        shown: int = 0,
        progress: Callable[[str, int], None] = lambda name, done: None,
    ) -> None:
        self.processor, self.exam, self.most_shown, self.progress = processor, exam, shown, progress
        self.collator = Collator(processor, None)
        self.examples: dict[str, list[Shown]] = {}
        self._tokens: dict[Path, int] = {}  # image tokens of each image that was opened
        self._broken: dict[Path, str] = {}
        self._about: dict[Path, list[tuple[str, str]]] = {}  # notes on an image: kind, why
        self._by_size: dict[tuple[int, int], int] = {}

    def check(self, stage: Stage) -> Findings:
        """All files of a stage. A file that cannot be read to its end, or gives none, is in `Findings.unreadable`."""
        found = Findings(stage.name, stage.max_length)
        shown = self.examples.setdefault(stage.name, [])
        seen: dict[bytes, str] = {}
        images: set[Path] = set()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for source in stage.data:
                done, good, whole = 0, 0, len(found.unreadable)
                for group in self._groups(source, found):
                    self._open([one.sample for one in group if one.sample is not None], pool)
                    for one in group:
                        self._entry(one, found, seen, images, shown)
                    done += len(group)
                    good += sum(one.sample is not None for one in group)
                    self.progress(source.path, done)
                if len(found.unreadable) == whole and round(source.weight * good) == 0:  # as `Mixture` refuses it
                    weight = f"weight {source.weight:g} of {good:,} samples leaves none"
                    found.unreadable.append((source.path, weight if good else "it holds no samples"))
        found.images = len(images)
        return found

    def _groups(self, source: DataSource, found: Findings) -> Iterator[list[Scanned]]:
        entries = scan(source)
        while True:
            group: list[Scanned] = []
            try:
                for one in islice(entries, TOGETHER):
                    group.append(one)
            except InputError as error:  # what was read before it counts
                found.unreadable.append((source.path, str(error)))
                yield group
                return
            if not group:
                return
            yield group

    def _open(self, samples: Sequence[Sample], pool: ThreadPoolExecutor) -> None:
        new = {path: sample.where for sample in samples for path in sample.images}
        new = {path: where for path, where in new.items() if path not in self._tokens and path not in self._broken}
        for path, result in zip(new, pool.map(self._look, new.items()), strict=True):
            if isinstance(result, str):
                self._broken[path] = result
                continue
            size, notes = result
            if size not in self._by_size:
                self._by_size[size] = self.collator.image_tokens(size)
            self._tokens[path] = self._by_size[size]
            if notes:
                self._about[path] = notes

    def _look(self, item: tuple[Path, str]) -> str | tuple[tuple[int, int], list[tuple[str, str]]]:
        """What is wrong with an image, or its size (width, height) and notes on it."""
        path, where = item
        try:
            size, frames = look_at(path, where)
        except InputError as error:
            return str(error).removeprefix(f"{where}: ")
        notes = []
        if frames > 1:
            notes.append(("animated image", f"{path} has {frames} frames; the first is used"))
        twin = self.exam.find(path) if self.exam is not None else None
        if twin is not None:
            notes.append(("image of the evaluation", f"{path} is {twin}"))
        return size, notes

    def _entry(
        self, one: Scanned, found: Findings, seen: dict[bytes, str], images: set[Path], shown: list[Shown]
    ) -> None:
        found.entries += 1
        sample = one.sample
        if sample is None:
            return found.fault(kind_of(str(one.problem)), one.where, one.reason)
        images.update(path for path in sample.images if path in self._tokens)
        reason = next((self._broken[path] for path in sample.images if path in self._broken), None)
        if reason is not None:
            return found.fault(kind_of(reason), one.where, reason)
        try:
            lengths = [self._tokens[path] for path in sample.images]
            whole = self.collator.chat.encode(sample.turns, lengths)
            limit = found.max_length
            fits = len(whole.input_ids) <= limit
            encoded = whole if fits else self.collator.chat.encode(sample.turns, lengths, limit)
        except InputError as error:
            return found.fault(kind_of(str(error)), one.where, str(error))
        found.length(len(whole.input_ids))
        if not any(encoded.supervised):
            why = f"{len(whole.input_ids):,} tokens, and none of an answer within the first {limit:,}"
            return found.fault(DROPPED, one.where, why if not fits else "no token of it is supervised")
        found.tokens += len(encoded.input_ids)
        found.supervised += sum(encoded.supervised)
        if not fits:
            self._cut(sample, whole, encoded, found)
        self._notes(sample, found, seen)
        if len(shown) < self.most_shown:
            shown.append(Shown(sample, encoded))

    def _cut(self, sample: Sample, whole: Encoded, encoded: Encoded, found: Findings) -> None:
        lost = len(sample.images) - encoded.images
        tokens = len(whole.input_ids) - len(encoded.input_ids)
        found.cut.update(samples=1, turns=encoded.cut_turns, tokens=tokens, images=lost)
        found.note("longer than the limit", sample.where, f"{len(whole.input_ids):,} tokens; {tokens:,} are cut off")
        if lost:
            found.note("image cut off", sample.where, f"{lost} of its {len(sample.images)} images are cut off")

    def _notes(self, sample: Sample, found: Findings, seen: dict[bytes, str]) -> None:
        text = repr((sample.images, [(turn.role, turn.text) for turn in sample.turns]))
        key = hashlib.blake2b(text.encode(), digest_size=12).digest()
        if key in seen:
            found.note("duplicate", sample.where, f"the same as {seen[key]}")
        else:
            seen[key] = sample.where
        for kind, why in dict.fromkeys(note for path in sample.images for note in self._about.get(path, ())):
            found.note(kind, sample.where, why)
