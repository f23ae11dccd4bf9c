"""All data files of a stage as one sequence of samples, in an order that depends on seed and epoch alone.

Scope: weights of files, order. Non-scope: reading them (index.py), batches (batches.py).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from normtune.data.index import content_of, has_images, read_samples
from normtune.data.samples import Sample
from normtune.data.skipping import OnBad
from normtune.errors import InputError
from normtune.recipe import DataSource


class Mixture(Sequence[Sample]):
    """All files of a stage as one sequence of samples, `mixture[i]`.

    A file of n samples with weight w contributes round(w * n) of them to each epoch: all of them as often as that
    goes, and for the rest a subset that is drawn anew for each epoch. InputError as in `read_samples`, and for a
    weight that leaves nothing of a file; `on_bad` as there.

    Attributes:
        has_images: whether a sample has any.
        content: tells the files' content from any other, wherever they lie; what images show is no part of it.
    """

    def __init__(self, sources: Sequence[DataSource], on_bad: OnBad | None = None) -> None:
        self._files: list[Sequence[Sample]] = []
        self._parts: list[tuple[int, int, int]] = []  # first index, samples, samples per epoch
        content = hashlib.sha256()
        for source in sources:
            samples = read_samples(source, on_bad)
            wanted = round(source.weight * len(samples))
            if wanted == 0:
                raise InputError(f"{source.path}: weight {source.weight:g} of {len(samples)} samples leaves none")
            self._parts.append((len(self), len(samples), wanted))
            self._files.append(samples)
            content.update(content_of(source, samples).encode())
        self.has_images = any(map(has_images, self._files))
        self.content = content.hexdigest()
        self._last: tuple[tuple[int, int], list[int]] | None = None

    def __len__(self) -> int:
        """The number of different samples; an epoch has `per_epoch`."""
        return sum(map(len, self._files))

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        file = bisect_right(self._parts, place, key=lambda part: part[0]) - 1
        return self._files[file][place - self._parts[file][0]]

    def images(self) -> Iterator[tuple[Path, str]]:
        """Each image of each sample, with what names it in messages. Reads all samples of files with images."""
        for samples in filter(has_images, self._files):
            for sample in samples:
                for path in sample.images:
                    yield path, sample.where

    @property
    def per_epoch(self) -> int:
        """The number of samples in an epoch."""
        return sum(wanted for _, _, wanted in self._parts)

    def order(self, seed: int, epoch: int) -> list[int]:
        """The indices of one epoch in their order: the same for the same seed and epoch, wherever it runs."""
        last = self._last  # another thread may ask for another epoch
        if last is None or last[0] != (seed, epoch):
            generator = np.random.default_rng([seed, epoch])
            chosen = [
                first + np.concatenate([np.tile(np.arange(n), wanted // n), generator.permutation(n)[: wanted % n]])
                for first, n, wanted in self._parts
            ]
            last = self._last = (seed, epoch), generator.permutation(np.concatenate(chosen)).tolist()
        return list(last[1])
