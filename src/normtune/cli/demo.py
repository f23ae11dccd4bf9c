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
    ui: Annotated[bool, typer.Option("--ui", help="Then talk to its models on a page, until Ctrl-C.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of that page; 0 takes a free one.")] = 8000,
) -> None:
    """Teach a tiny text LLM to see, in minutes on a CPU: stage 1, norm tuning, baselines, scores, report.

    With --ui, an --out that holds a finished demo is served as it is.

    Example: normtune demo --quick
    """
    began = time.monotonic()
    folder = out or next_folder(Path("runs"))
    from normtune.cli.output import print_json, quiet_libraries
    from normtune.errors import InputError

    if ui:
        need_page()
    if ui and (folder / "demo.json").is_file():
        quiet_libraries()
        return show(folder, port)
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
    if ui:
        show(folder, port)


def need_page() -> None:
    """InputError where a package that the page needs is missing: before minutes of training, not after."""
    from normtune.cli.serve import need

    for module in ("fastapi", "uvicorn", "prometheus_client", "gradio"):
        need(module, "ui")


def show(folder: Path, port: int) -> None:
    from normtune.cli.demo_page import serve_demo

    serve_demo(folder, port)


def next_folder(parent: Path) -> Path:
    """The first of parent/demo-1, demo-2, ... that does not exist."""
    number = 1
    while (parent / f"demo-{number}").exists():
        number += 1
    return parent / f"demo-{number}"
