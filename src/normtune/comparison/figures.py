"""Plots of a comparison: scores, score against cost, candidates of the search, curves of a sweep.

Scope: from the result document to figures; which colour a row has. Not here: tables and text (`report`), what analysis
found (`analysis.figures`), how a plot looks (`reporting`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from normtune.comparison.outcome import Row, over
from normtune.reporting import Figure, Table, plots
from normtune.reporting.numbers import human_bytes, interval, rate, score
from normtune.reporting.palette import assign
from normtune.reporting.plots import Mark, Series

MOST_ROWS = 20  # of a plot with a row per label: with more nothing can be told apart


def color_of(document: Mapping[str, Any]) -> dict[str, str]:
    """A colour's name per row; rows of one curve share the curve's."""
    rows = document["rows"]
    if not document["curves"]:
        return assign([row["label"] for row in rows], [row["label"] for row in rows if row["control"]])
    named = assign(curve["name"] for curve in document["curves"])
    return {row["label"]: named.get(str(row["factors"].get("strategy")), "quiet") for row in rows}


def score_figure(document: Mapping[str, Any], colors: Mapping[str, str]) -> list[Figure]:
    """A panel per benchmark and one for the average; text-only questions with a line at the untuned LLM's score."""
    rows = [row for row in document["rows"] if row["average"]]
    if not rows or len(rows) > MOST_ROWS:
        return []
    panels = [plots.points([_mark(row, row["average"], colors) for row in rows], title="average")]
    for name in document["benchmarks"]:
        marks = [_mark(row, row["scores"][name], colors) for row in rows if name in row["scores"]]
        if marks:
            count = document["questions"].get(name)
            panels.append(plots.points(marks, title=f"{name}, {count:,} questions" if count else name))
    told = [row for row in rows if row["text"]]
    if told:
        marks = [
            Mark(row["label"], row["text"]["after"], colors[row["label"]], row["text"]["interval"]) for row in told
        ]
        panels.append(plots.points(marks, title="text alone, without images", reference=told[0]["text"]["before"]))
    after = " Dashed: the untuned LLM." if told else ""
    return [Figure(panels, f"Scores by row. {note(document)}{after}")]


def cost_figure(document: Mapping[str, Any], colors: Mapping[str, str]) -> list[Figure]:
    """Average score against trained parameters; peak memory and bytes kept for backward."""
    rows = [row for row in document["rows"] if row["average"] and row["baseline"] == "none"]
    trained = [row for row in rows if row["cost"]]
    if not trained or len(rows) > MOST_ROWS:
        return []
    spots = [
        _mark(row, row["average"], colors, x=(row["cost"] or {}).get("trainable_parameters", 0) or 0) for row in rows
    ]
    peak = trained[0]["cost"]["peak_of"]
    amounts = [("peak_bytes", f"peak {peak}"), ("saved_bytes", "activations saved for backward")]
    panels = [
        plots.scatter(
            spots, title="score and size", x="trained parameters", y="average score", log_x=any(s.x for s in spots)
        )
    ]
    for key, title in amounts:
        marks = [Mark(row["label"], row["cost"][key], colors[row["label"]]) for row in trained if row["cost"].get(key)]
        if marks:
            panels.append(plots.bars(marks, title=title, form=human_bytes))
    return [Figure(panels, f"What the scores cost. {note(document)} Memory is of one machine, not repeated.")]


def note(document: Mapping[str, Any]) -> str:
    return f"Lines are 95 % intervals {over(document)}. Grey and hollow: controls."


def search_figure(search: Mapping[str, Sequence[Row]], colors: Mapping[str, str]) -> list[Figure]:
    """Score on the validation split over the candidates, a line per strategy."""
    series = []
    for name, tried in search.items():
        scored = sorted((one["learning_rate"], one["score"]) for one in tried if one["score"] is not None)
        if scored:
            series.append(Series(name, [x for x, _ in scored], [y for _, y in scored], colors.get(name, "quiet")))
    if not series:
        return []
    panel = plots.lines(series, title="validation score", x="learning rate", y="average score", log_x=True, height=300)
    legend = [(one.label, one.color) for one in series]
    return [Figure([panel], "Candidates of the search; one seed, so no intervals.", legend=legend, size="wide")]


def curve_figures(document: Mapping[str, Any]) -> list[Figure]:
    """All curves in one plot; where bands were measured, one plot per curve with its band, on one scale."""
    curves, axis = document["curves"], document["axis"] or {"x": "", "log": False}
    named = assign(curve["name"] for curve in curves)
    series = [
        Series(one["name"], one["x"], one["mean"], named[one["name"]], one["interval"], one.get("failed") or ())
        for one in curves
        if one["x"]
    ]
    if not series:
        return []
    log = axis["log"] and all(place > 0 for one in series for place in [*one.x, *one.missing])
    table = Table(
        ["", axis["x"], "average score", "95 % interval"],
        [
            [one.label, place_of(x, axis["x"]), score(y), interval(span)]
            for one in series
            for x, y, span in zip(one.x, one.y, one.intervals or [()] * len(one.x), strict=True)
        ],
    )
    whole = plots.lines(series, title="average score", x=axis["x"], log_x=log, height=300)
    figure = Figure(
        [whole],
        f"Lines at the points are 95 % intervals {over(document)}.{failed_places(curves, axis['x'])}",
        legend=[(one.label, one.color) for one in series],
        size="wide",
        table=table,
    )
    return [figure, *band_figure(curves, series, axis["x"], log)]


def band_figure(curves: Sequence[Row], series: Sequence[Series], x: str, log: bool) -> list[Figure]:
    """A panel per curve with its band, all on one scale."""
    bands = {one["name"]: one["band"] for one in curves if one.get("band")}
    shown = [one for one in series if one.label in bands]
    if not shown:
        return []
    lowest = min(low for one in series for low, _ in one.intervals or ())
    highest = max(high for one in series for _, high in one.intervals or ())
    margin = 0.05 * (highest - lowest) or 0.05
    panels = [
        plots.lines(
            [one],
            title=f"{one.label}: {band['decades']:.2f} decades{' and on' if band.get('open') else ''}",
            x=x,
            log_x=log,
            shade=(band["low"], band["high"]),
            limits=(lowest - margin, highest + margin),
            height=190,
        )
        for one in shown
        for band in [bands[one.label]]
    ]
    ends = [
        f"{name} {'below' if end == 'low' else 'above'} {place_of(band[end], x)}"
        for name, band in bands.items()
        for end in band.get("open") or ()
    ]
    more = f" “and on”: a band reaches the sweep's end and may go on ({', '.join(ends)})." if ends else ""
    return [Figure(panels, f"Shaded: the band within 2 % of the best, all on one scale.{more}")]


def failed_places(curves: Sequence[Row], x: str) -> str:
    """Which rows of the curves failed."""
    failed = [
        f"{one['name']} at {', '.join(place_of(place, x) for place in one['failed'])}"
        for one in curves
        if one.get("failed")
    ]
    return f" Crosses on the axis: failed ({'; '.join(failed)})." if failed else ""


def place_of(value: float, x: str) -> str:
    return rate(value) if x == "learning rate" else f"{value:,}"


def _mark(row: Row, found: Row, colors: Mapping[str, str], x: float = 0.0) -> Mark:
    return Mark(row["label"], found["mean"], colors[row["label"]], found.get("interval"), x)
