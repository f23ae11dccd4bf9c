"""`normtune train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides: stages.1.learning_rate=1e-4")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder (default: runs/NAME).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="With --resume: also under a changed recipe or on changed data.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a recipe: every stage, then an adapter. Progress goes to stderr, the result to stdout.

    Exit codes: 0 done (also where there is nothing to resume), 1 failed, 2 wrong input, 130 Ctrl-C, 143 SIGTERM; after
    both of the last everything is saved, and --resume goes on.

    Example: normtune train recipes/world.yaml stages.1.strategy=layernorm-simple --out runs/simple
    """
    from normtune.cli.output import human_bytes, print_json, print_table, quiet_libraries
    from normtune.recipe import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    quiet_libraries()
    from normtune.evaluation.during import during_training
    from normtune.runlog import read_lines
    from normtune.training import train as run_training
    from normtune.world import resolve

    located = resolve(resolved)
    trained = run_training(located, out=out, resume=resume, force=force, evaluate=during_training(located))
    if os.environ.get("RANK", "0") != "0":  # one of several processes: the first one speaks
        return
    size = sum(path.stat().st_size for path in (trained.folder / "adapter").rglob("*") if path.is_file())
    steps = [line for line in read_lines(trained.folder / "log.jsonl") if "loss" in line]
    rows = []
    for stage in resolved.stages:
        of_stage = [line for line in steps if line["stage"] == stage.name]
        if of_stage:
            moved = next((line["moved"] for line in reversed(of_stage) if "moved" in line), "-")
            first, last = of_stage[0]["loss"], of_stage[-1]["loss"]
            rows.append([stage.name, str(stage.strategy), of_stage[-1]["step"], first, last, moved])
    if json:
        keys = ("stage", "strategy", "steps", "first_loss", "last_loss", "moved_percent")
        stages = [dict(zip(keys, row, strict=True)) for row in rows]
        print_json({"run": str(trained.folder), "stages": stages, "adapter_bytes": size, "seconds": trained.seconds})
        return
    print_table(["stage", "strategy", "steps", "first loss", "last loss", "moved %"], rows)
    print(f"{trained.folder}: adapter of {human_bytes(size)}, {trained.seconds:.0f} s")
    print(f"next: normtune chat {trained.folder} --image PICTURE")
