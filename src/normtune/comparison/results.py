"""From finished cells to the document of a comparison: rows with scores and costs, curves, examples, provenance.

Scope: what `report.json` holds. Not here: intervals (`statistics`), the paper's claims (`claims`), HTML (`report`).
"""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from normtune.comparison.cells import Cell
from normtune.comparison.running import BEFORE, EXAM, Part, Place
from normtune.comparison.statistics import band, load_statistics, summarize
from normtune.comparison.variants import Variant
from normtune.evaluation.journal import read_answers
from normtune.evaluation.questions import Asked
from normtune.images import open_image
from normtune.runlog import read_json
from normtune.tasks import Item

EXAMPLES = 6
PIXELS = 320  # largest side of an example's image
MEASURED = ("step_seconds", "seconds", "peak_bytes")  # that differ from process to process
BASELINES = {"blind": "no image", "shuffled": "another image"}


def rows_of(
    place: Place, variants: Sequence[Variant], cells: Mapping[str, Mapping[int, Cell]], part: Part
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of the table, those of the baselines at the end, and which row is best at what."""
    asked = place.questions(part)
    found: dict[str, dict[int, dict[str, Any]]] = {}
    rows: list[dict[str, Any]] = []
    for variant in variants:
        own = place.good(cells[variant.label])
        found[variant.label] = {s: load_statistics(c.result(EXAM[part]), asked) for s, c in own.items()}
        rows.append(row_of(place, variant, cells[variant.label]))
    for variant in variants:
        for baseline in variant.baselines:
            label = f"{variant.label}, {BASELINES[baseline]}"
            own = place.good(cells[variant.label])
            found[label] = {s: load_statistics(c.result(baseline), asked) for s, c in own.items()}
            rows.append({**empty_row(label, variant), "control": True, "baseline": baseline, "seeds": sorted(own)})
    controls = {row["label"] for row in rows if row["control"]}
    summary, winners = summarize({label: by for label, by in found.items() if by}, controls=controls)
    before = text_before(place)
    for row in rows:
        row |= summary.get(row["label"], {})
        after = row["scores"].pop(BEFORE, None)
        if after is not None:
            change = None if before is None else after["mean"] - before
            row["text"] = {"before": before, "after": after["mean"], "interval": after["interval"], "change": change}
    winners.pop(BEFORE, None)
    return rows, winners


def empty_row(label: str, variant: Variant) -> dict[str, Any]:
    """A row of which nothing is known yet."""
    return {
        "label": label,
        "factors": variant.factors,
        "control": variant.control,
        "baseline": "none",
        "seeds": [],
        "failed": [],
        "learning_rate": None,
        "scores": {},
        "average": None,
        "relative": {},
        "text": None,
        "cost": None,
    }


def row_of(place: Place, variant: Variant, cells: Mapping[int, Cell]) -> dict[str, Any]:
    """A variant's row without its scores."""
    row = empty_row(variant.label, variant)
    good = place.good(cells)
    row["seeds"] = sorted(good)
    row["failed"] = [
        {"seed": seed, "error": place.failed[cell.folder]} for seed, cell in cells.items() if seed not in good
    ]
    if variant.trains:
        row["learning_rate"] = variant.recipe.stages[-1].learning_rate
        row["cost"] = cost_of([cell.cost() or {} for cell in good.values()])
    return row


def cost_of(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Of several seeds: counts are those of the first, times and peaks the medians."""
    if not costs:
        return None
    return {**costs[0], **{key: statistics.median(cost[key] for cost in costs) for key in MEASURED}}


def text_before(place: Place) -> float | None:
    """The untuned base's score in the questions without an image."""
    cell = place.before
    if cell is None or not cell.result("test").is_file():
        return None
    return float(read_json(cell.result("test"), "result")["scores"][BEFORE]["score"])


def curves_of(rows: Sequence[Mapping[str, Any]], name: str, x: str, tolerance: bool = False) -> list[dict[str, Any]]:
    """One curve of the average score per value of the factor `name`, over the factor `x`; with `tolerance` the band of
    `x` in which the score is within 2 % of the best; a row that failed ends it."""
    found = []
    rows = [row for row in rows if x in row["factors"] and row["baseline"] == "none"]
    for value in dict.fromkeys(row["factors"].get(name) for row in rows):
        whole = sorted((r for r in rows if r["factors"].get(name) == value), key=lambda row: row["factors"][x])
        own = [row for row in whole if row["average"]]
        curve: dict[str, Any] = {
            "name": str(value),
            "x": [row["factors"][x] for row in own],
            "mean": [row["average"]["mean"] for row in own],
            "interval": [row["average"]["interval"] for row in own],
            "failed": [row["factors"][x] for row in whole if not row["average"]],
            "band": None,
        }
        if tolerance and any(curve["mean"]):
            scores = [row["average"]["mean"] if row["average"] else 0.0 for row in whole]
            places = [row["factors"][x] for row in whole]
            low, high, decades = band(places, scores)
            open_ends = [end for end, at, last in (("low", low, places[0]), ("high", high, places[-1])) if at == last]
            curve["band"] = {"low": low, "high": high, "decades": decades, "open": open_ends}
        found.append(curve)
    return found


def examples_of(
    asked: Sequence[Asked], cells: Mapping[str, Mapping[int, Cell]], exam: str, count: int = EXAMPLES
) -> list[dict[str, Any]]:
    """A few questions with every row's answer (its first seed's), benchmarks in turn, those first on which rows
    differ."""
    firsts = {label: next(iter(by.values())) for label, by in cells.items() if by}
    answers = {label: read_answers(cell.result(exam).with_suffix("")) for label, cell in firsts.items()}
    pools = []
    for one in asked:
        pool = [(item, {label: given[one.name][item.id] for label, given in answers.items()}) for item in one.items]
        pool = [entry for entry in pool if entry[0].image is not None]
        pool.sort(key=lambda entry: -len(set(entry[1].values())))  # stable: else in the files' order
        pools.append((one, pool))
    pools = [entry for entry in pools if entry[1]]
    shown: list[dict[str, Any]] = []
    used = set()
    for number in range(count if pools else 0):
        one, pool = pools[number % len(pools)]
        item, given = next(((i, g) for i, g in pool if i.image not in used), pool[0])
        used.add(item.image)
        shown.append({**example(one, item), "answers": given})
    return shown


def example(asked: Asked, item: Item) -> dict[str, Any]:
    truth = asked.task.reference(item)
    return {"image": thumbnail(item), "task": asked.name, "question": item.question, "truth": truth}


def thumbnail(item: Item) -> str:
    """The image as a data URI: PNG where it is small, else JPEG."""
    assert item.image is not None
    picture = open_image(item.image, f"item {item.id}")
    kind = "PNG" if max(picture.size) <= 128 else "JPEG"
    picture.thumbnail((PIXELS, PIXELS))
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
