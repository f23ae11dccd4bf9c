"""A document as GitHub's Markdown: tables as pipes, plots as their tables or a line that says where they are.

Scope: text of each block, escaped, so that an answer with a pipe or an asterisk stays what it is. Images are left out:
a Markdown viewer shows no `data:` URI.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from normtune.reporting.blocks import (
    Block,
    Bullets,
    Card,
    Cell,
    Code,
    Details,
    Document,
    Figure,
    Heading,
    Note,
    Table,
    Text,
    Tokens,
)
from normtune.reporting.page import SIGNS, numeric_columns


def render(document: Document) -> str:
    parts = [f"# {escape(document.title)}"]
    if document.lead:
        parts.append(escape(document.lead))
    return "\n\n".join([*parts, *map(render_block, document.blocks)]) + "\n"


def render_block(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {escape(text)}"
        case Text(text):
            return escape(text)
        case Note(text):
            return f"> {escape(text)}"
        case Bullets(items):
            return "\n".join(f"- {escape(item)}" for item in items)
        case Code(text):
            return fenced(text)
        case Tokens(pieces):
            return fenced("".join(f"[{text}]" if marked else text for text, marked in pieces))
        case Details(summary, blocks):
            head = f"<details><summary>{html.escape(summary)}</summary>"
            return "\n\n".join([head, *map(render_block, blocks), "</details>"])
        case Card(_, title, blocks):
            return "\n\n".join([f"**{escape(title)}**", *map(render_block, blocks)])
        case Table():
            return table(block)
        case Figure(_, caption, _, _, _, shown):
            text = f"*{escape(caption)}*"
            return f"{text}\n\n{table(shown)}" if shown else f"{text} (plot: report.html)"


def table(block: Table) -> str:
    """A table of pipes; a group's heading is a row of its own."""
    right = numeric_columns(block)
    rules = ["---:" if i in right else "---" for i in range(len(block.header))]
    lines = [row_of(block.header), "| " + " | ".join(rules) + " |"]
    for index, row in enumerate(block.rows):
        if index in block.groups:
            lines.append(row_of([Cell(block.groups[index], mark="group"), *[""] * (len(row) - 1)]))
        lines.append(row_of(row))
    text = "\n".join(lines)
    return f"{text}\n\n{escape(block.caption)}" if block.caption else text


def row_of(cells: Sequence[str | Cell]) -> str:
    return "| " + " | ".join(map(table_cell, cells)) + " |"


def table_cell(cell: str | Cell) -> str:
    if isinstance(cell, str):
        cell = Cell(cell)
    text = escape(cell.text).replace("\n", "<br>")
    if cell.mark in ("best", "group", "good", "bad", "told"):
        text = f"**{text}**"
    if cell.mark in SIGNS:
        text = f"{SIGNS[cell.mark]} {text}"
    return f"{text} ({escape(cell.detail)})" if cell.detail else text


def escape(text: str) -> str:
    """Text that Markdown shows as it stands."""
    text = re.sub(r"([\\`*\[\]<>|])", r"\\\1", text)
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)
    return re.sub(r"^(\s*)(#|[-+](?= )|~~~|\d+(?=[.)] ))", r"\1\\\2", text, flags=re.M)


def fenced(text: str) -> str:
    """A code block whose fence is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text.rstrip()}\n{fence}"
