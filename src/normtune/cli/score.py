"""`normtune score`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def score(
    task: Annotated[str, typer.Argument(help="pope, mme, vqav2, coco or flickr30k.")],
    predictions: Annotated[list[Path], typer.Option(help="File in the benchmark's official format; MME: a folder.")],
    annotations: Annotated[
        list[Path] | None, typer.Option(help="Official file with the truth; POPE: once per split, or a folder.")
    ] = None,
    rules: Annotated[str, typer.Option(help="official or lmms-eval.")] = "official",
    split: Annotated[str | None, typer.Option(help="Only this split of the annotations.")] = None,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="Score what is there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Score a file of predictions, of any model, as the official program does; each figure with its 95 % interval.

    Example: normtune score vqav2 --predictions results.json --annotations v2_mscoco_val2014_annotations.json
    """
    from normtune.cli.output import print_json, print_table
    from normtune.errors import InputError, did_you_mean
    from normtune.tasks import TASKS
    from normtune.tasks.items import check_rules

    known = [name for name, entry in TASKS.items() if entry.join is not None]
    if task not in known:
        raise InputError(f"task '{task}' is unknown{did_you_mean(task, known)}.\nThere are {', '.join(known)}.")
    check_rules(rules)
    if not annotations and task != "mme":
        raise InputError(f"{task}: no annotations.\nGive the official file with --annotations.")
    join = TASKS[task].join
    assert join is not None
    joined = join(predictions, annotations or [], split, allow_missing)
    # METEOR takes a while and has no part in the headline: the other callers leave it out
    extra: dict[str, Any] = {"meteor": True} if task in ("coco", "flickr30k") else {}
    result = TASKS[task].measure(joined.items, joined.answers, rules, **extra).with_intervals()
    if joined.absent:
        total = joined.absent + len(joined.items)
        print(f"normtune: {joined.absent} of {total} had no prediction and were left out", file=sys.stderr)
    facts = {"task": task, "n": len(joined.items), "absent": joined.absent, "join": joined.join}
    if json:
        print_json({**result, **facts})
        return
    about = f"{task}, {facts['n']} predictions, rules: {result['rules']}, joined by {joined.join}"
    print_table(["figure", "value", "95 % interval"], table(result), about)


def table(result: dict[str, Any]) -> list[list[Any]]:
    """Rows of figure, value and interval, nested figures as NAME.FIGURE."""
    spans = result["intervals"]
    rows = []
    for name, value in flat(result):
        own = spans.get(name) or spans.get(name.removeprefix("splits.").removeprefix("subtasks."))
        if isinstance(value, float) and name != "f1":
            rows.append([name, value, f"{own[0]:.3f} to {own[1]:.3f}" if own else ""])
    return rows


def flat(figures: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted name, value) of nested figures, without intervals and what is only of interest to a program."""
    found: list[tuple[str, Any]] = []
    for name, value in figures.items():
        if name in ("intervals", "details", "per_question_type"):
            continue
        found += flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return found
