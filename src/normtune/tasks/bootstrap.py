"""How sure a score is: 95 % intervals by resampling images, and the paired difference of two results.

Scope: percentile bootstrap over units (images; MME: the two questions of an image). A benchmark gives its sums per unit
and how its figures follow from sums over all units, so that a resample is one matrix product and nothing is scored
twice. Units are drawn within strata of fixed size (MME's subtasks, whose scores are added up; elsewhere there is one).
Not here: intervals of METEOR, whose aggregate is computed inside its jar. Source: Efron and Tibshirani, An Introduction
to the Bootstrap, 1993, chapter 13.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from normtune.errors import InputError

RESAMPLES = 1000
_DRAWS_AT_ONCE = 400_000  # a few MB
Figures = Callable[[np.ndarray], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Statistics:
    """Sums of a result by unit: `sums` [U, K] float64, the units' names and strata, and `figures`, which maps sums over
    units [R, K] to the scores [R] of each name. Scores are additive in nothing but these sums."""

    units: tuple[str, ...]
    strata: tuple[str, ...]
    sums: np.ndarray
    figures: Figures

    @classmethod
    def gather(
        cls,
        units: Sequence[str],
        strata: Sequence[str],
        rows: Sequence[Sequence[float]] | np.ndarray,
        width: int,
        figures: Figures,
    ) -> Statistics:
        """From one row of `width` numbers per item, with its unit and stratum; rows of one unit are added up."""
        places: dict[tuple[str, str], int] = {}
        index = [places.setdefault(key, len(places)) for key in zip(strata, units, strict=True)]
        sums = np.zeros((len(places), width))
        np.add.at(sums, index, np.asarray(rows, dtype=np.float64).reshape(len(index), width))
        return cls(tuple(unit for _, unit in places), tuple(stratum for stratum, _ in places), sums, figures)

    def totals(self) -> dict[str, float]:
        """The scores themselves, from the sums over all units."""
        return {name: float(value[0]) for name, value in self.figures(self.sums.sum(axis=0, keepdims=True)).items()}


def share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """`part / whole` elementwise, 0 where `whole` is 0: the official programs divide by zero there."""
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=np.asarray(whole) != 0)


def intervals(statistics: Statistics, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, list[float]]:
    """The 95 % interval [low, high] of each figure; the same seed gives the same interval. Nothing scored gives {}."""
    if not statistics.units:
        return {}
    return percentiles(statistics.figures(resampled(statistics, statistics.sums, resamples, seed)))


def difference(
    ours: Statistics, theirs: Statistics, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """For each figure `difference` (ours - theirs) and its 95 % `interval`, both results resampled alike, so that what
    makes a question hard for both cancels. InputError when they are not about the same units."""
    width = ours.sums.shape[1]
    both = np.concatenate([ours.sums, aligned(theirs, ours)], axis=1)
    if not ours.units:
        return {}
    totals = resampled(ours, both, resamples, seed)
    mine, yours = ours.figures(totals[:, :width]), theirs.figures(totals[:, width:])
    spread = percentiles({name: mine[name] - yours[name] for name in mine})
    first, second = ours.totals(), theirs.totals()
    return {name: {"difference": first[name] - second[name], "interval": spread[name]} for name in first}


def aligned(result: Statistics, reference: Statistics) -> np.ndarray:
    """The sums of `result` in the reference's order of units: [U, K]. InputError when they are not about the same."""
    keys = list(zip(reference.strata, reference.units, strict=True))
    places = {key: n for n, key in enumerate(zip(result.strata, result.units, strict=True))}
    other = set(keys) ^ set(places)
    if other:
        raise InputError(
            f"the two results are not about the same images ({len(other)} are in one only, as {min(other)[1]!r}).\n"
            "Compare results of the same files, limit and seed."
        )
    return result.sums[[places[key] for key in keys]]


def percentiles(values: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """The 95 % interval of each array [resamples]."""
    return {name: [float(v) for v in np.percentile(value, [2.5, 97.5])] for name, value in values.items()}


def resampled(statistics: Statistics, sums: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Sums over units drawn with replacement within each stratum: [resamples, K]."""
    generator = np.random.default_rng(seed)
    strata = np.asarray(statistics.strata)
    totals = np.zeros((resamples, sums.shape[1]))
    for stratum in dict.fromkeys(statistics.strata):
        own = sums[strata == stratum]
        size = len(own)
        step = max(1, _DRAWS_AT_ONCE // size)
        for start in range(0, resamples, step):
            count = min(step, resamples - start)
            drawn = generator.integers(0, size, (count, size)) + size * np.arange(count)[:, None]
            weights = np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size)
            totals[start : start + count] += weights @ own
    return totals
