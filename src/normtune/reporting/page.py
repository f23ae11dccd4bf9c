"""A document as one self-contained HTML page: no script, no request, light and dark, readable on a phone.

Scope: HTML of each block, unique ids. Text is escaped wherever it comes from. Wide tables and long lines of code scroll
inside their own box; nothing else is wider than the screen. Not here: the style (`style`), the plots (`plots`).
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

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
from normtune.reporting.numbers import is_number
from normtune.reporting.palette import MARKERS
from normtune.reporting.style import style

SIGNS = {"best": "★", "tied": "≈", "good": "✓", "bad": "✗"}
"""What stands before a marked cell's text, in HTML and in Markdown."""
_ID = re.compile(r'(\bid="|href="#|url\(#)')


class Page:
    """Renders blocks one after another and keeps what must be unique on a page: ids of headings and of plots."""

    def __init__(self) -> None:
        self.plots = 0
        self.anchors: dict[str, str] = {}  # id -> heading of level 2, for the contents

    def block(self, block: Block) -> str:
        match block:
            case Heading(text, level):
                return f"<h{level}{self.anchor(text) if level == 2 else ''}>{escape(text)}</h{level}>"
            case Text(text):
                return f"<p>{escape(text)}</p>"
            case Note(text):
                return f"<p class='note'>{escape(text)}</p>"
            case Bullets(items):
                return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"
            case Code(text):
                return f"<pre>{escape(text)}</pre>"
            case Tokens(pieces):
                tags = (("b" if marked else "span", text) for text, marked in pieces)
                return f"<p class='tokens'>{'<wbr>'.join(f'<{tag}>{escape(text)}</{tag}>' for tag, text in tags)}</p>"
            case Details(summary, blocks):
                return f"<details><summary>{escape(summary)}</summary>{self.blocks(blocks)}</details>"
            case Card():
                return self.card(block)
            case Table():
                return table(block)
            case Figure():
                return self.figure(block)

    def blocks(self, blocks: Sequence[Block]) -> str:
        return "\n".join(self.block(block) for block in blocks)

    def anchor(self, text: str) -> str:
        name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "part"
        while name in self.anchors:
            name += "-"
        self.anchors[name] = text
        return f' id="{name}"'

    def card(self, card: Card) -> str:
        image = f"<img src='{escape(card.image)}' alt='{escape(card.alt)}'>" if card.image else ""
        return f"<div class='card'>{image}<div><h3>{escape(card.title)}</h3>{self.blocks(card.blocks)}</div></div>"

    def figure(self, figure: Figure) -> str:
        panels = []
        for svg in figure.panels:
            self.plots += 1
            panels.append(_ID.sub(rf"\g<1>p{self.plots}-", svg))
        parts = [f"<div class='panels {figure.size}-panels'>{''.join(panels)}</div>"]
        if figure.legend:
            parts.append(
                "<div class='legend'>"
                + "".join(
                    f"<span><b style='color: var(--{color})'>{MARKERS[color][1]}</b>{escape(label)}</span>"
                    for label, color in figure.legend
                )
                + "</div>"
            )
        if figure.scale:
            low, high, meaning = map(escape, figure.scale)
            parts.append(f"<div class='scale'>{low}<i></i>{high}<span>{meaning}</span></div>")
        if figure.caption:
            parts.append(f"<figcaption>{escape(figure.caption)}</figcaption>")
        if figure.table:
            parts.append(f"<details><summary>figures of the plot</summary>{table(figure.table)}</details>")
        return "<figure>" + "".join(parts) + "</figure>"


def escape(text: str) -> str:
    return html.escape(text, quote=True)


def table(block: Table) -> str:
    """A table in a box of its own that scrolls sideways where the screen is narrow (or stacks, where asked to)."""
    right = numeric_columns(block)
    classes = [" class='number'" if i in right else "" for i in range(len(block.header))]
    head = "".join(f"<th scope='col'{c}>{escape(text)}</th>" for c, text in zip(classes, block.header, strict=True))
    head = f"<thead><tr>{head}</tr></thead>" if any(block.header) else ""
    rows = []
    for index, row in enumerate(block.rows):
        if index in block.groups:
            rows.append(
                f"<tr class='group'><th colspan='{len(row)}'><span>{escape(block.groups[index])}</span></th></tr>"
            )
        cells = [
            table_cell(cell, "th scope='row'" if i == 0 else "td", classes[i], block.header[i])
            for i, cell in enumerate(row)
        ]
        rows.append("<tr>" + "".join(cells) + "</tr>")
    caption = f"<p class='caption'>{escape(block.caption)}</p>" if block.caption else ""
    kind = "wide stacked" if block.stacked else "wide"
    return f"<div class='{kind}' tabindex='0'><table>{head}<tbody>{''.join(rows)}</tbody></table></div>{caption}"


def table_cell(cell: str | Cell, tag: str, kind: str, column: str) -> str:
    if isinstance(cell, str):
        cell = Cell(cell)
    text = escape(cell.text)
    if cell.mark in SIGNS:
        text = f"<span class='{cell.mark}' title='{escape(MARKS[cell.mark])}'>{SIGNS[cell.mark]} {text}</span>"
    elif cell.mark:
        text = f"<span class='{cell.mark}'>{text}</span>"
    if cell.detail:
        text += f"<small>{escape(cell.detail)}</small>"
    label = f" data-column='{escape(column)}'" if column else ""
    return f"<{tag}{kind}{label}>{text}</{tag.split()[0]}>"


def numeric_columns(block: Table) -> set[int]:
    """Columns, but the first, of whose cells each is a number or empty."""
    texts = [[cell.text if isinstance(cell, Cell) else cell for cell in row] for row in block.rows]
    return {i for i in range(1, len(block.header)) if texts and all(is_number(row[i]) for row in texts)}


def render(document: Document) -> str:
    page = Page()
    body = page.blocks(document.blocks)
    lead = f"<p class='lead'>{escape(document.lead)}</p>" if document.lead else ""
    links = "".join(f"<a href='#{name}'>{escape(text)}</a>" for name, text in page.anchors.items())
    contents = f"<nav>{links}</nav>" if len(page.anchors) > 3 else ""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta http-equiv='Content-Security-Policy' "
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        "<link rel='icon' href='data:,'>"
        f"<title>{escape(document.title)}</title><style>{style()}</style></head>"
        f"<body><h1>{escape(document.title)}</h1>{lead}{contents}\n{body}\n</body></html>\n"
    )
