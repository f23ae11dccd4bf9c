"""The blocks that a document is made of: plain data, rendered by `page` (HTML) and `markdown`.

Scope: what a block holds. Text is plain everywhere: what looks like HTML or Markdown in it is shown as it stands, so
that a model's answer can be put into a report as it came. Not here: how anything looks, how plots are drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

MARKS = {
    "best": "best: the paired 95 % interval tells it from every other candidate",
    "tied": "not told from the best by the paired 95 % interval",
    "good": "held",
    "bad": "did not hold",
    "told": "told apart: the interval does not hold zero",
    "quiet": "beside the point",
}
"""Kinds of mark that a cell can bear; never by colour alone: `best` is bold with a star, `tied` has a tilde."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, a smaller second line (an interval), and a mark of MARKS."""

    text: str
    detail: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2  # 2 is listed in the page's contents, 3 is not


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Note:
    """A paragraph that must not be overlooked."""

    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows of text or `Cell`s. Columns of numbers stand to the right.

    `groups` maps a row's index to the heading above it; `stacked` makes each row a block of its own on a narrow screen,
    where a table of sentences would have to be scrolled.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    caption: str = ""
    groups: Mapping[int, str] = field(default_factory=dict)
    stacked: bool = False


@dataclass(frozen=True)
class Figure:
    """One or more plots (SVG of `plots`) side by side as far as the screen is wide, one caption, one legend.

    `legend` is (label, name of a colour of `palette`) in order; `scale` is (lowest, highest, meaning) of a heatmap's
    colours; `size` is the width of a panel: "small", "normal" or "wide". `table` is what Markdown shows instead, and
    HTML beneath, folded.
    """

    panels: Sequence[str]
    caption: str = ""
    legend: Sequence[tuple[str, str]] = ()
    scale: tuple[str, str, str] | None = None
    size: str = "normal"
    table: Table | None = None


@dataclass(frozen=True)
class Card:
    """An image (a `data:` URI) beside a title and other blocks."""

    image: str
    title: str
    blocks: Sequence[Block] = ()
    alt: str = "image"


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Tokens:
    """Text in pieces, each of them marked or not: marked ones are coloured and underlined."""

    pieces: Sequence[tuple[str, bool]]


@dataclass(frozen=True)
class Details:
    """Blocks that are folded until asked for."""

    summary: str
    blocks: Sequence[Block]


Block = Heading | Text | Note | Bullets | Table | Figure | Card | Code | Tokens | Details


@dataclass(frozen=True)
class Document:
    """A title, a line or two beneath it, and blocks."""

    title: str
    blocks: Sequence[Block]
    lead: str = ""

    def to_html(self) -> str:
        """One self-contained page: no script, no request to anywhere."""
        from normtune.reporting.page import render

        return render(self)

    def to_markdown(self) -> str:
        """The same as Markdown (GitHub's), plots as tables where they have one."""
        from normtune.reporting.markdown import render

        return render(self)
