"""The experiments: which variants are run, in which phases, and what is read off them.

Each takes the open folder of a comparison and what was asked for, and returns a `Found`. Not here: the folder
(`running`), the variants themselves (`variants`, `kinds`, `sweeps`), the report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from normtune.comparison.cells import Cell
from normtune.comparison.kinds import kind_variants
from normtune.comparison.results import curves_of, rows_of
from normtune.comparison.running import Part, Place
from normtune.comparison.sweeps import (
    align_sweep,
    data_sweep,
    norm_count_variants,
    norm_role_variants,
    rate_sweep,
    vision_sweep,
)
from normtune.comparison.variants import Variant, search_variants, strategy_variants
from normtune.errors import InputError, JobError
from normtune.recipe import Recipe
from normtune.runlog import read_json

KEPT = 0.98  # share of a score that counts as kept
RANKINGS = ("change", "fisher")


@dataclass(frozen=True)
class Request:
    """What a comparison was asked for; see `compare`."""

    strategies: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    equal: str = "samples"
    sweep: str | None = None
    seeds: tuple[int, ...] = (0,)
    learning_rates: str | tuple[float, ...] | None = None
    candidates: int = 5
    encoders: tuple[str, ...] = ()
    ranking: str = "change"
    analyzed: bool = True


@dataclass
class Found:
    """What an experiment found: rows and winners as `results.rows_of` gives them, and the rest of `report.json`."""

    part: Part
    variants: Sequence[Variant]
    cells: dict[str, dict[int, Cell]]
    rows: list[dict[str, Any]]
    winners: dict[str, Any]
    search: dict[str, Any] | None = None
    curves: list[dict[str, Any]] | None = None
    axis: dict[str, Any] | None = None
    findings: list[str] = field(default_factory=list)


def finish(place: Place, request: Request, variants: Sequence[Variant], part: Part, analyzed: bool = False) -> Found:
    """Runs the variants with all seeds and reads the table off them."""
    cells = place.run(variants, request.seeds, part, analyzed and request.analyzed)
    rows, winners = rows_of(place, variants, cells, part)
    return Found(part, variants, {label: place.good(by) for label, by in cells.items()}, rows, winners)


def by_strategy(place: Place, request: Request) -> Found:
    """Every strategy from the same start; with `learning_rates` each at the rate that did best on `evaluate.dev`."""
    names = list(request.strategies)
    search, rates = None, None
    if request.learning_rates is not None:
        search = search_rates(place, request)
        rates = {name: tried["learning_rate"] for name, all_ in search.items() for tried in all_ if tried["chosen"]}
    found = finish(place, request, strategy_variants(place.recipe, names, rates), "data", analyzed=True)
    found.search = search
    return found


def search_rates(place: Place, request: Request) -> dict[str, list[dict[str, Any]]]:
    """Every candidate of every strategy with the first seed, scored on `evaluate.dev`; the best is `chosen`."""
    wanted = request.learning_rates
    assert wanted is not None
    given = wanted if isinstance(wanted, str) else list(wanted)
    candidates = search_variants(place.recipe, list(request.strategies), given, request.candidates)
    variants = list({v.folder: v for own in candidates.values() for v in own}.values())
    cells = place.run(variants, request.seeds[:1], "dev")
    rows, _ = rows_of(place, variants, cells, "dev")
    by_folder = dict(zip((v.folder for v in variants), rows, strict=False))
    search = {}
    for name, own in candidates.items():
        tried = [by_folder[v.folder] | {"learning_rate": v.factors["learning_rate"]} for v in own]
        scored = [row for row in tried if row["average"]]  # none: the strategy fails at its own rate, in its row
        best = max(scored, key=lambda row: row["average"]["mean"]) if scored else None
        search[name] = [
            {
                "learning_rate": row["learning_rate"],
                "score": row["average"] and row["average"]["mean"],
                "scores": {task: score["mean"] for task, score in row["scores"].items()},
                "chosen": row is best,
            }
            for row in tried
        ]
    return search


def by_kind(place: Place, request: Request) -> Found:
    """One strategy (the recipe's, or the one asked for) on each kind of data."""
    recipe = place.recipe
    if request.strategies:
        (variant,) = strategy_of(recipe, request.strategies)
        recipe = variant.recipe
    return finish(place, request, kind_variants(recipe, list(request.kinds), request.equal), "data", analyzed=True)


def strategy_of(recipe: Recipe, strategies: Sequence[str]) -> list[Variant]:
    """The variants of the strategies alone, without controls. InputError for more than one."""
    if len(strategies) != 1:
        raise InputError(f"kinds of data are compared with one strategy, not with {', '.join(strategies)}")
    return [v for v in strategy_variants(recipe, list(strategies), None) if not v.control][:1]


def sweep_rates(place: Place, request: Request) -> Found:
    """How wide the band of learning rates is in which a strategy keeps its score."""
    found = finish(place, request, rate_sweep(place.recipe, list(request.strategies)), "dev")
    found.curves = curves_of(found.rows, "strategy", "learning_rate", tolerance=True)
    found.axis = {"x": "learning rate", "log": True}
    for curve in found.curves:
        band = curve["band"]
        if band is not None:
            more = " or more: it reaches the end of the sweep" if band["open"] else ""
            found.findings.append(
                f"{curve['name']}: within 2 % of its best from {band['low']:.2g} to {band['high']:.2g} "
                f"({band['decades']:.2f} decades{more}), by {of_seeds(request)}"
            )
    return found


def sweep_norms(place: Place, request: Request) -> Found:
    """Which norms matter: by role, and the smallest number of them that keeps the score of all."""
    if request.strategies:
        raise InputError("--sweep norms trains sets of norms; leave --strategies out")
    if request.ranking not in RANKINGS:
        raise InputError(f"ranking {request.ranking!r} is unknown; there are {', '.join(RANKINGS)}")
    whole = [v for v in strategy_variants(place.recipe, ["layernorm-simple"], None) if not v.control]
    cells = place.run(whole, request.seeds, "dev", analyzed=True)
    trained = place.good(cells[whole[0].label])
    if request.seeds[0] not in trained:
        raise JobError(f"layernorm-simple failed, and with it the ranking: {next(iter(place.failed.values()), '')}")
    document = read_json(trained[request.seeds[0]].analysis, "analysis")
    roles = {gain["name"]: gain["role"] for gain in document["gains"]}
    counts = norm_count_variants(place.recipe, ranked(document, request.ranking))
    variants = [*whole, *norm_role_variants(place.recipe, roles), *counts]
    found = finish(place, request, variants, "dev")
    counted = [row for row in found.rows if "count" in row["factors"] and row["average"]]
    found.curves = curves_of(counted, "strategy", "count")
    found.axis = {"x": "number of norms", "log": True}
    total, best = sum(gain["trained"] for gain in document["gains"]), found.rows[0]["average"]
    if best is not None:
        few = fewest({row["factors"]["count"]: row["average"]["mean"] for row in counted}, KEPT * best["mean"], total)
        found.findings.append(
            f"ranked by {request.ranking}, {few} of {total} norms keep the score of all within 2 %, as do all larger "
            f"sets that were tried, by {of_seeds(request)}"
        )
    return found


def fewest(means: Mapping[int, float], wanted: float, total: int) -> int:
    """The smallest count from which on every mean reaches what is wanted; a lucky one below does not count."""
    few = total
    for count in sorted(means, reverse=True):
        if means[count] < wanted:
            break
        few = min(few, count)
    return few


def of_seeds(request: Request) -> str:
    """What a finding rests on."""
    return f"the means of {len(request.seeds)} seeds" if len(request.seeds) > 1 else "one seed"


def ranked(document: Mapping[str, Any], ranking: str) -> list[str]:
    """The trained norms, the most important first: by |dg| / |g|, or by Fisher information per gain at the stage's
    start (the mean of squared gradients: Kirkpatrick et al., arXiv 1612.00796; of batches instead of samples)."""
    trained = {gain["name"]: gain["change"] for gain in document["gains"] if gain["trained"]}
    if ranking == "change":
        return sorted(trained, key=lambda name: -trained[name])
    start = document["gradients"]["checkpoints"][0]["norms"]
    return sorted(
        trained, key=lambda name: -(start[name]["norm"] ** 2 / start[name]["values"] + start[name]["variance"])
    )


def sweep_align(place: Place, request: Request) -> Found:
    """Whether a longer stage 1 can replace stage 2."""
    found = finish(place, request, align_sweep(place.recipe, list(request.strategies)), "dev")
    found.curves = curves_of(found.rows, "strategy", "align_steps")
    found.axis = {"x": "steps of stage 1", "log": False}
    return found


def sweep_vision(place: Place, request: Request) -> Found:
    """Norms and connector, each alone and together, under different encoders."""
    return finish(place, request, vision_sweep(place.recipe, list(request.encoders), list(request.strategies)), "dev")


def sweep_data(place: Place, request: Request) -> Found:
    """How the score grows with the number of samples, and where one strategy overtakes another."""
    found = finish(place, request, data_sweep(place.recipe, list(request.strategies)), "dev")
    found.curves = curves_of(found.rows, "strategy", "samples")
    found.axis = {"x": "samples", "log": True}
    found.findings = [f"{sentence}, by {of_seeds(request)}" for sentence in overtakes(found.curves)]
    return found


def overtakes(curves: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each pair of curves whose order changes once, where."""
    found = []
    for place, one in enumerate(curves):
        for other in curves[place + 1 :]:
            if one["x"] != other["x"]:
                continue
            signs = [a > b for a, b in zip(one["mean"], other["mean"], strict=True)]
            turns = [n for n in range(1, len(signs)) if signs[n] != signs[n - 1]]
            if len(turns) == 1:
                first, second = (one, other) if signs[-1] else (other, one)
                found.append(f"{first['name']} overtakes {second['name']} at {one['x'][turns[0]]:,} samples")
    return found


SWEEPS: dict[str, Callable[[Place, Request], Found]] = {
    "learning-rate": sweep_rates,
    "norms": sweep_norms,
    "align": sweep_align,
    "vision": sweep_vision,
    "data": sweep_data,
}
