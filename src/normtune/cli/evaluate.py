"""`normtune evaluate`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import typer


class ControlName(enum.StrEnum):
    none = "none"
    blind = "blind"
    shuffled = "shuffled"


def evaluate(
    model: Annotated[str, typer.Argument(help="Run folder, adapter folder or MLLM folder.")],
    benchmarks: Annotated[str | None, typer.Option(help="Comma-separated: pope,mme,vqav2,coco,flickr30k,text.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder with the benchmarks in their official layouts.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items per benchmark.")] = None,
    control: Annotated[
        ControlName, typer.Option(help="blind: without the image; shuffled: another item's.")
    ] = ControlName.none,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 32,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Score a model on benchmarks; a run's own recipe gives benchmarks and data where they are not named.

    Example: normtune evaluate runs/world --benchmarks pope,mme --data eval/
    """
    from normtune.cli.output import print_json, print_table, quiet_libraries
    from normtune.errors import InputError

    quiet_libraries()
    from normtune.evaluation import evaluate_model
    from normtune.progress import Bar
    from normtune.runlog import Run, provenance, write_json
    from normtune.tuned import open_tuned
    from normtune.world import resolve_path

    tuned = open_tuned(model)
    asked = tuned.recipe.evaluate if tuned.recipe else None
    names = [name.strip() for name in benchmarks.split(",")] if benchmarks else (asked.benchmarks if asked else [])
    folder = data or (asked.data if asked else None)
    if not names or folder is None:
        raise InputError(f"{model} has no `evaluate` section in a recipe: give --benchmarks and --data")
    limit = limit or (asked.limit if asked else None)
    bars: dict[str, Bar] = {}

    def progress(name: str, done: int, total: int) -> None:
        if name not in bars:
            for bar in bars.values():
                bar.__exit__(None, None, None)
            bars[name] = Bar(name, total).__enter__()
        bars[name].update(done)

    options: dict[str, Any] = {"limit": limit, "control": control.value, "batch_size": batch_size}
    try:
        scores = evaluate_model(
            tuned.model, tuned.processor, names, resolve_path(folder), progress=progress, predictions=True, **options
        )
    finally:
        for bar in bars.values():
            bar.__exit__(None, None, None)
    if tuned.recipe is not None:
        suffix = "" if control is ControlName.none else f"-{control.value}"
        target = Run(Path(model)).folder / "evaluations" / f"{'-'.join(names)}{suffix}.json"
        write_json(target, {"model": model, "data": str(folder), **options, "scores": scores, **provenance()})
    shown = {n: {k: v for k, v in facts.items() if k != "predictions"} for n, facts in scores.items()}
    if json:
        print_json({"model": model, "control": control.value, "scores": shown})
        return
    rows = [[name, facts["score"], facts["n"], detail(facts)] for name, facts in shown.items()]
    print_table(["benchmark", "score", "items", "figures"], rows)


def detail(facts: dict[str, Any]) -> str:
    """The plain numbers of a score, for a person."""
    numbers = {k: v for k, v in facts.items() if isinstance(v, float) and k != "score"}
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
