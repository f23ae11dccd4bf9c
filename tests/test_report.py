"""The report of a comparison and of analyses: what is marked and told, and the page in a browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import browser
import made_up
from normtune.analysis.figures import analysis_blocks
from normtune.comparison.figures import color_of
from normtune.comparison.report import best_of, report_of, score_table, write_report
from normtune.reporting import Block, Card, Cell, Details, Document, Figure, Heading, palette

MATRICES = 4  # cosine and CKA, of image and text tokens


def blocks_of(blocks: Any) -> Iterator[Block]:
    """All blocks, folded ones and those of cards too."""
    for block in blocks:
        yield block
        if isinstance(block, Details | Card):
            yield from blocks_of(block.blocks)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return made_up.comparison()


@pytest.fixture(scope="module")
def document(found: dict[str, Any]) -> Document:
    return report_of(found)


@pytest.fixture(scope="module")
def pages(document: Document, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    written = {"comparison": document, "sweep": report_of(made_up.sweep())}
    for name, one in written.items():
        (folder / f"{name}.html").write_text(one.to_html(), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in written}


def test_winners_are_marked_only_where_the_interval_says_so(found: dict[str, Any]) -> None:
    table = score_table(found)
    marks, labels = {}, []
    for label, *cells in table.rows:
        assert isinstance(label, Cell)
        labels.append(label.text)
        for column, cell in zip(table.header[1:], cells, strict=True):
            if isinstance(cell, Cell) and cell.mark:
                marks[label.text, column] = cell.mark
    wanted = {("layernorm", "pope"): "best", ("layernorm", "average"): "tied", ("full", "average"): "tied"}
    wanted |= {(name, "mme"): "tied" for name in ("full", "layernorm", "lora", "attn-mlp")}
    assert marks == wanted
    controls = [row["label"] for row in found["rows"] if row["control"]]
    assert labels[next(iter(table.groups)) :] == controls == list(made_up.CONTROLS)


def test_a_row_whose_seeds_failed_says_which_are_left(found: dict[str, Any]) -> None:
    details = {cell.text: cell.detail for cell, *_ in score_table(found).rows if isinstance(cell, Cell)}
    assert details["attn-qv"] == "seeds 0, 1" and set(details.values()) == {"", "seeds 0, 1"}


def test_what_came_out_is_said_as_the_interval_says_it(found: dict[str, Any]) -> None:
    (told,) = best_of(found)
    assert "does not tell apart: layernorm, full" in told
    (told,) = best_of({"winners": {"average": {"best": "lora", "tied": []}}})
    assert "On average lora is best" in told
    assert best_of({"winners": {}}) == []


@pytest.mark.heavy
def test_the_report_holds_every_row_claim_and_failure(document: Document, found: dict[str, Any]) -> None:
    for text in (document.to_html(), document.to_markdown()):
        for row in found["rows"]:
            assert row["label"] in text
            for told in row["scores"].values():
                assert f"{told['mean']:.3f}" in text
        for claim in found["claims"]:
            assert claim["verdict"] in text
        assert "loss is not finite at step 31" in text and "--learning-rates auto" in text and "2.13.0" in text
        assert "a made-up processor" in text and found["recipe_hash"] in text and "39 min" in text
        assert "smallest subset within 2 %" in text


@pytest.mark.heavy
def test_every_plot_is_there(document: Document, found: dict[str, Any]) -> None:
    figures = [block for block in blocks_of(document.blocks) if isinstance(block, Figure)]
    titles = [re.search('aria-label="([^"]*)"', svg)[1] for figure in figures for svg in figure.panels]  # type: ignore[index]
    for name, count in found["questions"].items():
        assert f"{name}, {count} questions" in titles
    for name in ("average", "score and size", "peak resident memory", "activations saved for backward"):
        assert name in titles
    assert {"validation score", "Effective rank, image tokens", "norms", "input norms"} <= set(titles)
    matrices = [len(figure.panels) for figure in figures if figure.scale]
    assert matrices == [len(made_up.STRATEGIES)] * MATRICES
    assert document.to_html().count("<svg") == len(titles)


@pytest.mark.heavy
def test_a_strategy_has_one_colour_everywhere(document: Document, found: dict[str, Any]) -> None:
    colors = color_of(found)
    assert len({colors[name] for name in made_up.STRATEGIES}) == 7
    assert {colors[name] for name in made_up.CONTROLS} == {"quiet"}
    legends = [pair for block in blocks_of(document.blocks) if isinstance(block, Figure) for pair in block.legend]
    assert legends and all(colors[label] == color for label, color in legends)


NOTHING = {"search": None, "curves": None, "analysis": {}, "examples": [], "claims": [], "findings": [], "winners": {}}


def test_a_comparison_in_which_everything_failed_has_a_report(found: dict[str, Any], tmp_path: Path) -> None:
    empty = {"scores": {}, "average": None, "relative": {}, "text": None, "cost": None, "seeds": [], "differences": {}}
    rows = [{**row, **empty, "failed": [{"seed": 0, "error": "JobError: full"}]} for row in found["rows"]]
    write_report(tmp_path, {**found, **NOTHING, "rows": rows})
    page = (tmp_path / "report.html").read_text()
    assert "<svg" not in page and page.count("JobError: full") == len(rows)
    assert (tmp_path / "report.md").read_text().startswith("# world: strategies")


@pytest.mark.parametrize(
    ("part", "heading"),
    [
        ("similarity", "Similarity of layers"),
        ("losses", None),
        ("gradients", "Variance of gradients"),
        ("gains", "Gain maps"),
        ("image", "What the image contributes"),
        ("notes", "Notes on the analysis"),
    ],
)
def test_an_analysis_of_one_part_is_shown_by_itself(found: dict[str, Any], part: str, heading: str | None) -> None:
    whole = found["analysis"]["layernorm"]
    blocks = analysis_blocks({"run": {key: value if key == part else None for key, value in whole.items()}})
    headings = [block.text for block in blocks if isinstance(block, Heading)]
    assert headings[:1] == [heading] if heading else not headings
    assert not any(block.legend for block in blocks if isinstance(block, Figure)), "one run needs no legend"


# ---- in a browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.chromium() as started:
        yield started


@pytest.mark.heavy
@pytest.mark.parametrize("scheme", browser.SCHEMES)
@pytest.mark.parametrize("width", browser.WIDTHS)
@pytest.mark.parametrize("name", ["comparison", "sweep"])
def test_page_in_a_browser(chromium: Any, pages: dict[str, Path], name: str, width: int, scheme: str) -> None:
    with browser.opened(chromium, pages[name], width, scheme) as found:
        assert found.problems() == []
        paper = found.page.evaluate("getComputedStyle(document.body).backgroundColor")
        wanted = palette.scheme(scheme)["paper"]
        assert paper == f"rgb({', '.join(str(int(wanted[i : i + 2], 16)) for i in (1, 3, 5))})"
        assert found.page.locator("svg").count() == pages[name].read_text().count("<svg")


WRONG = {
    "wide: the page": "<div style='width: 900px'>x</div>",
    "contrast": "<p style='color: #ddd; background: #fff'>faint</p>",
    "console: broken": "<script>console.log('broken')</script>",
    "error: ": "<script>nothing()</script>",
    "request: ": "<img src='http://127.0.0.1:9/x.png' width='10'>",
    "size: ": "<svg aria-label='flat' viewBox='0 0 10 10' style='width: 0'><path d='M0 0'/></svg>",
    "empty: ": "<svg aria-label='none' viewBox='0 0 300 300' style='width: 300px'></svg>",
    "overlap: ": "<svg viewBox='0 0 300 300' style='width: 300px'><text y='50'>one</text><text y='52'>two</text></svg>",
    "cut: ": "<svg viewBox='0 0 300 300' style='width: 300px'><text x='280' y='50'>longer than that</text></svg>",
    "small: ": "<svg viewBox='0 0 900 300' style='width: 300px'><text y='50' font-size='11'>tiny</text></svg>",
    "ids: ": "<p id='a'></p><p id='a'></p>",
}


@pytest.mark.heavy
@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_with_a_page_is_seen(chromium: Any, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "wrong.html"
    path.write_text(f"<!doctype html><meta charset='utf-8'><body style='background: #fff'>{WRONG[kind]}")
    with browser.opened(chromium, path, 390, "light") as found:
        assert any(problem.startswith(kind) for problem in found.problems())
