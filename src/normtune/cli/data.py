"""`normtune data`: what is in a recipe's data, before a GPU is rented."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from normtune.data.checking import Exam
    from normtune.recipe import Recipe

SHOWN = 24  # samples of each stage on the page

commands = typer.Typer(no_args_is_help=True, help="Look at a recipe's data before it is trained on: `data check`.")


@commands.callback()
def data() -> None:
    """Keeps `check` a command of its own while it is the only one."""


@commands.command("check")
def check(
    recipe: Annotated[Path, typer.Argument(help="Recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides: stages.0.max_length=4096")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page that shows samples token by token.")] = None,
    max_bad: Annotated[
        str | None,
        typer.Option(help="Samples that may be bad: a number (20) or a share (0.01). Default: the recipe's."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Read every sample and every image of a recipe's stages, and say what training would refuse, cut or regret.

    Exits with 1 where a training would stop: more bad samples in all stages than `max_bad` (with `bad_samples: error`:
    any at all), or a file that cannot be read to its end; samples with nothing to learn count as well. Of the model
    the tokenizer and the vision encoder are read.

    Example: normtune data check recipe.yaml --html check.html
    """
    from normtune.cli.output import print_json, quiet_libraries
    from normtune.recipe import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    most = threshold(max_bad, resolved)
    quiet_libraries()
    from normtune.cli.data_report import page, print_findings
    from normtune.data.checking import Checker
    from normtune.data.findings import judge
    from normtune.progress import say
    from normtune.runlog import write_text
    from normtune.tuned import processor_of
    from normtune.world import resolve

    located = resolve(resolved)
    said: dict[str, int] = {}

    def progress(name: str, done: int) -> None:
        if done - said.get(name, 0) >= 10_000:
            said[name] = done
            say(f"{name}: {done:,} samples")

    checker = Checker(processor_of(located.model), exam_of(located), SHOWN if html else 0, progress)
    found = [checker.check(stage) for stage in located.stages]
    failed = [one.stage for one in found if one.bad or one.unreadable] if judge(found, most) else []
    if html is not None:
        write_text(html, page(resolved.name, found, checker, most).to_html())
        say(f"{html}: samples with the tokens that the loss counts")
    if json:
        print_json(
            {"recipe": resolved.name, "max_bad": most, "failed": failed, "stages": [f.document() for f in found]}
        )
    else:
        print_findings(found, most)
    if failed:
        raise typer.Exit(1)


def threshold(max_bad: str | None, recipe: Recipe) -> int | float:
    """How many samples may be bad: a number (int) or a share (float). InputError where it is neither."""
    from normtune.errors import InputError

    if max_bad is None:
        return recipe.max_bad if recipe.bad_samples == "skip" else 0
    try:
        value: int | float = int(max_bad) if max_bad.isdigit() else float(max_bad)
    except ValueError:
        value = -1
    if not (isinstance(value, int) and value >= 0) and not 0 <= value <= 1:
        raise InputError(f"--max-bad {max_bad!r}: give a number of samples (20) or a share of them (0.01)")
    return value


def exam_of(recipe: Recipe) -> Exam | None:
    """The images of the recipe's benchmarks, on `data` and `dev`; None without an `evaluate` section."""
    from normtune.data.checking import Exam
    from normtune.tasks import TASKS

    if recipe.evaluate is None:
        return None
    folders = [Path(folder) for folder in (recipe.evaluate.data, recipe.evaluate.dev) if folder is not None]
    items = (item for folder in folders for name in recipe.evaluate.benchmarks for item in TASKS[name].load(folder))
    return Exam(item.image for item in items if item.image is not None)
