"""A report of analyses: one run, or several side by side; runs of different models each under their own heading.

Scope: from documents of `analyze_run` to a `reporting.Document`. Not here: plots and tables of what was measured
(figures.py), reports of comparisons.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from normtune.analysis.figures import analysis_blocks
from normtune.reporting import Block, Code, Document, Heading, Note, Table, Text

Documents = Mapping[str, Mapping[str, Any]]


def labels_of(runs: Sequence[str]) -> list[str]:
    """A short name for each run's folder: its own, or as much of its path as tells it from the others."""
    parts = [Path(run).resolve().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return list(runs)


def by_model(documents: Documents) -> list[dict[str, Mapping[str, Any]]]:
    """The documents of each base model together, in their order."""
    groups: dict[str, dict[str, Mapping[str, Any]]] = {}
    for label, document in documents.items():
        groups.setdefault(json.dumps(document.get("model"), sort_keys=True), {})[label] = document
    return list(groups.values())


def report(documents: Documents, command: str) -> Document:
    """Everything that the documents hold, `command` to get it again."""
    groups = by_model(documents)
    blocks: list[Block] = []
    if len(groups) > 1:
        text = f"These runs tune {len(groups)} different models, which are shown apart: their figures do not compare."
        blocks.append(Note(text))
    for group in groups:
        model = next(iter(group.values())).get("model") or {}
        if len(groups) > 1:
            blocks.append(Heading(name_of(model)))
        blocks += [*setting(group), *analysis_blocks(group)]
    blocks += [Heading("How to get it again"), Code(command)]
    return Document("What tuning changed", blocks, ", ".join(documents))


def setting(documents: Documents) -> list[Block]:
    """What was analyzed."""
    rows = []
    for label, one in documents.items():
        seed, measured = one.get("seed"), one.get("gradients") or {}
        stream = measured.get("stream", "")
        rows.append([label, str(one["strategy"]), "" if seed is None else str(seed), str(one["samples"]), stream])
    header = ["run", "strategy", "seed", "held-out samples", "gradient batches"]
    sources = sorted({str(one.get("held_out")) for one in documents.values()})
    return [
        Table(header, rows),
        Text(f"Held-out samples: {', '.join(sources)}. Formulas, controls and their limits: docs/analysis.md."),
    ]


def name_of(model: Mapping[str, Any]) -> str:
    """A model in a recipe's words."""
    parts = [model.get("path")] if model.get("path") else [model.get("llm"), model.get("vision")]
    return " + ".join(Path(str(part)).name for part in parts if part) or "a model that its adapter does not name"
