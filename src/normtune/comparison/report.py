"""The report of a comparison: `report.html` and `report.md` from the result document alone.

Scope: what is told, in which order, and which figures are marked: a score bears a star only where the paired 95 %
interval tells it from every other row; rows that it does not tell from the best bear a sign of their own. Not here: the
document (`results`), plots (`figures`), HTML and Markdown (`reporting`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from normtune.analysis.figures import analysis_blocks
from normtune.comparison.figures import (
    MOST_ROWS,
    Row,
    color_of,
    cost_figure,
    curve_figures,
    score_figure,
    search_figure,
)
from normtune.comparison.outcome import differences, findings, over
from normtune.reporting import Block, Card, Cell, Code, Details, Document, Heading, Note, Table, Text
from normtune.reporting.numbers import (
    human_bytes,
    human_seconds,
    interval,
    machine,
    rate,
    score,
    signed_percent,
)
from normtune.runlog import write_text

SPLITS = {"data": "the test questions", "dev": "the validation questions"}
SHARED = "once, the same for every row"
START = {"kinds": SHARED, "sweep data": SHARED, "sweep align": "", "sweep vision": "once for each encoder"}
VERDICTS = {"held": "good", "did not hold": "bad"}
SOURCES = "[S] the paper's abstract or a summary, [C] quoted by later work, [D] derived by arithmetic."


def write_report(folder: Path, document: Mapping[str, Any]) -> None:
    """Writes `report.html` and `report.md` into `folder`.

    Raises:
        JobError: the disk is full or the folder cannot be written.
    """
    page = report_of(document)
    write_text(folder / "report.html", page.to_html())
    write_text(folder / "report.md", page.to_markdown())


def report_of(document: Mapping[str, Any]) -> Document:
    colors = color_of(document)
    blocks = [
        *setting(document),
        *findings(document),
        *curves(document),
        *scores(document, colors),
        *costs(document, colors),
        *search(document, colors),
        *analysis_blocks(document["analysis"], known(document["analysis"], colors)),
        *examples(document),
        *claims(document),
        *failures(document),
        *reproduction(document),
    ]
    return Document(document["title"], blocks)


def known(labels: Mapping[str, Any], colors: Mapping[str, str]) -> dict[str, str]:
    return {label: colors.get(label, "quiet") for label in labels}


def setting(document: Mapping[str, Any]) -> list[Block]:
    """What was compared, on what, how often."""
    rows = [row for row in document["rows"] if row["baseline"] == "none" and not row["control"]]
    compared = [row["label"] for row in rows]
    if document["curves"] and len(rows) > MOST_ROWS:
        compared = [curve["name"] for curve in document["curves"]]
    asked = ", ".join(f"{name} ({count:,})" for name, count in document["questions"].items())
    facts = [
        ["compared", ", ".join(compared)],
        ["controls", "; ".join(row["label"] for row in document["rows"] if row["control"])],
        ["seeds", ", ".join(map(str, document["seeds"]))],
        ["learning rates", rates(document)],
        ["asked", f"{SPLITS.get(document['asked_on'], document['asked_on'])}: {asked}"],
        ["stage 1", START.get(document["experiment"], f"{SHARED}; then the same batches in the same order")],
        ["time", worked(document)],
        ["hardware", f"{document['provenance']['cores']} cores of {document['provenance']['processor']}"],
    ]
    equal = document["request"].get("equal")
    if document["experiment"] == "kinds" and equal:
        facts.insert(1, ["equal in", str(equal).replace("-", " ")])
    return [Table(["", ""], [fact for fact in facts if fact[1]], stacked=True)]


def rates(document: Mapping[str, Any]) -> str:
    """Where the learning rates come from."""
    if document["experiment"] == "sweep learning-rate":
        return "varied here"
    if document["search"] is None:
        return "the recipe's, not searched here"
    return f"searched: {candidates(document['search'])}, on {SPLITS['dev']}, with one seed"


def candidates(search: Mapping[str, Sequence[Row]]) -> str:
    """How many rates each strategy had to choose from."""
    counts = sorted({len(tried) for tried in search.values()})
    return f"{' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} candidates for each strategy"


def worked(document: Mapping[str, Any]) -> str:
    """How long it took."""
    wall = document.get("wall_seconds")
    last = f"; the last invocation took {human_seconds(wall)}" if wall else ""
    return f"{human_seconds(document['seconds'])} of work (training, questions, analysis){last}"


def scores(document: Mapping[str, Any], colors: Mapping[str, str]) -> list[Block]:
    folded = [*differences(document), *benchmark_details(document)]
    return [Heading("Scores"), score_table(document), *score_figure(document, colors), *folded]


def score_table(document: Mapping[str, Any]) -> Table:
    """The main table: a row per variant, a column per benchmark, winners marked."""
    rows, winners = document["rows"], document["winners"]
    references = [name for name in ("lora", "full") if any(name in (row["relative"] or {}) for row in rows)]
    text = any(row["text"] for row in rows)
    header = ["", "average", *document["benchmarks"], *(f"to {name}" for name in references)]
    cells = [
        [
            Cell(row["label"], seeds_of(row)),
            scored(row, row["average"], winners.get("average")),
            *(scored(row, row["scores"].get(name), winners.get(name)) for name in document["benchmarks"]),
            *(relative(row, name) for name in references),
            *([forgotten(row)] if text else []),
        ]
        for row in rows
    ]
    note = (
        f"Small: 95 % intervals {over(document)}. ★ best, told from every other candidate by the paired interval; "
        "≈ not told from the best. Controls are never marked."
    )
    if references:
        note += f" “to {references[0]}”: mean over tasks of score / score of {references[0]}, minus 1."
        note += "".join(counted(rows, name) for name in references)
    if text:
        note += " Text: questions without an image, and the change against the untuned LLM."
    return Table([*header, *(["text"] if text else [])], cells, note, groups=controls_from(rows))


def controls_from(rows: Sequence[Row]) -> dict[int, str]:
    """A heading above the controls, where they stand together at the end."""
    first = next((i for i, row in enumerate(rows) if row["control"]), None)
    if first is None or not all(row["control"] for row in rows[first:]):
        return {}
    return {first: "controls"}


def seeds_of(row: Row) -> str:
    """Said only where seeds failed."""
    return f"seeds {', '.join(map(str, row['seeds'])) or 'none'}" if row["failed"] else ""


def scored(row: Row, found: Row | None, winner: Row | None) -> Cell:
    if not found:
        return Cell("–")
    mark = ""
    if winner and not row["control"] and (winner["best"] == row["label"] or row["label"] in winner["tied"]):
        mark = "tied" if winner["tied"] else "best"
    return Cell(score(found["mean"]), interval(found.get("interval")), mark)


def relative(row: Row, name: str) -> Cell:
    found = (row["relative"] or {}).get(name)
    if not found:
        return Cell("–")
    low, high = found["interval"]
    return Cell(signed_percent(found["mean"]), f"{100 * low:+.1f} to {100 * high:+.1f}")


def counted(rows: Sequence[Row], name: str) -> str:
    """Of which tasks a relative average is, where the reference scored 0 in others."""
    found = ((row["relative"] or {}).get(name) or {} for row in rows)
    tasks = next((one["tasks"] for one in found if one.get("tasks")), None)
    return f" “to {name}” is of {', '.join(tasks)} alone: {name} scored 0 in the others." if tasks else ""


def forgotten(row: Row) -> Cell:
    text = row["text"]
    if not text:
        return Cell("–")
    return Cell(score(text["after"]), "" if text["change"] is None else f"{text['change']:+.3f}")


def benchmark_details(document: Mapping[str, Any]) -> list[Block]:
    """All figures of each benchmark, folded."""
    blocks: list[Block] = []
    for name in document["benchmarks"]:
        rows = [row for row in document["rows"] if (row["scores"].get(name) or {}).get("figures")]
        figures = list(dict.fromkeys(figure for row in rows for figure in row["scores"][name]["figures"]))
        if not figures:
            continue
        cells = []
        for row in rows:
            found = row["scores"][name]["figures"]
            cells.append([row["label"], *(figure_cell(found.get(figure)) for figure in figures)])
        blocks += [Heading(name, 3), Table(["", *figures], cells)]
    return [Details("All figures of each benchmark", blocks)] if blocks else []


def figure_cell(found: Row | None) -> Cell:
    return Cell(score(found["mean"]), interval(found.get("interval"))) if found else Cell("–")


def curves(document: Mapping[str, Any]) -> list[Block]:
    if not document["curves"]:
        return []
    axis = (document["axis"] or {}).get("x", "")
    return [Heading(f"Score over {axis}" if axis else "Curves"), *curve_figures(document)]


def costs(document: Mapping[str, Any], colors: Mapping[str, str]) -> list[Block]:
    rows = [row for row in document["rows"] if row["cost"]]
    if not rows:
        return []
    header = ["", "learning rate", "trained", "of all", "adapter", "peak", "saved", "step", "moved", "last loss"]
    cells = [[row["label"], rate_of(row), *cost_cells(row["cost"])] for row in rows]
    peak = rows[0]["cost"]["peak_of"]
    each = "medians over the seeds" if any(len(row["seeds"]) > 1 for row in rows) else "one training each"
    note = (
        f"Trained parameters and their share; the adapter on disk; peak {peak}; bytes that autograd saves for backward "
        "of one micro-batch; time of a step, median and quartiles; share of the gains that moved; mean loss of the "
        f"last ten steps. Times and memory are of one machine, not repeated ({each})."
    )
    table = Table(header, cells, note, groups=controls_from(rows))
    return [Heading("Cost"), table, *cost_figure(document, colors)]


def rate_of(row: Row) -> str:
    return "–" if row["learning_rate"] is None else rate(row["learning_rate"])


def cost_cells(cost: Row) -> list[str | Cell]:
    moved = cost.get("moved_percent")
    quartiles = "–".join(f"{1000 * seconds:.0f}" for seconds in cost.get("step_quartiles") or ())
    return [
        f"{cost['trainable_parameters']:,}",
        f"{cost['percent']:.3g} %",
        human_bytes(cost["adapter_bytes"]),
        human_bytes(cost["peak_bytes"]),
        human_bytes(cost["saved_bytes"]),
        Cell(f"{1000 * cost['step_seconds']:.0f} ms", quartiles),
        "–" if moved is None else f"{moved:.1f} %",
        score(cost["last_loss"]),
    ]


def search(document: Mapping[str, Any], colors: Mapping[str, str]) -> list[Block]:
    """The candidates of each strategy and the one that was chosen, on the validation split."""
    found = document["search"]
    if not found:
        return []
    cells = [
        [
            name,
            rate(one["learning_rate"]),
            Cell(score(one["score"]), mark="good" if one["chosen"] else ""),
            *(score(one["scores"].get(bench)) for bench in document["benchmarks"]),
        ]
        for name, tried in found.items()
        for one in tried
    ]
    note = f"{candidates(found).capitalize()}, scored on the validation split alone; ✓ the rate that was chosen."
    table = Table(["", "learning rate", "average", *document["benchmarks"]], cells)
    return [
        Heading("Learning rates"),
        Text(note),
        *search_figure(found, colors),
        Details("All candidates and their scores", [table]),
    ]


def examples(document: Mapping[str, Any]) -> list[Block]:
    cards: list[Block] = []
    for one in document["examples"]:
        given: dict[str, list[str]] = {}
        for label, text in one["answers"].items():
            given.setdefault(text, []).append(label)
        rows = [[", ".join(labels), text] for text, labels in given.items()]
        title = one["question"].replace("<image>", "").strip()
        blocks: list[Block] = [
            Text(f"{one['task']}; right: {one['truth']}"),
            Table(["asked", "answer"], rows, stacked=True),
        ]
        cards.append(Card(one["image"], title, blocks, alt=f"image of a {one['task']} item"))
    return [Heading("Answers"), *cards] if cards else []


def claims(document: Mapping[str, Any]) -> list[Block]:
    found = document.get("claims") or []
    if not found:
        return []
    rows = [
        [
            one["claim"],
            f"{one['paper']} {one['source']}",
            Cell(one["verdict"], mark=VERDICTS.get(one["verdict"], "quiet")),
            one["here"],
        ]
        for one in found
    ]
    return [
        Heading("The paper's claims"),
        Table(
            ["claim", "in the paper", "verdict", "here"],
            rows,
            f"{SOURCES} Intervals: 95 %, {over(document)}.",
            stacked=True,
        ),
    ]


def failures(document: Mapping[str, Any]) -> list[Block]:
    rows = [[row["label"], str(one["seed"]), one["error"]] for row in document["rows"] for one in row["failed"]]
    if not rows:
        return []
    note = (
        "Rows with a failed seed rest on the seeds that finished; where one is left, the spread over trainings is not "
        "in their intervals. The same command tries the failed ones again."
    )
    return [Heading("Failed"), Note(note), Table(["row", "seed", "error"], rows, stacked=True)]


def reproduction(document: Mapping[str, Any]) -> list[Block]:
    started = f"; started {document['started']}" if document.get("started") else ""
    return [
        Heading("Reproduce"),
        Code(document["command"]),
        Text(f"{worked(document)}. {machine(document['provenance'])}{started}."),
        Details(f"recipe (hash {document['recipe_hash']})", [Code(document["recipe"])]),
    ]
