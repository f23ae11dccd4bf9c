"""`normtune analyze`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer


def analyze(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of finished runs, or adapter folders.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the report (default: RUN/analysis; of several runs: analysis).")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Held-out samples, LLaVA's format (default: evaluate.dev).")] = None,
    images: Annotated[str | None, typer.Option(help="Folder that the image names of --data are relative to.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Held-out samples, and as many of the training data.")] = 64,
    batches: Annotated[int, typer.Option(min=2, help="Batches that gradients are measured on.")] = 8,
    limit: Annotated[int, typer.Option(min=0, help="Questions per benchmark, with and without image; 0: all.")] = 100,
    json: Annotated[bool, typer.Option("--json", help="Print the documents as JSON.")] = False,
) -> None:
    """Show what tuning changed: similarity of layers, variance of gradients, gains, what the image contributes.

    Several runs stand side by side in one report.html (and report.md, analysis.json).

    Example: normtune analyze runs/full runs/layernorm --out report/
    """
    from normtune.cli.output import print_json, quiet_libraries

    quiet_libraries()
    from normtune.analysis import analyze_run, recipe_of
    from normtune.analysis.report import labels_of, report
    from normtune.errors import InputError
    from normtune.progress import say
    from normtune.runlog import provenance, write_json, write_text
    from normtune.world import resolve_path

    if images is not None and data is None:
        raise InputError("--images is the folder of --data: give --data FILE as well")
    runs = list(dict.fromkeys(runs))
    for run in runs:
        recipe_of(Path(run))  # all are looked at before the first is opened
    data, images = data and resolve_path(data), images and resolve_path(images)
    documents: dict[str, dict[str, Any]] = {}
    for label, run in zip(labels_of(runs), runs, strict=True):
        say(f"analyzing {run}")
        documents[label] = analyze_run(
            run, data=data, images=images, samples=samples, batches=batches, limit=limit or None
        )
    command = shlex.join(["normtune", *sys.argv[1:]])
    page = report(documents, command)
    folder = out or (Path(runs[0]) / "analysis" if len(runs) == 1 else Path("analysis"))
    result = {"format": 1, "command": command, "runs": documents, "provenance": provenance()}
    write_json(folder / "analysis.json", result)
    write_text(folder / "report.html", page.to_html())
    write_text(folder / "report.md", page.to_markdown())
    if json:
        print_json(result)
    else:
        show(documents)
        print(f"{folder / 'report.html'}, report.md, analysis.json")


def show(documents: Mapping[str, Mapping[str, Any]]) -> None:
    """The figures that stand for the rest, a row per run."""
    from normtune.cli.output import print_table

    header = ["run", "strategy", "cosine image", "cosine text", "CKA image", "CKA text", "train loss", "held-out loss"]
    rows = [[label, one["strategy"], *map(plain, headline(one))] for label, one in documents.items()]
    print_table([*header, "variance norms", "noise share norms", "gain change", "seconds"], rows)


def headline(document: Mapping[str, Any]) -> list[float | None]:
    """Means over layers, losses, gradients of the norms at the end, mean change of the trained gains."""
    similar = [document["similarity"][kind] or {} for kind in ("image", "text")]
    points = (document["gradients"] or {}).get("checkpoints") or [{"parts": {}}]
    norms = points[-1]["parts"].get("norms", {})
    changes = [gain["change"] for gain in document["gains"] if gain["trained"] and gain["change"] is not None]
    return [
        *(one.get(name) for name in ("mean_cosine", "mean_cka") for one in similar),
        *(document["losses"][name] for name in ("train", "held_out")),
        *(norms.get(name) for name in ("variance", "share")),
        sum(changes) / len(changes) if changes else None,
        document["seconds"],
    ]


def plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
