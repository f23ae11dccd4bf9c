"""What commands print: tables for people, one JSON document for programs; and what they share."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from normtune.progress import quiet_libraries
from normtune.reporting.numbers import human_bytes, human_count, is_number

__all__ = ["cell", "human_bytes", "human_count", "print_json", "print_table", "quiet_libraries"]


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
    """A plain table on stdout, numbers to the right; in a file or pipe each row is one line, however long."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, collapse_padding=True)
    for i, column in enumerate(columns):
        numeric = all(isinstance(row[i], int | float) or is_number(str(row[i])) for row in rows)
        table.add_column(column, justify="right" if numeric and rows else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell(value) for value in row))
    width = None if sys.stdout.isatty() else 10_000
    Console(width=width, highlight=False, markup=False).print(table)


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
