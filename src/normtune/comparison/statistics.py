"""How sure the table is: scores of rows with intervals over seeds and images, paired differences, and what is best.

Scope: percentile bootstrap in which each resample draws the seeds with replacement and, for each benchmark, the images
with replacement within strata; the same draws for all rows, so that what all rows share cancels in differences. What
the draw of seeds adds to a resample is widened by `widening`, since few seeds tell their own spread badly; one seed
tells nothing of it. Not here: sums per image (`tasks`), which rows there are. Source: Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, chapter 13; seeds and images as crossed factors: Owen, The pigeonhole bootstrap,
Annals of Applied Statistics 1(2), 2007; the widening: Hesterberg, What Teachers Should Know About the Bootstrap, The
American Statistician 69(4), 2015 (narrowness bias, t quantile).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from normtune.evaluation import Asked, read_measured
from normtune.tasks import Statistics
from normtune.tasks.bootstrap import RESAMPLES, aligned, percentiles, resampled

REFERENCES = ("lora", "full")
TEXT = "text"  # what the model knew before it saw images: beside the average, not in it
AVERAGE = "average"
# the 97.5 % quantile of Student's t with 1, 2, ... degrees of freedom; NORMAL beyond
STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
NORMAL = 1.96
MOST_PAIRED = 24  # rows of which every pair is compared
Results = Mapping[int, Mapping[str, Statistics]]  # seed -> benchmark -> sums per image


@dataclass(frozen=True)
class Estimate:
    """A figure of a row: its value, and its values under the resamples, `drawn` [R] float64."""

    mean: float
    drawn: np.ndarray

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.mean - other.mean, self.drawn - other.drawn)

    @property
    def interval(self) -> list[float]:
        """95 %; of the resamples that have a value."""
        there = self.drawn[np.isfinite(self.drawn)]
        return percentiles({"": there})[""] if len(there) else [self.mean, self.mean]

    def to_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "interval": self.interval}

    def to_share(self) -> dict[str, Any]:
        """Of a figure between 0 and 1, which a widened interval may leave."""
        return {"mean": self.mean, "interval": [min(1.0, max(0.0, end)) for end in self.interval]}


def mean_of(estimates: Iterable[Estimate]) -> Estimate:
    """The average figure, resample by resample; of a resample without a value in one of them that of the rest."""
    own = list(estimates)
    drawn = np.stack([estimate.drawn for estimate in own])
    there = np.isfinite(drawn)
    totals, counts = np.where(there, drawn, 0.0).sum(axis=0), there.sum(axis=0)
    drawn = np.divide(totals, counts, out=np.full(len(totals), np.nan), where=counts > 0)
    return Estimate(float(np.mean([estimate.mean for estimate in own])), drawn)


def summarize(
    cells: Mapping[str, Results],
    references: Sequence[str] = REFERENCES,
    resamples: int = RESAMPLES,
    controls: Collection[str] = (),
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Rows and winners of a table.

    Args:
        cells: label of a row -> seed -> benchmark -> its sums per image. Rows may have different seeds: a resample's
            mean of a row is over those of the drawn seeds that it has, over all of its own where it has none of them.
        references: rows that others are related to.
        controls: labels that are never winners.

    Returns:
        By label {"scores": {benchmark: {"mean", "interval", "per_seed", "figures"}}, "average": {"mean", "interval"},
        "relative": {reference: {"mean", "interval"}}, "differences": {a later row: {benchmark or "average":
        {"mean", "interval"}}}, "interval_over": ["images"] with one seed, else ["seeds", "images"]}. The average is
        that of the benchmarks' headline scores without `text`, None for a row that lacks one; a relative average is the
        mean over these benchmarks of score / reference's score, minus 1, and names its "tasks" where the reference
        scores 0 in others. Of more than MOST_PAIRED rows there are no differences.
        Winners: {benchmark or "average": {"best": label, "tied": labels}}: the highest mean among two rows or more that
        have as many seeds as any candidate, and all candidates that its paired 95 % interval does not put below it.

    Raises:
        InputError: rows that were not asked the same questions.
    """
    figures = estimates_of(cells, resamples)
    headlines = {label: {name: of["score"] for name, of in own.items()} for label, own in figures.items()}
    names = dict.fromkeys(name for own in headlines.values() for name in own)
    tasks = [name for name in names if name != TEXT]
    for own in headlines.values():
        if tasks and all(name in own for name in tasks):
            own[AVERAGE] = mean_of(own[name] for name in tasks)
    rows = {}
    for number, (label, own) in enumerate(headlines.items()):
        later = dict(list(headlines.items())[number + 1 :]) if len(headlines) <= MOST_PAIRED else {}
        rows[label] = {
            "scores": {name: score_of(figures[label][name], cells[label], name) for name in names if name in own},
            "average": own[AVERAGE].to_share() if AVERAGE in own else None,
            "relative": relatives(own, {ref: headlines[ref] for ref in references if ref in headlines}, tasks),
            "differences": {other: differences(own, theirs, [*tasks, AVERAGE]) for other, theirs in later.items()},
            "interval_over": ["seeds", "images"] if len(cells[label]) > 1 else ["images"],
        }
    candidates = {label: own for label, own in headlines.items() if label not in controls}
    most = max((len(cells[label]) for label in candidates), default=0)
    whole = {label for label in candidates if len(cells[label]) == most}  # a row that lost its bad seeds must not win
    return rows, winners_of(candidates, whole, [*tasks, AVERAGE])


def estimates_of(cells: Mapping[str, Results], resamples: int) -> dict[str, dict[str, dict[str, Estimate]]]:
    """Label -> benchmark -> figure -> estimate, over the row's seeds; without benchmarks that were not scored."""
    weights = seed_weights({label: list(by_seed) for label, by_seed in cells.items()}, resamples)
    names = dict.fromkeys(name for by_seed in cells.values() for own in by_seed.values() for name in own)
    found: dict[str, dict[str, dict[str, Estimate]]] = {label: {} for label in cells}
    for name in names:
        members = {
            (label, seed): own[name]
            for label, by_seed in cells.items()
            for seed, own in by_seed.items()
            if name in own and own[name].units
        }
        totals = resampled_alike(list(members.values()), resamples, zlib.crc32(name.encode()))
        drawn = {key: members[key].figures(own) for key, own in zip(members, totals, strict=True)}
        for label, by_seed in cells.items():
            if not by_seed or not all((label, seed) in members for seed in by_seed):
                continue
            values = [members[label, seed].totals() for seed in by_seed]
            found[label][name] = {
                figure: over_seeds(
                    [own[figure] for own in values], [drawn[label, seed][figure] for seed in by_seed], weights[label]
                )
                for figure in values[0]
            }
    return found


def resampled_alike(results: Sequence[Statistics], resamples: int, seed: int) -> list[np.ndarray]:
    """Sums over the same drawn units for each of the results: [resamples, K] each."""
    # the same generator anew for each: side by side in one array they would be large (VQAv2: 40,000 images)
    return [resampled(results[0], aligned(own, results[0]), resamples, seed) for own in results]


def seed_weights(seeds: Mapping[str, Sequence[int]], resamples: int) -> dict[str, np.ndarray]:
    """For each row the weights [resamples, its seeds] of one draw of seeds with replacement; see `summarize`."""
    every = sorted({seed for own in seeds.values() for seed in own})
    drawn = np.random.default_rng(0).integers(0, max(1, len(every)), (resamples, len(every)))
    counts = {seed: (drawn == number).sum(axis=1) for number, seed in enumerate(every)}
    found = {}
    for label, own in seeds.items():
        weights = np.array([counts[seed] for seed in own], dtype=np.float64).reshape(len(own), resamples).T
        weights[weights.sum(axis=1) == 0] = 1.0
        found[label] = weights / weights.sum(axis=1, keepdims=True)
    return found


def over_seeds(values: Sequence[float], drawn: Sequence[np.ndarray], weights: np.ndarray) -> Estimate:
    """The mean over a row's seeds: of each its value, and its values under the resamples of the images, [R] each, with
    the weights [R, seeds] of the drawn seeds. How far a draw of seeds moves the mean over all images is widened; this
    is linear in the values, so that what rows of the same seeds share still cancels."""
    mean = float(np.mean(values))
    moved = weights @ np.asarray(values) - mean
    return Estimate(mean, (np.stack(drawn, axis=1) * weights).sum(axis=1) + (widening(len(values)) - 1) * moved)


def widening(seeds: int) -> float:
    """By how much a bootstrap over so few seeds is too narrow: sqrt(n / (n - 1)), as it divides by n, times the
    quantile of Student's t over the normal one, as the spread is itself an estimate."""
    if seeds < 2:
        return 1.0  # all the weight is on the one seed
    quantile = STUDENT[seeds - 2] if seeds - 2 < len(STUDENT) else NORMAL
    return math.sqrt(seeds / (seeds - 1)) * quantile / NORMAL


def score_of(figures: Mapping[str, Estimate], by_seed: Results, name: str) -> dict[str, Any]:
    """A benchmark's part of a row."""
    return {
        **figures["score"].to_share(),
        "per_seed": {str(seed): own[name].totals()["score"] for seed, own in by_seed.items()},
        "figures": {figure: estimate.to_dict() for figure, estimate in figures.items() if figure != "score"},
    }


def relatives(
    own: Mapping[str, Estimate], references: Mapping[str, Mapping[str, Estimate]], tasks: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """The relative average against each reference; a task in which the reference scores 0 is left out."""
    found = {}
    for label, reference in references.items():
        if AVERAGE not in own or AVERAGE not in reference:
            continue
        used = [name for name in tasks if reference[name].mean > 0]
        if used:
            found[label] = mean_of(ratio(own[name], reference[name]) for name in used).to_dict()
            found[label] |= {"tasks": used} if len(used) < len(tasks) else {}
    return found


def ratio(own: Estimate, reference: Estimate) -> Estimate:
    """own / reference - 1; no value in resamples where the reference is 0."""
    nothing = np.full(len(own.drawn), np.nan)
    drawn = np.divide(own.drawn, reference.drawn, out=nothing, where=reference.drawn > 0)
    return Estimate(own.mean / reference.mean - 1, drawn - 1)


def differences(
    own: Mapping[str, Estimate], other: Mapping[str, Estimate], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """This row minus the other, paired."""
    return {name: (own[name] - other[name]).to_dict() for name in names if name in own and name in other}


def winners_of(
    rows: Mapping[str, Mapping[str, Estimate]], whole: Collection[str], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """See `summarize`; `whole` are the rows that may be best."""
    found = {}
    for name in names:
        scored = {label: own[name] for label, own in rows.items() if name in own}
        able = [label for label in scored if label in whole]
        if len(able) < 2:
            continue
        best = max(able, key=lambda label: scored[label].mean)
        tied = [label for label, own in scored.items() if label != best and (scored[best] - own).interval[0] <= 0]
        found[name] = {"best": best, "tied": tied}
    return found


def load_statistics(result: Path, asked: Sequence[Asked]) -> dict[str, Statistics]:
    """The sums per image of a result on disk, by benchmark, from the answers beside it.

    Raises:
        InputError: it is no result, or one of other questions.
    """
    return {name: measured.statistics for name, measured in read_measured(result, asked).items()}


def band(rates: Sequence[float], scores: Sequence[float], share: float = 0.98) -> tuple[float, float, float]:
    """(low, high, decades) of the rates around the best one at which the score is at least `share` of the best score,
    with scores linear in log rate between two rates.

    An end of the sweep that is still in the band is its end: the true band may go on there. A best score that is not
    positive has the best rate alone.
    """
    order = np.argsort(rates)
    places, values = np.log10(np.asarray(rates, dtype=np.float64)[order]), np.asarray(scores, dtype=np.float64)[order]
    best = int(np.argmax(values))
    floor = share * values[best]
    if values[best] <= 0:
        return float(rates[order[best]]), float(rates[order[best]]), 0.0

    def end(step: int) -> float:
        place = best
        while 0 <= place + step < len(values) and values[place + step] >= floor:
            place += step
        after = place + step
        if not 0 <= after < len(values):
            return float(places[place])
        way = (values[place] - floor) / (values[place] - values[after])
        return float(places[place] + way * (places[after] - places[place]))

    low, high = end(-1), end(1)
    return float(10**low), float(10**high), high - low
