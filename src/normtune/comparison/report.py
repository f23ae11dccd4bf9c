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
from normtune.reporting import Block, Bullets, Card, Cell, Code, Details, Document, Heading, Note, Table, Text
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
    seeds, questions = document["seeds"], document["questions"]
    rows = [row for row in document["rows"] if row["baseline"] == "none" and not row["control"]]
    compared = [row["label"] for row in rows]
    if document["curves"] and len(rows) > MOST_ROWS:
        compared = [curve["name"] for curve in document["curves"]]
    asked = ", ".join(f"{name} ({questions.get(name, 0):,})" for name in document["benchmarks"])
    facts = [
        ["compared", ", ".join(compared)],
        ["controls", "; ".join(row["label"] for row in document["rows"] if row["control"])],
        ["seeds", ", ".join(map(str, seeds))],
        ["asked", f"{SPLITS.get(document['asked_on'], document['asked_on'])}: {asked}"],
        ["stage 1", "once, the same for every row; then the same batches in the same order"],
        ["time", f"{human_seconds(document['seconds'])} of training and evaluation"],
        ["hardware", f"{document['provenance']['cores']} cores of {document['provenance']['processor']}"],
    ]
    equal = document["request"].get("equal")
    if document["experiment"] == "kinds" and equal:
        facts.insert(1, ["equal in", str(equal).replace("-", " ")])
    if document["experiment"] == "sweep align":
        facts = [fact for fact in facts if fact[0] != "stage 1"]
    return [Table(["", ""], [fact for fact in facts if fact[1]], stacked=True)]


def findings(document: Mapping[str, Any]) -> list[Block]:
    """What came out, in sentences."""
    told = [*best_of(document), *document["findings"]]
    return [Heading("What came out"), Bullets(told)] if told else []


def best_of(document: Mapping[str, Any]) -> list[str]:
    """Who is best on average, if the interval says so."""
    found = document["winners"].get("average")
    if not found:
        return []
    if found["tied"]:
        names = ", ".join([found["best"], *found["tied"]])
        return [f"On average the paired 95 % interval does not tell apart: {names}."]
    return [f"On average {found['best']} is best; the paired 95 % interval tells it from every other row."]


def scores(document: Mapping[str, Any], colors: Mapping[str, str]) -> list[Block]:
    folded = [*differences(document["rows"]), *benchmark_details(document)]
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
        "Small: 95 % intervals over seeds and samples. ★ best, told from every other row by the paired interval; "
        "≈ not told from the best. Controls are never marked."
    )
    if references:
        note += f" “to {references[0]}”: mean over tasks of score / score of {references[0]}, minus 1."
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


def forgotten(row: Row) -> Cell:
    text = row["text"]
    if not text:
        return Cell("–")
    return Cell(score(text["after"]), "" if text["change"] is None else f"{text['change']:+.3f}")


def differences(rows: Sequence[Row]) -> list[Block]:
    """Paired differences of the average between all rows, folded: who is told from whom."""
    found: dict[tuple[str, str], tuple[float, float, float]] = {}  # (row, column) -> mean, low, high
    for row in rows:
        for other, parts in (row.get("differences") or {}).items():
            if parts.get("average"):
                mean, (low, high) = parts["average"]["mean"], parts["average"]["interval"]
                found[row["label"], other] = mean, low, high
                found[other, row["label"]] = -mean, -high, -low
    labels = [row["label"] for row in rows if any(row["label"] in pair for pair in found)]
    if not labels:
        return []
    cells = [[one, *(difference(found.get((one, other))) for other in labels)] for one in labels]
    note = "Row minus column, with its paired 95 % interval; bold where the interval does not hold zero."
    return [Details("Differences of the average between rows", [Table(["", *labels], cells, note)])]


def difference(found: tuple[float, float, float] | None) -> Cell:
    if found is None:
        return Cell("–")
    mean, low, high = found
    return Cell(f"{mean:+.3f}", f"{low:+.3f} to {high:+.3f}", "told" if low > 0 or high < 0 else "")


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
    note = (
        f"Trained parameters and their share; the adapter on disk; peak {peak}; bytes that autograd saves for backward "
        "of one micro-batch; median time of a step; share of the gains that moved; loss of the last step. Times and "
        "memory are medians over the seeds."
    )
    table = Table(header, cells, note, groups=controls_from(rows))
    return [Heading("Cost"), table, *cost_figure(document, colors)]


def rate_of(row: Row) -> str:
    return "–" if row["learning_rate"] is None else rate(row["learning_rate"])


def cost_cells(cost: Row) -> list[str]:
    moved = cost.get("moved_percent")
    return [
        f"{cost['trainable_parameters']:,}",
        f"{cost['percent']:.3g} %",
        human_bytes(cost["adapter_bytes"]),
        human_bytes(cost["peak_bytes"]),
        human_bytes(cost["saved_bytes"]),
        f"{1000 * cost['step_seconds']:.0f} ms",
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
    count = max(len(tried) for tried in found.values())
    note = f"{count} candidates per strategy, scored on the validation split alone; ✓ the rate that was chosen."
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
        Table(["claim", "in the paper", "verdict", "here"], rows, SOURCES, stacked=True),
    ]


def failures(document: Mapping[str, Any]) -> list[Block]:
    rows = [[row["label"], str(one["seed"]), one["error"]] for row in document["rows"] for one in row["failed"]]
    if not rows:
        return []
    note = "Rows with a failed seed rest on the seeds that finished. The same command tries the failed ones again."
    return [Heading("Failed"), Note(note), Table(["row", "seed", "error"], rows, stacked=True)]


def reproduction(document: Mapping[str, Any]) -> list[Block]:
    started = f", started {document['started']}" if document.get("started") else ""
    return [
        Heading("Reproduce"),
        Code(document["command"]),
        Text(f"{human_seconds(document['seconds'])} on {machine(document['provenance'])}{started}."),
        Details(f"recipe (hash {document['recipe_hash']})", [Code(document["recipe"])]),
    ]
