"""From matplotlib's SVG to a plot that belongs into a page.

Scope: the canvas, its settings, and what is done to the SVG: colours become CSS variables of `palette`, text stays text
in the page's font, ids that nothing refers to go, numbers are short. The same input gives the same bytes.
Not here: kinds of plots (`plots`).
"""

from __future__ import annotations

import functools
import html
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec

from normtune.reporting.palette import scheme

P = ParamSpec("P")
WIDTH = 360  # units of the SVG, about pixels on a phone; text of SIZE units is read there without zooming
SIZE = 11
_NAMES = list(scheme("light"))
# Stand-ins that no plot uses for anything else; replaced by the variables after drawing.
COLORS = {name: f"#fe{index:02x}d7" for index, name in enumerate(_NAMES)}
_VARIABLES = {color: f"var(--{name})" for name, color in COLORS.items()}
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "normtune",
    "text.parse_math": False,
    "font.size": SIZE,
    "font.family": "DejaVu Sans",
    "text.color": COLORS["ink"],
    "axes.labelcolor": COLORS["muted"],
    "axes.labelsize": SIZE,
    "axes.titlesize": SIZE,
    "axes.titlecolor": COLORS["muted"],
    "axes.titlepad": 5,
    "figure.titlesize": SIZE + 1,
    "figure.titleweight": "bold",
    "axes.edgecolor": COLORS["line"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": COLORS["line"],
    "grid.linewidth": 0.7,
    "xtick.color": COLORS["line"],
    "ytick.color": COLORS["line"],
    "xtick.labelcolor": COLORS["muted"],
    "ytick.labelcolor": COLORS["muted"],
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "patch.linewidth": 0,
    "figure.constrained_layout.h_pad": 0.03,
    "figure.constrained_layout.w_pad": 0.03,
}


def plot(draw: Callable[Concatenate[Any, P], float]) -> Callable[P, str]:
    """Makes of `draw(axes, ...)`, which draws and returns the height that it wants, a function that returns SVG.

    The keyword `title` is the plot's heading and the label that a screen reader speaks.
    """

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> str:
        with canvas() as (figure, axes):
            title = str(kwargs.get("title", ""))
            figure.suptitle(title, x=0.012, ha="left")
            height = draw(axes, *args, **kwargs)
            width = figure.get_size_inches()[0] * 72
            figure.set_size_inches(width / 72, height / 72)
            return clean(written(figure), title or draw.__name__)

    return drawn


@contextmanager
def canvas() -> Iterator[tuple[Any, Any]]:
    """A figure of WIDTH units and its axes, in the report's settings; pyplot and its global state are not touched."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's matplotlibrc has no say in a report
        matplotlib.rcParams.update(_SETTINGS)
        figure = Figure(figsize=(WIDTH / 72, WIDTH / 72), dpi=72, layout="constrained")
        FigureCanvasAgg(figure)  # measures text; savefig takes the SVG backend
        yield figure, figure.add_subplot()


def written(figure: Any) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def clean(svg: str, label: str) -> str:
    """The `<svg>` element alone, for use inside HTML."""
    box = re.search(r'viewBox="([^"]+)"', svg)
    assert box is not None
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", body, flags=re.S)
    body = re.sub(r"font-family: [^;\"]*(; )?", "", body.replace("xlink:href", "href"))
    body = re.sub(r"#[0-9a-f]{6}", lambda match: _VARIABLES.get(match[0], match[0]), body)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", body)
    body = re.sub(r"<[^>]+>", lambda tag: re.sub(r"-?\d+\.\d{2,}", _short, tag[0]), body)
    body = body.replace('style="fill: var(--h', 'shape-rendering="crispEdges" style="fill: var(--h')  # no hairlines
    body = re.sub(r"\s+", " ", body).replace("> <", "><").replace("<defs></defs>", "")
    width, height = box[1].split()[2:]
    return (
        f'<svg viewBox="0 0 {float(width):g} {float(height):g}" role="img" aria-label="{html.escape(label)}" '
        f'stroke-linejoin="round">{body.strip()}'
    )


def _short(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")
