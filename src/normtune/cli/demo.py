"""`normtune demo`: the embedded world, end to end, and a report of what came out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path | None, typer.Option(help="Folder to write (default: a new runs/demo-N).")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A smoke run: its figures mean nothing.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Teach a tiny text LLM to see, in minutes on a CPU: stage 1, norm tuning, baselines, scores, report.

    Example: normtune demo --quick
    """
    began = time.monotonic()
    folder = out or next_folder(Path("runs"))
    from normtune.cli.output import print_json, quiet_libraries
    from normtune.errors import InputError

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists already; choose another --out or remove it")
    quiet_libraries()
    from normtune.cli.demo_report import print_summary, write_report
    from normtune.cli.demo_runs import Demo

    result = Demo(folder, quick).run(began)
    write_report(folder, result)
    if json:
        print_json({key: result[key] for key in ("scores", "seconds", "peak_rss_bytes", "adapter_bytes", "run")})
    else:
        print_summary(result)


def next_folder(parent: Path) -> Path:
    """The first of parent/demo-1, demo-2, ... that does not exist."""
    number = 1
    while (parent / f"demo-{number}").exists():
        number += 1
    return parent / f"demo-{number}"
