"""Kinds of plots: points with intervals, bars, scatter, lines, heatmap; each is SVG text for a `Figure`.

Scope: what is drawn where. Every plot is drawn for a width of 360 units, so that its text is readable on a phone;
larger screens show several side by side. Colours are names of `palette`. Intervals are drawn where they are given, and
nothing else suggests certainty. Not here: what the numbers mean (callers), what becomes of the SVG (`drawing`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from normtune.reporting.drawing import COLORS, SIZE, WIDTH, plot
from normtune.reporting.numbers import score, tick
from normtune.reporting.palette import LEVELS, MARKERS

Span = Sequence[float]  # [low, high]


@dataclass(frozen=True)
class Mark:
    """A labelled value: a row of `points` and `bars`, a point of `scatter` (at x)."""

    label: str
    value: float
    color: str = "s0"
    interval: Span | None = None
    x: float = 0.0


@dataclass(frozen=True)
class Series:
    """A line of `lines`: y over x, with an interval per point or none; `missing` are places x without a value."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = "s0"
    intervals: Sequence[Span] | None = None
    missing: Sequence[float] = ()


@plot
def points(
    axes: Any,
    marks: Sequence[Mark],
    *,
    title: str,
    form: Callable[[float], str] = score,
    reference: float | None = None,
) -> float:
    """A row per mark: a point, its interval, the figure at the right; `reference` is a dashed line. The axis shows the
    range of the data, since it is differences that are looked at; bars would have to begin at zero."""
    rows = range(len(marks))
    spans = [mark.interval or (mark.value, mark.value) for mark in marks]
    for row, mark, (low, high) in zip(rows, marks, spans, strict=True):
        axes.plot([low, high], [row, row], color=COLORS[mark.color], linewidth=2, solid_capstyle="round")
        _marker(axes, mark.value, row, mark.color)
        axes.text(1.03, row, form(mark.value), transform=axes.get_yaxis_transform(), va="center")
    _rows(axes, marks)
    if reference is not None:
        axes.axvline(reference, color=COLORS["muted"], linewidth=1, linestyle=(0, (3, 2)))
        spans.append((reference, reference))
    low, high = min(span[0] for span in spans), max(span[1] for span in spans)
    margin = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    axes.set_xlim(low - margin, high + margin)
    axes.grid(axis="x")
    _few_ticks(axes.xaxis, 4)
    return 62 + 21 * len(marks)


@plot
def bars(axes: Any, marks: Sequence[Mark], *, title: str, form: Callable[[float], str] = score) -> float:
    """A bar from zero per mark with its figure; for amounts. Intervals are drawn where given."""
    for row, mark in enumerate(marks):
        axes.barh(row, mark.value, height=0.62, color=COLORS[mark.color])
        if mark.interval:
            axes.plot(mark.interval, [row, row], color=COLORS["ink"], linewidth=1.2)
        axes.text(1.03, row, form(mark.value), transform=axes.get_yaxis_transform(), va="center")
    _rows(axes, marks)
    axes.set_xlim(0, max((mark.value for mark in marks), default=1.0) * 1.02 or 1.0)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    return 40 + 21 * len(marks)


@plot
def scatter(axes: Any, marks: Sequence[Mark], *, title: str, x: str, y: str, log_x: bool = False) -> float:
    """A point with interval per mark at (x, value), labelled where there is room. On a logarithmic axis a mark at 0
    (nothing trained) stands at the left edge, on a tick of its own."""
    positive = [mark.x for mark in marks if mark.x > 0]
    left = min(positive, default=1.0) / 10
    places = [mark.x if mark.x > 0 or not log_x else left for mark in marks]
    for place, mark in zip(places, marks, strict=True):
        if mark.interval:
            axes.plot([place, place], mark.interval, color=COLORS[mark.color], linewidth=1.4, alpha=0.6)
        _marker(axes, place, mark.value, mark.color)
    if log_x:
        axes.set_xscale("log")
        _log_ticks(axes.xaxis, places, zero=left if left in places else None)
    axes.margins(0.12, 0.1)
    axes.grid()
    _axis_labels(axes, x, y)
    axes.figure.set_size_inches(WIDTH / 72, 290 / 72)
    _place_labels(axes, [(place, mark.value, mark.label) for place, mark in zip(places, marks, strict=True)])
    return 290


@plot
def lines(
    axes: Any,
    series: Sequence[Series],
    *,
    title: str,
    x: str = "",
    y: str = "",
    log_x: bool = False,
    log_y: bool = False,
    shade: Span | None = None,
    limits: Span | None = None,
    height: float = 230,
    marked: bool = True,
) -> float:
    """Lines with intervals, a cross on the axis where a value is missing; `shade` is a range of x that is set off,
    `limits` the range of y (to compare panels)."""
    if shade:
        axes.axvspan(*shade, color=COLORS["accent"], alpha=0.14, linewidth=0)
    for one in series:
        mark = MARKERS[one.color][0] if marked else None
        axes.plot(one.x, one.y, color=COLORS[one.color], marker=mark, markeredgewidth=0)
        for place, span in zip(one.x, one.intervals or (), strict=False):
            axes.plot([place, place], span, color=COLORS[one.color], linewidth=1.3, alpha=0.6)
        _crosses(axes, one)
    if log_x:
        axes.set_xscale("log")
        _log_ticks(axes.xaxis, [place for one in series for place in [*one.x, *one.missing]])
    else:
        _few_ticks(axes.xaxis, 5)
    if log_y:
        axes.set_yscale("log")
        _log_ticks(axes.yaxis, [value for one in series for value in one.y if value > 0])
    else:
        _few_ticks(axes.yaxis, 4)
    if limits:
        axes.set_ylim(*limits)
    axes.grid(axis="y")
    _axis_labels(axes, x, y)
    return height


@plot
def heatmap(
    axes: Any,
    matrix: Sequence[Sequence[float | None]],
    *,
    title: str,
    low: float = 0.0,
    high: float = 1.0,
    x: str = "",
    y: str = "",
    rows: Sequence[str] = (),
) -> float:
    """A matrix as LEVELS colours from `low` to `high`, row 0 at the bottom; cells of one level are one path, so that
    41 layers squared stay small. `rows` names the rows (else they are numbered); None leaves a cell empty."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    width, height = len(matrix[0]), len(matrix)
    cells: dict[int | None, list[tuple[float, float, float]]] = {}  # level -> (row, first column, columns)
    for row, values in enumerate(matrix):
        begin = 0
        found = [_level(value, low, high) for value in values]
        for column in range(1, width + 1):
            if column == width or found[column] != found[begin]:
                cells.setdefault(found[begin], []).append((row, begin, column - begin))
                begin = column
    cells.pop(None, None)
    for level, runs in cells.items():
        paths = [Path([(c, r), (c + n, r), (c + n, r + 1), (c, r + 1), (c, r)], closed=True) for r, c, n in runs]
        axes.add_patch(PathPatch(Path.make_compound_path(*paths), facecolor=COLORS[f"h{level}"], linewidth=0))
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal" if width == height else "auto")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    step = max(1, math.ceil(width / 7))
    axes.set_xticks([i + 0.5 for i in range(0, width, step)], [str(i) for i in range(0, width, step)])
    axes.set_yticks(
        [i + 0.5 for i in range(0, height, 1 if rows else step)], rows or [str(i) for i in range(0, height, step)]
    )
    _axis_labels(axes, x, y)
    if width == height:
        axes.figure.set_size_inches(190 / 72, 200 / 72)
        return 200
    return 70 + 22 * height


def _level(value: float | None, low: float, high: float) -> int | None:
    if value is None or not math.isfinite(value):
        return None
    share = (value - low) / (high - low) if high > low else 0.0
    return max(0, min(LEVELS - 1, int(share * LEVELS)))


def _marker(axes: Any, x: float, y: float, color: str) -> None:
    """A mark in its series' shape; that of a control is hollow."""
    hollow = color == "quiet"
    axes.plot(
        [x],
        [y],
        linestyle="",
        marker=MARKERS[color][0],
        markersize=6.5,
        markerfacecolor=COLORS["paper" if hollow else color],
        markeredgecolor=COLORS[color if hollow else "paper"],
        markeredgewidth=1.4 if hollow else 0.7,
        clip_on=False,
        zorder=3,
    )


def _crosses(axes: Any, series: Series) -> None:
    """Where a series has no value, at the foot of the plot."""
    axes.plot(
        series.missing,
        [0.0] * len(series.missing),
        transform=axes.get_xaxis_transform(),
        linestyle="",
        marker="x",
        markersize=7,
        markeredgecolor=COLORS[series.color],
        markeredgewidth=1.8,
        clip_on=False,
        zorder=4,
    )


def _rows(axes: Any, marks: Sequence[Mark]) -> None:
    """Labels of rows, first on top."""
    axes.set_yticks(range(len(marks)), [mark.label for mark in marks])
    for label in axes.get_yticklabels():
        label.set_color(COLORS["ink"])
    axes.set_ylim(len(marks) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def _axis_labels(axes: Any, x: str, y: str) -> None:
    """The label of y stands on top, to be read without turning the head."""
    axes.set_xlabel(x)
    axes.set_title(y, loc="left")


def _few_ticks(axis: Any, count: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))


def _log_ticks(axis: Any, values: Sequence[float], zero: float | None = None) -> None:
    """Ticks at powers of ten, of every second or third where there are many, of 1, 2, 5 where there are few."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = min(values, default=1.0), max(values, default=1.0)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    step = max(1, math.ceil((last - first) / 6))
    ticks = [10.0**power for power in range(first, last + 1, step)]
    if high < 100 * low:
        ticks = [digit * 10.0**power for power in range(first, last + 1) for digit in (1, 2, 5)]
    if zero is not None:
        ticks = [zero, *(tick for tick in ticks if tick > zero * 2)]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: "0" if value == zero else tick(value)))


def _place_labels(axes: Any, wanted: Sequence[tuple[float, float, str]]) -> None:
    """Writes each label at the best place around its point: near, inside the plot, covering neither a point nor another
    label; a label that had to go farther away gets a line to its point."""
    figure = axes.figure
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    spots = [tuple(axes.transData.transform((x, y))) for x, y, _ in wanted]
    taken = [(px - 4, py - 4, px + 4, py + 4) for px, py in spots]
    offsets = [(dx, dy, side) for dy in (0, 9, -9, 20, -20, 31, -31) for dx, side in ((8, "left"), (-8, "right"))]
    offsets += [(0, 12, "center"), (0, -12, "center")]
    for (px, py), (x, y, text) in zip(spots, wanted, strict=True):
        probe = axes.text(0, 0, text, fontsize=SIZE - 1)
        size = probe.get_window_extent(renderer)
        probe.remove()
        best: tuple[float, Any] | None = None
        for dx, dy, side in offsets:
            left = px + dx - {"left": 0, "right": size.width, "center": size.width / 2}[side]
            box = (left, py + dy - size.height / 2, left + size.width, py + dy + size.height / 2)
            outside = max(0.0, frame.x0 - box[0]) + max(0.0, box[2] - frame.x1)
            outside += max(0.0, frame.y0 - box[1]) + max(0.0, box[3] - frame.y1)
            cost = sum(_overlap(box, other) for other in taken) + 50 * outside + abs(dy) / 2
            if best is None or cost < best[0]:
                best = (cost, (dx, dy, side, box))
        assert best is not None
        dx, dy, side, box = best[1]
        taken.append(box)
        line = {"arrowstyle": "-", "color": COLORS["muted"], "linewidth": 0.6} if abs(dy) > 12 else None
        label = axes.annotate(
            text,
            (x, y),
            (dx, dy),
            textcoords="offset points",
            ha=side,
            va="center",
            fontsize=SIZE - 1,
            arrowprops=line,
        )
        label.set_in_layout(False)


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)
