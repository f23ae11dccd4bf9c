"""`normtune compare`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def compare(
    recipe: Annotated[Path, typer.Argument(help="Recipe, a YAML file with an `evaluate` section.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides: evaluate.limit=200")
    ] = None,
    strategies: Annotated[
        str | None, typer.Option(help="all, or names and part lists: full,lora,layernorm,norms+connector.")
    ] = None,
    kinds: Annotated[str | None, typer.Option(help="Kinds of data: conversation,detail,reasoning,mixed.")] = None,
    equal: Annotated[str, typer.Option(help="With --kinds, what is equal: samples or supervised-tokens.")] = "samples",
    sweep: Annotated[str | None, typer.Option(help="learning-rate, norms, align, vision or data.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of the last stage: the recipe's and the next ones.")] = 1,
    learning_rates: Annotated[
        str | None, typer.Option(help="Search on evaluate.dev: auto, or rates 1e-4,1e-3 (default: the recipe's).")
    ] = None,
    candidates: Annotated[int, typer.Option(min=2, help="Learning rates per strategy with auto.")] = 5,
    encoders: Annotated[str | None, typer.Option(help="With --sweep vision: two encoders or more.")] = None,
    ranking: Annotated[str, typer.Option(help="With --sweep norms: change or fisher.")] = "change",
    analysis: Annotated[bool, typer.Option(help="Also measure layers, gradients and gains of each row.")] = True,
    engine: Annotated[str, typer.Option(help="local: one cell after another; ray: on all GPUs or machines.")] = "local",
    out: Annotated[Path | None, typer.Option(help="Folder (default: runs/NAME-strategies and so on).")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the whole result as JSON.")] = False,
) -> None:
    """Compare strategies, kinds of data or settings fairly: one start, one data order, one evaluation, one report.

    The same command goes on where an interrupted one was.

    Example: normtune compare recipes/world.yaml --strategies all --seeds 3
    """
    from normtune.cli.output import print_json, quiet_libraries
    from normtune.recipe import load_recipe

    source = load_recipe(recipe, overrides or [])
    quiet_libraries()
    from normtune.comparison import Request
    from normtune.comparison import compare as run
    from normtune.world import resolve, resolve_path

    request = Request(
        strategies=listed(strategies),
        kinds=listed(kinds),
        equal=equal,
        sweep=sweep,
        seeds=tuple(range(source.seed, source.seed + seeds)),
        learning_rates=rates_of(learning_rates),
        candidates=candidates,
        encoders=tuple(resolve_path(name) for name in listed(encoders)),
        ranking=ranking,
        analyzed=analysis,
    )
    compared = run(
        resolve(source),
        request,
        out,
        engine=engine,  # type: ignore[arg-type]
        source=source,
        command=shlex.join(["normtune", *sys.argv[1:]]),
    )
    if json:
        print_json(compared.document)
    else:
        show(compared.document)
        for line in compared.failed:
            print(f"failed: {line.splitlines()[0]}")
        print(f"report: {compared.folder / 'report.html'}")
    if compared.failed:
        raise typer.Exit(1)


def listed(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def rates_of(text: str | None) -> str | tuple[float, ...] | None:
    """`auto`, or rates from `1e-4,3e-4`. InputError for anything else."""
    from normtune.errors import InputError

    if text is None or text == "auto":
        return text
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < rate < 10 for rate in found):
        raise InputError(f"--learning-rates {text!r}: give auto, or rates between 0 and 10 such as 1e-4,3e-4,1e-3")
    return found


def show(document: dict[str, Any]) -> None:
    """The table for a person, best rows marked where the intervals say so."""
    from normtune.cli.output import human_bytes, print_table

    names = list(next((row["scores"] for row in document["rows"] if row["scores"]), {}))
    winners = document["winners"]
    rows = []
    for row in document["rows"]:
        cells = [marked(row["scores"].get(name), winners.get(name), row["label"]) for name in names]
        cost = row["cost"] or {}
        rows.append(
            [
                row["label"],
                *cells,
                marked(row["average"], winners.get("average"), row["label"]),
                f"{row['text']['after']:.3f}" if row["text"] else "",
                f"{cost['trainable_parameters']:,} ({cost['percent']:.3g} %)" if cost else "",
                f"{row['learning_rate']:g}" if row["learning_rate"] else "",
                human_bytes(cost["adapter_bytes"]) if cost else "",
            ]
        )
    columns = ["", *names, "average", "text", "trained parameters", "rate", "adapter"]
    title = f"{document['title']}, {len(document['seeds'])} seed(s); * the best, as far as 95 % intervals tell"
    print_table(columns, rows, title)
    for sentence in document["findings"]:
        print(sentence)


def marked(score: dict[str, Any] | None, winner: dict[str, Any] | None, label: str) -> str:
    if score is None:
        return ""
    best = winner is not None and winner["best"] == label and not winner["tied"]
    return f"{score['mean']:.3f}{'*' if best else ''}"
