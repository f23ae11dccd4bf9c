"""Reports: a document of blocks becomes one self-contained HTML page, and Markdown; plots are inline SVG.

Scope: blocks (`blocks`), the page and its style (`page`), Markdown (`markdown`), plots (`plots`), colours
(`palette`), figures as text (`numbers`). Knows nothing of trainings and comparisons: whoever has a result builds the
blocks. Not here: writing files (`runlog.write_text`).
"""

from __future__ import annotations

from normtune.reporting.blocks import (
    MARKS,
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

__all__ = [
    "MARKS",
    "Block",
    "Bullets",
    "Card",
    "Cell",
    "Code",
    "Details",
    "Document",
    "Figure",
    "Heading",
    "Note",
    "Table",
    "Text",
    "Tokens",
]
