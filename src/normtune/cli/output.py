"""What commands print: tables for people, one JSON document for programs; and what they share."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

NUMBER = re.compile(r"-?|[-+]?\d[\d.,e+-]*( ?([kMG]?B|[kMG]))?")
"""Text that stands to the right in a table: a number, with a prefix or unit, or none."""


def quiet_libraries() -> None:
    """Keeps transformers' loading bars and hints off the terminal; our own progress is enough."""
    import logging

    import transformers

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it tells of kernels it has not
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
    """A plain table on stdout, numbers to the right; in a file or pipe each row is one line, however long."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, collapse_padding=True)
    for i, column in enumerate(columns):
        numeric = all(isinstance(row[i], int | float) or NUMBER.fullmatch(str(row[i])) for row in rows)
        table.add_column(column, justify="right" if numeric and rows else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell(value) for value in row))
    width = None if sys.stdout.isatty() else 10_000
    Console(width=width, highlight=False, markup=False).print(table)


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def human_count(count: float) -> str:
    """13,047,331,840 -> 13.05 G."""
    for unit in ("", " k", " M", " G"):
        if count < 1000 or unit == " G":
            return f"{count:.4g}{unit}"
        count /= 1000
    return ""


def human_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return ""
