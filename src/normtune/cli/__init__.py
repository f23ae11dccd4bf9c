"""The command line: one command a file, errors in one to three lines, torch imported only by what needs it."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

import normtune
from normtune.cli import (
    analyze,
    chat,
    compare,
    data,
    demo,
    evaluate,
    export,
    init,
    merge,
    norms,
    plan,
    score,
    serve,
    train,
)
from normtune.errors import NormtuneError

app = typer.Typer(
    name="normtune",
    help="Turn a text LLM into a multimodal LLM by tuning the gains of its normalization layers.\n\n"
    "Start with `normtune demo`; then `normtune init` writes a recipe for your own model and data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.demo)
app.command("init")(init.init)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("score")(score.score)
app.command("compare")(compare.compare)
app.command("analyze")(analyze.analyze)
app.command("norms")(norms.norms)
app.command("plan")(plan.plan)
app.add_typer(data.commands, name="data")
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("merge")(merge.merge)
app.command("export")(export.export)


def show_version(value: bool) -> None:
    if value:
        print(f"normtune {normtune.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """--debug, anywhere on the line, shows the traceback of an error."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns nothing but exits with 0, 1 (failed job), 2 (wrong input) or 130 (interrupted)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(args=[a for a in arguments if a != "--debug"], prog_name="normtune")
    except NormtuneError as error:
        fail(str(error), error.exit_code, debug)
    except KeyboardInterrupt:
        fail("interrupted", 130, debug)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        text = str(error).strip().splitlines()
        fail(f"{type(error).__name__}: {text[0] if text else ''} (--debug shows where)", 1, debug)
    return 0


def fail(message: str, code: int, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exc()
    lines = message.splitlines()[:3]
    print(f"normtune: {lines[0]}", *(f"  {line}" for line in lines[1:]), sep="\n", file=sys.stderr)
    sys.exit(code)
