"""What came out, in words: which row is highest, what each strategy adds to its control, what the intervals are over.

Scope: sentences and the matrix of paired differences, from the rows of a result document. Not here: how intervals come
about (`statistics`), the table of scores (`report`), what the result says about the paper (`claims`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from normtune.comparison.variants import parse_strategy, parts_of
from normtune.reporting import Block, Bullets, Cell, Details, Heading, Table, Text

Row = Mapping[str, Any]
Difference = tuple[float, float, float]  # mean, low, high
EXTRAS = frozenset(("connector", "embed", "head"))  # what strategies train beside the part that they are about
WITH_CONTROLS = ("strategies", "sweep vision")


def over(document: Mapping[str, Any]) -> str:
    """What the intervals are over, for captions: one seed tells nothing of what another training would have scored."""
    if max((len(row["seeds"]) for row in document["rows"]), default=0) > 1:
        return "over seeds and samples"
    return "over samples; one seed: the spread over trainings is not in it"


def findings(document: Mapping[str, Any]) -> list[Block]:
    """What came out, in sentences."""
    added = additions(document)
    told = [*best_of(document), *added, *document["findings"]]
    if not told:
        return []
    points = " Points are hundredths of the average score." if added else ""
    return [Heading("What came out"), Bullets(told), Text(f"Intervals: 95 %, paired, {over(document)}.{points}")]


def best_of(document: Mapping[str, Any]) -> list[str]:
    """Who is highest on average, and from whom the interval tells it."""
    found = document["winners"].get("average")
    if not found:
        return []
    best, tied = found["best"], ", ".join(found["tied"])
    counts = {len(row["seeds"]) for row in document["rows"] if row["average"] and not row["control"]}
    among = " of the rows with all seeds" if len(counts) > 1 else ""
    if tied:
        return [f"On average {best} is highest{among}; its paired 95 % interval does not tell it from {tied}."]
    return [f"On average {best} is best{among}; the paired 95 % interval tells it from every other candidate."]


def additions(document: Mapping[str, Any]) -> list[str]:
    """What each candidate adds to the row that trains its extras alone: whether it is the norms that count."""
    if document["experiment"] not in WITH_CONTROLS:
        return []
    rows, told = document["rows"], []
    found = paired(rows)
    for row in rows:
        control = None if row["control"] else control_of(row, rows)
        difference = found.get((row["label"], control["label"])) if control else None
        if control is None or difference is None:
            continue
        own, extras = trained(row) - EXTRAS, trained(control)
        what = f"its extras without {'+'.join(sorted(own))} ({control['label']})" if extras else control["label"]
        mean, low, high = (100 * figure for figure in difference)
        apart = "" if low > 0 or high < 0 else ", not told apart"
        told.append(f"{row['label']} against {what}: {mean:+.1f} points ({low:+.1f} to {high:+.1f}){apart}")
    return told


def control_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """The row that trains the same extras and nothing else, under the same encoder; stage 1 alone where a strategy has
    no extras. `llm` holds embedding and head. None for a row that is not there, or that trains nothing but extras."""
    parts = trained(row)
    extras = EXTRAS & parts | (EXTRAS - {"connector"} if "llm" in parts else frozenset())
    if parts <= extras:
        return None
    encoder = row["factors"].get("encoder")
    alike = (one for one in rows if one["baseline"] == "none" and one["factors"].get("encoder") == encoder)
    return next((one for one in alike if trained(one) == extras), None)


def trained(row: Row) -> frozenset[str]:
    """The parts that a row's last stage trains."""
    strategy = row["factors"].get("strategy", "none")
    return frozenset() if strategy == "none" else frozenset(parts_of(parse_strategy(strategy)))


def paired(rows: Sequence[Row]) -> dict[tuple[str, str], Difference]:
    """(row, other) -> the row's average minus the other's, both ways."""
    found = {}
    for row in rows:
        for other, parts in (row.get("differences") or {}).items():
            if parts.get("average"):
                mean, (low, high) = parts["average"]["mean"], parts["average"]["interval"]
                found[row["label"], other] = mean, low, high
                found[other, row["label"]] = -mean, -high, -low
    return found


def differences(document: Mapping[str, Any]) -> list[Block]:
    """Paired differences of the average between all rows, folded: who is told from whom."""
    found = paired(document["rows"])
    labels = [row["label"] for row in document["rows"] if any(row["label"] in pair for pair in found)]
    if not labels:
        return []
    cells = [[one, *(difference(found.get((one, other))) for other in labels)] for one in labels]
    note = f"Row minus column; bold where its paired 95 % interval does not hold zero ({over(document)})."
    return [Details("Differences of the average between rows", [Table(["", *labels], cells, note)])]


def difference(found: Difference | None) -> Cell:
    if found is None:
        return Cell("–")
    mean, low, high = found
    return Cell(f"{mean:+.3f}", f"{low:+.3f} to {high:+.3f}", "told" if low > 0 or high < 0 else "")
