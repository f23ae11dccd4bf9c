"""The command line in this process: `run("train", ...)` returns the exit code."""

from __future__ import annotations

from normtune.cli import main


def run(*arguments: str) -> int:
    try:
        main(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
