"""The report of a comparison and of analyses: what is marked and told, and the page in a browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import browser
import made_up
from normtune.analysis.figures import analysis_blocks, gap_change
from normtune.comparison.figures import color_of, curve_figures, note
from normtune.comparison.outcome import additions, best_of, differences, findings
from normtune.comparison.report import claims, costs, report_of, score_table, setting, write_report
from normtune.reporting import (
    Block,
    Bullets,
    Card,
    Cell,
    Details,
    Document,
    Figure,
    Heading,
    Note,
    Table,
    Text,
    palette,
)

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
    assert "layernorm is highest of the rows with all seeds;" in told and told.endswith("does not tell it from full.")
    alone = {**found, "rows": [{**row, "seeds": [0]} for row in found["rows"]]}
    (told,) = best_of({**alone, "winners": {"average": {"best": "lora", "tied": []}}})
    assert "On average lora is best; " in told
    assert best_of({**found, "winners": {}}) == []


def test_every_candidate_is_held_against_its_control(found: dict[str, Any]) -> None:
    told = additions(found)
    extras = "connector+embed+head"
    wanted = {
        "full": f"its extras without llm ({extras}): +17.0 points (+15.0 to +19.0)",
        "lora": f"its extras without lora ({extras}): +15.0 points (+13.0 to +17.0)",
        "attn-qv": f"its extras without attn_qv ({extras}): +11.0 points (+9.0 to +13.0)",
        "attn-mlp": f"its extras without mlp ({extras}): +16.0 points (+14.0 to +18.0)",
        "layernorm": f"its extras without norms ({extras}): +19.0 points (+17.0 to +21.0)",
        "layernorm-simple": "stage 1 only: +25.0 points (+23.0 to +27.0)",
    }
    assert told == [f"{label} against {what}" for label, what in wanted.items()], "a connector alone has no control"
    heading, bullets, _ = findings(found)
    assert heading == Heading("What came out") and isinstance(bullets, Bullets) and set(told) < set(bullets.items)


@pytest.mark.parametrize(
    ("strategy", "control"),
    [
        ("norms+connector", "its extras without norms (connector)"),
        ("lora+norms+connector", "its extras without lora+norms (connector)"),
        ("regex:a.*+embed", None),
        ("connector+embed+head", None),
    ],
)
def test_the_control_follows_from_the_parts(found: dict[str, Any], strategy: str, control: str | None) -> None:
    listed = {row["label"]: row for row in found["rows"]}
    other = {**listed["layernorm"], "label": "x", "factors": {"strategy": strategy}, "differences": {}}
    told = {"average": made_up.measured(0.001)}
    rows = [{**row, "differences": {"x": told}} for row in found["rows"]] + [other]
    assert additions({**found, "rows": rows}) == (
        [f"x against {control}: -0.1 points (-2.1 to +1.9), not told apart"] if control else []
    )


def test_rows_are_held_against_a_control_under_the_same_encoder(found: dict[str, Any]) -> None:
    listed = {row["label"]: row for row in found["rows"]}
    rows = []
    for encoder in ("small", "large"):
        for name in ("norms+connector", "connector"):
            factors = {"strategy": name, "encoder": encoder}
            rows.append({**listed["lora"], "label": f"{name}, {encoder}", "factors": factors})
    labels = [row["label"] for row in rows]
    gaps = {other: {"average": made_up.measured(n / 10)} for n, other in enumerate(labels)}
    rows = [{**row, "differences": gaps} for row in rows[::2]] + rows[1::2]
    told = additions({**found, "experiment": "sweep vision", "rows": rows})
    assert [one.partition(" points")[0] for one in told] == [
        "norms+connector, small against its extras without norms (connector, small): +10.0",
        "norms+connector, large against its extras without norms (connector, large): +30.0",
    ]
    assert additions({**found, "experiment": "sweep data"}) == [], "no controls there"


ONE_SEED = "over samples; one seed: the spread over trainings is not in it"


@pytest.mark.parametrize(("seeds", "wanted"), [([0], ONE_SEED), ([0, 1], "over seeds and samples")])
def test_what_the_intervals_are_over_is_said_everywhere(found: dict[str, Any], seeds: list[int], wanted: str) -> None:
    """The number of seeds that finished counts, not the number asked for."""
    one = {**found, "rows": [{**row, "seeds": seeds[: len(row["seeds"])]} for row in found["rows"]]}
    swept = {**one, "curves": [{**curve, "band": None} for curve in made_up.sweep()["curves"]]}
    told = [str(findings(one)), score_table(one).caption, note(one), str(differences(one)), str(claims(one))]
    for text in (*told, curve_figures(swept)[0].caption):
        assert [words in text for words in (ONE_SEED, "over seeds and samples")].count(True) == 1
        assert wanted in text


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"search": None}, "the recipe's, not searched here"),
        ({}, "searched: 5 candidates for each strategy, on the validation questions, with one seed"),
        ({"search": None, "experiment": "sweep learning-rate"}, "varied here"),
    ],
)
def test_the_setting_says_where_the_rates_come_from(
    found: dict[str, Any], changed: dict[str, Any], wanted: str
) -> None:
    (table,) = setting({**found, **changed})
    assert isinstance(table, Table) and ["learning rates", wanted] in list(table.rows)


def test_the_setting_tells_work_from_waiting(found: dict[str, Any]) -> None:
    (table,) = setting(found)
    assert isinstance(table, Table)
    work = "39 min of work (training, questions, analysis)"
    assert ["time", f"{work}; the last invocation took 10 min"] in list(table.rows)
    (table,) = setting({key: value for key, value in found.items() if key != "wall_seconds"})
    assert isinstance(table, Table) and ["time", work] in list(table.rows)


def test_costs_say_how_sure_they_are(found: dict[str, Any]) -> None:
    _, table, *_ = costs(found, color_of(found))
    assert isinstance(table, Table)
    step = table.rows[0][table.header.index("step")]
    assert step == Cell("64 ms", "61–75")
    assert "mean loss of the last ten steps" in table.caption and "of one machine, not repeated" in table.caption


def test_tasks_that_a_relative_average_leaves_out_are_named(found: dict[str, Any]) -> None:
    told = "“to lora” is of pope, mme alone: lora scored 0 in the others."
    assert told not in score_table(found).caption
    rows = []
    for row in found["rows"]:
        relative = {**row["relative"], "lora": {**row["relative"]["lora"], "tasks": ["pope", "mme"]}}
        rows.append({**row, "relative": relative})
    caption = score_table({**found, "rows": rows}).caption
    assert told in caption and "“to full” is of" not in caption


def test_curves_show_what_failed_and_where_a_band_goes_on() -> None:
    whole, bands = curve_figures(made_up.sweep())
    assert "Crosses on the axis: failed (full at 1e-1, 3.16e-1)." in whole.caption
    assert "may go on (full below 1e-4)" in bands.caption
    titles = [re.search('aria-label="([^"]*)"', svg)[1] for svg in bands.panels]  # type: ignore[index]
    assert titles == ["full: 2.00 decades and on", "lora: 0.60 decades", "layernorm: 0.60 decades"]
    assert [name for name, _ in whole.legend] == ["full", "lora", "layernorm"]


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
    assert {"validation score", "Effective rank, image tokens", "norms", "input norms", "held-out loss"} <= set(titles)
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


@pytest.mark.parametrize(
    ("changes", "text", "noted"),
    [
        ({}, "From 8 fixed batches of 16 samples, at the same steps for every label.", False),
        ({"stream": "another"}, "From 8 fixed batches of 16 samples, at the same steps for every label.", True),
        ({"stream": "another", "batch_size": 4}, "From fixed batches, at the same steps for every label.", True),
        ({"steps": (0, 28)}, "From 8 fixed batches of 16 samples, at steps that differ between labels.", False),
        (None, "From 8 fixed batches of 16 samples.", False),
    ],
)
def test_gradients_say_on_which_batches_and_when(changes: dict[str, Any] | None, text: str, noted: bool) -> None:
    def measured(steps: tuple[int, ...] = (0, 28, 56), **changes: Any) -> dict[str, Any]:
        checkpoints = [{"step": step, "parts": {}, "norms": {}} for step in steps]
        alike = {"checkpoints": checkpoints, "batches": 8, "batch_size": 16, "stream": "one"}
        return {"gradients": {**alike, **changes}}

    documents = {"lora": measured()} | ({} if changes is None else {"layernorm": measured(**changes)})
    heading, said, *notes = analysis_blocks(documents)
    assert heading == Heading("Variance of gradients") and said == Text(text)
    assert ["do not compare" in str(one) for one in notes if isinstance(one, Note)] == [True] * noted


@pytest.mark.parametrize(
    ("checkpoints", "wanted"),
    [
        ([{"step": 0, "train": 0.9, "held_out": 0.3}, {"step": 9, "train": 0.1, "held_out": 0.15}], 0.65),
        ([{"step": 0, "train": None, "held_out": 0.3}, {"step": 9, "train": 0.1, "held_out": 0.15}], None),
        ([{"step": 9, "train": 0.1, "held_out": 0.15}], None),
        ([], None),
    ],
)
def test_overfitting_is_told_by_how_the_gap_changed(checkpoints: list[dict[str, Any]], wanted: float | None) -> None:
    assert gap_change({"checkpoints": checkpoints}) == (None if wanted is None else pytest.approx(wanted))


@pytest.mark.heavy
def test_the_change_of_the_gap_stands_beside_it(document: Document, found: dict[str, Any]) -> None:
    table = next(block for block in document.blocks if isinstance(block, Table) and "gap" in block.header)
    assert "its change from the start of the stage to its end is what tells overfitting" in table.caption
    place = table.header.index("its change")
    for row, one in zip(table.rows, found["analysis"].values(), strict=True):
        assert row[place] == f"{one['losses']['gap'] + 1.3:+.3f}"


# ---- in a browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.chromium() as started:
        yield started


@pytest.mark.heavy
@pytest.mark.parametrize("scheme", browser.SCHEMES)
@pytest.mark.parametrize("name", ["comparison", "sweep"])
def test_page_in_a_browser(chromium: Any, pages: dict[str, Path], name: str, scheme: str) -> None:
    with browser.opened(chromium, pages[name], browser.WIDTHS[0], scheme) as found:
        for width in browser.WIDTHS:
            found.page.set_viewport_size({"width": width, "height": 900})
            assert found.problems() == [], width
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
