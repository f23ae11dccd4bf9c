"""The experiment on kinds of data: one strategy, as much of each kind, by samples or by supervised tokens.

Scope: which samples of which file a row trains on, and for how many steps. Not here: what a kind is (`DataSource.kind`,
else the file's name), training. Source: PAPER (Zhao et al., arXiv 2312.11420), which compares conversations, detailed
descriptions, complex reasoning and a random subset at equal samples.

The recipe's limits and weights do not count here: all that there is of a kind is at hand, and the kind that has least
says how much each row gets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from normtune.comparison.variants import BASELINES, Variant, numbered, prepared, slug, stage1_variants
from normtune.data import Collator, Sample, read_samples
from normtune.data.skipping import policy
from normtune.errors import InputError, did_you_mean
from normtune.images import look_at
from normtune.recipe import DataSource, Recipe, Stage
from normtune.tuned import processor_of

MIXED = "mixed"
EQUAL = ("samples", "supervised-tokens")
Tokenized = Callable[[Sequence[Sample]], list[int]]


class Pool:
    """All files of a kind. `sums[n]` is what its first n samples amount to, in samples or in supervised tokens: n is
    split over the files in proportion to their sizes, and each gives its first ones."""

    def __init__(self, sources: Sequence[DataSource], amounts: Sequence[Sequence[int]]) -> None:
        self.sources = [source.model_copy(update={"limit": None, "weight": 1.0}) for source in sources]
        self.sizes = [len(own) for own in amounts]
        limits = apportion(np.arange(sum(self.sizes) + 1), self.sizes)  # [N + 1, files]
        prefixes = [np.concatenate([[0], np.cumsum(own)]) for own in amounts]
        self.sums = np.sum([own[limits[:, n]] for n, own in enumerate(prefixes)], axis=0)  # [N + 1] int64

    @property
    def total(self) -> int:
        return int(self.sums[-1])

    def nearest(self, amount: int) -> int:
        """How many samples, at least one, come nearest to an amount."""
        return int(np.argmin(np.abs(self.sums[1:] - amount))) + 1

    def first(self, samples: int) -> list[DataSource]:
        """The files with limits that leave so many samples."""
        limits = zip(self.sources, apportion(samples, self.sizes).tolist(), strict=True)
        return [source.model_copy(update={"limit": limit}) for source, limit in limits if limit]


def apportion(count: int | np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Counts [...] split in proportion to `sizes`, each part less than one from its share: [..., len(sizes)] int64.
    No part exceeds its size as long as the count does not exceed their sum."""
    ends = np.concatenate([[0], np.cumsum(sizes)])
    return np.diff(np.asarray(count)[..., None] * ends // ends[-1])


def kind_variants(
    recipe: Recipe, kinds: Sequence[str], equal: str = "samples", tokenized: Tokenized | None = None
) -> list[Variant]:
    """A row per kind of the last stage's data, and stage 1 alone as a control. `mixed` takes equal shares of the other
    kinds that are listed, of all of the recipe where fewer than two are. The first row is also asked without its image
    and with another's.

    `samples`: N of each kind, N the samples of the smallest; batch size, steps and passes are equal.
    `supervised-tokens`: of each kind as many samples as hold T supervised tokens, to within one sample, T those of the
    kind that has least; batch size and passes over the data are equal, so that steps differ.

    Args:
        tokenized: samples -> supervised tokens of each (default: by the recipe's model; see `supervised_tokens`).

    Raises:
        InputError: unknown `equal`, no kinds, a kind that the recipe lacks, files that cannot be read.
    """
    if equal not in EQUAL:
        raise InputError(f"equal {equal!r} is unknown{did_you_mean(equal, EQUAL)}; there are {', '.join(EQUAL)}")
    stage = recipe.stages[-1]
    sources = sources_by_kind(stage)
    members = {kind: members_of(kind, kinds, sources) for kind in kinds}
    if not members:
        raise InputError(f"no kinds to compare; the recipe has {', '.join(sources)}, and there is mixed")
    names = list(dict.fromkeys(name for own in members.values() for name in own))
    read = {name: [read_samples(unlimited(source), policy(recipe)) for source in sources[name]] for name in names}
    pools = {name: Pool(sources[name], [[1] * len(part) for part in read[name]]) for name in names}
    fewest = smallest(pools, members.values())
    if equal == "supervised-tokens":
        count = tokenized or supervised_tokens(recipe)
        pools = {name: Pool(sources[name], [count(part) for part in read[name]]) for name in names}
    share = smallest(pools, members.values())
    if share < 1:
        raise InputError(f"stage {stage.name}: a kind has no supervised token within max_length; raise it")
    rows = []
    for kind, label in zip(kinds, numbered(kinds), strict=True):
        chosen = {}
        for name, part in zip(members[kind], apportion(share, [1] * len(members[kind])).tolist(), strict=True):
            chosen[name] = pools[name].nearest(part)
        samples = sum(chosen.values())
        changed = prepared(
            recipe,
            data=[source.model_dump(mode="json") for name, n in chosen.items() for source in pools[name].first(n)],
            max_steps=stage.max_steps if equal == "samples" else steps_for(stage, samples, fewest),
        )
        factors = {"kind": kind, "samples": samples}
        if equal == "supervised-tokens":
            factors["supervised_tokens"] = sum(int(pools[name].sums[n]) for name, n in chosen.items())
            factors["steps"] = changed.stages[-1].max_steps
        rows.append(Variant(label, f"{slug(label)}-{equal}-{samples}", changed, factors))
    return [replace(rows[0], baselines=BASELINES), *rows[1:], *stage1_variants(recipe)]


def sources_by_kind(stage: Stage) -> dict[str, list[DataSource]]:
    """The stage's files by kind, as `data.read_samples` names it."""
    found: dict[str, list[DataSource]] = {}
    for source in stage.data:
        found.setdefault(source.kind or Path(source.path).stem, []).append(source)
    return found


def members_of(kind: str, listed: Sequence[str], sources: Mapping[str, list[DataSource]]) -> list[str]:
    """The kinds that a row takes its samples from. InputError for one that the recipe lacks."""
    if kind in sources:
        return [kind]
    if kind != MIXED:
        known = [*sources, MIXED]
        raise InputError(
            f"the recipe's last stage has no data of kind {kind!r}{did_you_mean(kind, known)}.\n"
            f"There are {', '.join(known)}; a file's `kind` says so, else its name."
        )
    others = [name for name in dict.fromkeys(listed) if name in sources]
    return others if len(others) > 1 else list(sources)


def unlimited(source: DataSource) -> DataSource:
    return source.model_copy(update={"limit": None})


def smallest(pools: Mapping[str, Pool], rows: Iterable[Sequence[str]]) -> int:
    """The most that every row can have: what its members hold, each as much as the one that holds least."""
    return min(len(own) * min(pools[name].total for name in own) for own in rows)


def steps_for(stage: Stage, samples: int, fewest: int) -> int:
    """Steps that pass over `samples` as often as the stage passes over the `fewest` samples of the other experiment."""
    passes = stage.epochs if stage.max_steps is None else stage.max_steps * stage.batch_size / fewest
    return max(1, round(passes * samples / stage.batch_size))


def supervised_tokens(recipe: Recipe) -> Tokenized:
    """Samples -> tokens of each that the last stage's loss counts, after the chat template and `max_length`. Where
    features are cached every image has as many tokens as the first, and no other is opened.

    Raises:
        InputError: the model's processor cannot be read, a broken image, a conversation that the template refuses.
    """
    stage = prepared(recipe).stages[-1]
    collator = Collator(processor_of(recipe.model), stage.max_length)
    of_size, known = lru_cache(collator.image_tokens), dict[Path, int]()

    def tokens(sample: Sample) -> list[int]:
        for path in sample.images:
            if path not in known:
                known[path] = of_size(look_at(path, sample.where)[0])
        return [known[path] for path in sample.images]

    def count(samples: Sequence[Sample]) -> list[int]:
        shown = next((sample for sample in samples if sample.images), None)
        each = tokens(shown)[0] if stage.cache_features and shown is not None else None
        found = []
        for sample in samples:
            lengths = tokens(sample) if each is None else [each] * len(sample.images)
            try:
                found.append(sum(collator.chat.encode(sample.turns, lengths, stage.max_length).supervised))
            except InputError as error:
                raise InputError(f"{sample.where}: {error}") from error
        return found

    return count
