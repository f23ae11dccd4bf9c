"""`normtune evaluate`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from normtune.evaluation import Settings
    from normtune.tuned import Tuned


def evaluate(
    model: Annotated[str, typer.Argument(help="Run folder, adapter folder or MLLM folder.")],
    benchmarks: Annotated[str | None, typer.Option(help="Comma-separated: pope,mme,vqav2,coco,flickr30k,text.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder with the benchmarks in their official layouts.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=0, help="Items per benchmark, whole images at a time; 0: all.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Another split: popular, or pope=popular,coco=val2017.")] = None,
    rules: Annotated[str, typer.Option(help="official or lmms-eval: how answers are read.")] = "official",
    baseline: Annotated[str, typer.Option(help="blind: without the image; shuffled: another item's.")] = "none",
    mode: Annotated[str, typer.Option(help="generate, or likelihood (of Yes and No, on pope and mme).")] = "generate",
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered together.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Of what --limit takes and --baseline shuffled shows.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="Of an MLLM folder: float32 (default), bfloat16.")] = None,
    out: Annotated[Path | None, typer.Option(help="Result FILE.json, or a folder (default: the run's).")] = None,
    against: Annotated[Path | None, typer.Option(help="Another result: show the paired differences.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Score a model on benchmarks; a run's own recipe gives benchmarks and data where they are not named, and its limit
    where neither is.

    Answers go to disk as they come: the same command goes on where an interrupted one was.

    Example: normtune evaluate runs/world --benchmarks pope,mme --data eval/
    """
    from normtune.cli.output import print_json, quiet_libraries

    quiet_libraries()
    from normtune.evaluation import Settings, data_folder, evaluate_into, splits_of
    from normtune.progress import Bars, say
    from normtune.sharding import join
    from normtune.tuned import open_tuned, place
    from normtune.world import resolve_path

    first = os.environ.get("RANK", "0") == "0"  # of several processes (torchrun): it writes and speaks
    join(cpu=device == "cpu")
    names, folder, recipes = asked_for(model, benchmarks, data)
    if limit is None and recipes:
        limit = recipes
        if first:
            print(f"limit {limit} (the recipe's); --limit 0 asks everything", file=sys.stderr)
    unique = tuple(dict.fromkeys(names))
    settings = Settings(unique, limit or None, splits_of(split, unique), baseline, rules, mode, seed)  # type: ignore[arg-type]
    root = data_folder(resolve_path(folder))
    tuned = open_tuned(model, dtype=dtype)  # it may take minutes, unlike what is refused above
    if first and (tuned.record or {}).get("gate") == "image":
        say("the adapter's gate is left out of account: it answers questions without an image, too")
    place(tuned.model, device)
    target = target_of(out, model, settings)
    with Bars() as bars:
        document = evaluate_into(
            target,
            tuned.model,
            tuned.processor,
            settings,
            root,
            about=about(model, tuned),
            batch_size=batch_size,
            against=against,
            progress=bars.update if first else None,
            together=True,
        )
    if not first:
        return
    if json:
        print_json({"result": str(target), **document})
    else:
        show(document, target)


def asked_for(model: str, benchmarks: str | None, data: str | None) -> tuple[list[str], str, int | None]:
    """Names of the benchmarks, their folder, and a limit where all is as the run's recipe says."""
    from normtune.errors import InputError
    from normtune.recipe import load_recipe

    own = Path(model) / "recipe.yaml"
    asked = load_recipe(own).evaluate if own.is_file() else None
    names = [name.strip() for name in benchmarks.split(",")] if benchmarks else (asked.benchmarks if asked else [])
    folder = data or (asked.data if asked else None)
    if not names or folder is None:
        why = "has no recipe with an `evaluate` section" if Path(model).exists() else "is no folder here"
        raise InputError(f"{model} {why}: give --benchmarks and --data")
    return names, folder, asked.limit if asked and not benchmarks and not data else None


def about(model: str, tuned: Tuned) -> dict[str, Any]:
    """The identity of run, adapter or model for the record."""
    from normtune.adapter import adapter_folder
    from normtune.evaluation import identity
    from normtune.recipe import recipe_hash

    recipe = recipe_hash(tuned.recipe) if tuned.recipe else None
    return identity(model, recipe, tuned.record, adapter_folder(model) if tuned.record else None)


def target_of(out: Path | None, model: str, settings: Settings) -> Path:
    """The result's file: `out` or in it; else in the run's `evaluations`; of any other model in `evaluations` here."""
    if out is not None:
        return out if out.suffix == ".json" else out / f"{settings.name}.json"
    folder = Path(model)
    if (folder / "recipe.yaml").is_file():
        return folder / "evaluations" / f"{settings.name}.json"
    if (folder.parent / "recipe.yaml").is_file():
        return folder.parent / "evaluations" / folder.name / f"{settings.name}.json"
    return Path("evaluations") / folder.resolve().name / f"{settings.name}.json"


def show(document: dict[str, Any], target: Path) -> None:
    """Tables for a person: scores, and differences where there are some."""
    from normtune.cli.output import print_table

    rows = [
        [name, facts["score"], span(facts["intervals"].get("score")), facts["n"], detail(facts)]
        for name, facts in document["scores"].items()
    ]
    rows = [["-" if cell is None else cell for cell in row] for row in rows]
    print_table(["benchmark", "score", "95 % interval", "items", "figures"], rows)
    if document["against"]:
        found = document["against"]["differences"]
        rows = [
            [name, figure, one["difference"], span(one["interval"])]
            for name, figures in found.items()
            for figure, one in (figures or {}).items()
        ]
        print_table(
            ["benchmark", "figure", "difference", "95 % interval"], rows, f"against {document['against']['path']}"
        )
    print(f"{target}, answers in {target.with_suffix('')}")


def span(interval: list[float] | None) -> str:
    return f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""


def detail(facts: dict[str, Any]) -> str:
    """The plain numbers of a score with their intervals, for a person."""
    parts = []
    for name, value in facts.items():
        if isinstance(value, float) and name != "score":
            own = facts["intervals"].get(name)
            parts.append(f"{name} {value:.4g}" + (f" ({own[0]:.4g} to {own[1]:.4g})" if own else ""))
    return ", ".join([*parts, *([f"{facts['ties']['count']} ties"] if facts["ties"]["count"] else [])])
