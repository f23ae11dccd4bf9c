"""Reporting: blocks as HTML and Markdown (read by an independent parser), plots, colours, figures as text."""

from __future__ import annotations

import itertools
import math
import re
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt

from normtune.reporting import (
    Block,
    Bullets,
    Card,
    Cell,
    Code,
    Details,
    Document,
    Figure,
    Heading,
    Note,
    Table,
    Text,
    numbers,
    palette,
    plots,
)
from normtune.reporting.plots import Mark, Series

SCHEMES = ("light", "dark")
HOSTILE = "<script>alert(1)</script> | *a* _b_ `c` [d](http://example.com) & 'e' \"f\"\n# g"
MARKS = [Mark("full", 0.9, "s0", (0.85, 0.93), 1e6), Mark("stage 1 <only>", 0.4, "quiet", None, 0.0)]
LINE = Series("lora", [1e-4, 1e-3, 1e-2], [0.5, 0.8, 0.6], "s1", [(0.4, 0.6), (0.7, 0.9), (0.5, 0.7)])
DRAWN = {
    "points": lambda: plots.points(MARKS, title="a < b", reference=0.7),
    "bars": lambda: plots.bars(MARKS, title="a < b", form=numbers.human_bytes),
    "scatter": lambda: plots.scatter(MARKS, title="a < b", x="size", y="score", log_x=True),
    "lines": lambda: plots.lines([LINE], title="a < b", x="rate", log_x=True, log_y=True, shade=(1e-4, 1e-3)),
    "heatmap": lambda: plots.heatmap([[0.0, 1.0], [None, 0.5]], title="a < b", x="layer"),
}


# ---- blocks, HTML, Markdown


EVERY_BLOCK = [
    Heading(HOSTILE),
    Text(HOSTILE),
    Note(HOSTILE),
    Bullets([HOSTILE]),
    Table([HOSTILE, "n"], [[HOSTILE, Cell("1.5", HOSTILE, "best")]], HOSTILE, {0: HOSTILE}),
    Card("data:,", HOSTILE, [Text(HOSTILE)], HOSTILE),
    Code(HOSTILE),
    Details(HOSTILE, [Text(HOSTILE)]),
    Figure([], HOSTILE, [(HOSTILE, "s0")], (HOSTILE, "1", HOSTILE)),
]


@pytest.mark.parametrize("block", EVERY_BLOCK, ids=lambda block: type(block).__name__)
def test_text_is_shown_as_it_stands(block: Block) -> None:
    page = Document(HOSTILE, [block]).to_html()
    assert "<script" not in page and "&lt;script&gt;" in page.split("</h1>")[1]
    shown = MarkdownIt("commonmark").enable("table").render(Document("t", [block]).to_markdown())
    assert not re.search("<(script|a|em) ?", shown.replace("<em>", "", isinstance(block, Figure)))


def test_markdown_tables_are_read_as_they_were_meant() -> None:
    rows = [["a|b", "1.0", Cell("2", "1–3", "best")], ["*c*", "-2", Cell("3", mark="tied")], ["d_e", "", "–"]]
    text = Document("t", [Table(["name", "x", "y"], rows)]).to_markdown()
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    cells = [t.children for t, before in zip(tokens[1:], tokens, strict=False) if before.type in ("th_open", "td_open")]
    read = ["".join(child.content for child in children or ()) for children in cells]
    assert read == ["name", "x", "y", "a|b", "1.0", "★ 2 (1–3)", "*c*", "-2", "≈ 3", "d_e", "", "–"]
    styles = [t.attrGet("style") for t in tokens if t.type == "th_open"]
    assert styles == [None, "text-align:right", "text-align:right"]


def test_code_with_fences_stays_code() -> None:
    text = "```\na\n```"
    tokens = MarkdownIt().parse(Document("t", [Code(text)]).to_markdown())
    assert [t.content for t in tokens if t.type == "fence"] == [text + "\n"]


def test_ids_are_unique_and_contents_link_to_headings() -> None:
    drawn = DRAWN["lines"]()
    page = Document("t", [*(Heading("Scores") for _ in range(4)), Figure([drawn, drawn])]).to_html()
    ids = re.findall(r'\bid="([^"]+)"', page)
    targets = re.findall(r"href=['\"]#([^'\"]+)|url\(#([^)]+)\)", page)
    assert len(ids) == len(set(ids)) > 4 and {one or other for one, other in targets} <= set(ids)


@pytest.mark.parametrize(
    ("text", "is_number"),
    [
        *((text, True) for text in ("0.91", "1,234", "–", "", "+3.4 %", "42 ms", "5.0 MB", "3.16e-3")),
        *((text, False) for text in ("lora", "4 of 12", "2 MB more", "v2")),
    ],
)
def test_what_stands_to_the_right(text: str, is_number: bool) -> None:
    assert numbers.is_number(text) == is_number


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        (numbers.score(0.91234), "0.912"),
        (numbers.score(1204.57), "1204.6"),
        (numbers.score(None), "–"),
        (numbers.interval((0.8, 0.9)), "0.800–0.900"),
        (numbers.interval((-0.1, 0.2)), "-0.100 to 0.200"),
        (numbers.signed_percent(0.034), "+3.4 %"),
        (numbers.rate(0.00316), "3.16e-3"),
        (numbers.rate(1e-3), "1e-3"),
        (numbers.tick(20_000), "20k"),
        (numbers.tick(1000), "1,000"),
        (numbers.tick(0.25), "0.25"),
        (numbers.human_seconds(42), "42 s"),
        (numbers.human_seconds(720), "12 min"),
        (numbers.human_seconds(12_000), "3 h 20 min"),
    ],
)
def test_figures_as_text(written: str, wanted: str) -> None:
    assert written == wanted


# ---- plots and colours


@pytest.mark.parametrize("kind", DRAWN)
def test_a_plot_has_a_label_variables_for_colours_and_text_as_text(kind: str) -> None:
    svg = DRAWN[kind]()
    assert svg == DRAWN[kind](), "the same input gives the same bytes"
    root = ElementTree.fromstring(svg)  # well-formed
    assert root.attrib["role"] == "img" and root.attrib["aria-label"] == "a < b"
    assert not re.search(r"#[0-9a-f]{6}|rgb\(|font-family|<image|<style", svg)
    names = set(re.findall(r"var\(--(\w+)\)", svg))
    assert names and names <= set(palette.scheme("light"))
    texts = [one.text for one in root.iter("text")]
    assert "a < b" in texts
    if kind in ("points", "bars", "scatter"):
        assert "stage 1 <only>" in texts


def test_points_stand_where_their_values_are() -> None:
    marks = [Mark(str(i), value, f"s{i}", (value - 0.1, value + 0.1)) for i, value in enumerate((0.2, 0.5, 0.8))]
    svg = plots.points(marks, title="t")
    spots = [float(x) for x in re.findall(r'<use href="#\w+" x="([\d.]+)" y="[\d.]+" style="fill: var\(--s', svg)]
    assert (
        len(spots) == 3 and spots[2] - spots[1] == pytest.approx(spots[1] - spots[0], abs=0.05) and spots[0] < spots[1]
    )
    lines = re.findall(
        r'd="M ([\d.]+) [\d.]+ L ([\d.]+) [\d.]+ " clip-path="[^"]+" style="fill: none; stroke: var\(--s', svg
    )
    for spot, (low, high) in zip(spots, lines, strict=True):
        assert spot - float(low) == pytest.approx(float(high) - spot, abs=0.05) and float(low) < spot


def test_a_missing_value_is_a_cross_at_the_foot_of_the_plot() -> None:
    def crosses(missing: list[float]) -> list[tuple[float, float]]:
        svg = plots.lines([Series("lora", [1.0, 2.0], [0.5, 0.8], "s1", None, missing)], title="t")
        (mark,) = re.findall(r'id="(\w+)" d="M -3.5 3.5 L 3.5 -3.5', svg) or [None]
        return [(float(x), float(y)) for x, y in re.findall(rf'<use href="#{mark}" x="([\d.]+)" y="([\d.]+)"', svg)]

    assert crosses([]) == []
    (left, foot), (right, other) = crosses([3.0, 5.0])
    assert left < right and foot == other > 150


def test_a_heatmap_colours_every_cell_by_its_value() -> None:
    size, last = 9, palette.LEVELS - 1
    matrix: list[list[float | None]] = [[(r * size + c) / (size * size - 1) for c in range(size)] for r in range(size)]
    matrix[4][4] = None
    svg = plots.heatmap(matrix, title="t")
    boxes = []  # level, left, right, bottom of each run of cells
    for path, level in re.findall(r'<path d="([^"]+)"[^>]*fill: var\(--h(\d+)\)', svg):
        for run in path.split("M")[1:]:
            spots = [tuple(map(float, spot)) for spot in re.findall(r"(-?[\d.]+) (-?[\d.]+)", run)]
            xs, ys = [x for x, _ in spots], [y for _, y in spots]
            boxes.append((int(level), min(xs), max(xs), max(ys)))
    edge, base = min(box[1] for box in boxes), max(box[3] for box in boxes)
    cell = (max(box[2] for box in boxes) - edge) / size  # cells are square
    seen: dict[tuple[int, int], int] = {}
    for level, left, right, bottom in boxes:
        for column in range(round((left - edge) / cell), round((right - edge) / cell)):
            place = round((base - bottom) / cell), column
            assert place not in seen
            seen[place] = level
    wanted = {
        (r, c): min(last, int(value * palette.LEVELS))
        for r, line in enumerate(matrix)
        for c, value in enumerate(line)
        if value is not None
    }
    assert seen == wanted


def linear(color: str) -> list[float]:
    """sRGB to linear light (IEC 61966-2-1)."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def contrast(one: str, other: str) -> float:
    """WCAG 2.1."""
    low, high = sorted(
        sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear(c), strict=True)) for c in (one, other)
    )
    return (high + 0.05) / (low + 0.05)


def oklab(light: list[float]) -> list[float]:
    """Ottosson, 2020."""
    r, g, b = (max(0.0, part) for part in light)
    lms = (
        0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b,
        0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b,
        0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b,
    )
    x, y, z = (part ** (1 / 3) for part in lms)
    return [
        0.2104542553 * x + 0.7936177850 * y - 0.0040720468 * z,
        1.9779984951 * x - 2.4285922050 * y + 0.4505937099 * z,
        0.0259040371 * x + 0.7827717662 * y - 0.8086757660 * z,
    ]


SEEN = {  # Machado, Oliveira, Fernandes 2009, severity 1
    "usual": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.01182, 0.04294, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.3039)),
}


@pytest.mark.parametrize("eye", SEEN)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_series_stay_apart_for_every_eye(scheme: str, eye: str) -> None:
    colors = palette.scheme(scheme)
    seen = {}
    for name in [*(f"s{i}" for i in range(palette.SERIES)), "quiet"]:
        light = linear(colors[name])
        seen[name] = oklab([sum(w * part for w, part in zip(row, light, strict=True)) for row in SEEN[eye]])
        assert contrast(colors[name], colors["paper"]) >= 3
    for one, other in itertools.combinations(seen, 2):
        assert math.dist(seen[one], seen[other]) >= 0.088, (one, other)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_heatmap_s_levels_go_one_way(scheme: str) -> None:
    light = [oklab(linear(color))[0] for color in palette.ramp(scheme)]
    steps = [b - a for a, b in itertools.pairwise(light)]
    assert all(step > 0.01 for step in steps) or all(step < -0.01 for step in steps)
    assert set(palette.LIGHT) == set(palette.DARK)


def test_a_label_has_one_colour_and_controls_are_grey() -> None:
    found = palette.assign(["a", "b", "c", "b", *"defghij"], quiet=["b"])
    assert found["a"] == "s0" and found["b"] == "quiet" and found["c"] == "s1"
    assert found["j"] == "s0", "the ninth begins again"
