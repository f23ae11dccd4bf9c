"""What `analyze` finds, as blocks of a report: similarity of layers, gradients, gains, what the image contributes.

Scope: from documents of `analyze_run`, one per label (a strategy, a run), to blocks; the same for one run and for all
strategies of a comparison, with one colour per label. What a document lacks is left out. Not here: how anything is
measured (the rest of the room), how plots look (`reporting`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from normtune.reporting import Block, Bullets, Cell, Figure, Heading, Note, Table, Text, plots
from normtune.reporting.numbers import score
from normtune.reporting.palette import assign
from normtune.reporting.plots import Mark, Series

Documents = Mapping[str, Mapping[str, Any]]
Colors = Mapping[str, str]
TOKENS = {"image": "image tokens", "text": "text tokens"}
ROLES = {
    "input": "input norms",
    "post_attention": "post-attention norms",
    "post_mlp": "post-MLP norms",
    "final": "final norm",
    "qk": "QK norms",
    "vision": "norms of the vision encoder",
}
MEASURES = {"cosine": "Mean cosine similarity", "cka": "Linear CKA"}
LOSSES = {"train": "training loss", "held_out": "held-out loss"}
GRADIENTS = {"variance": "gradient variance", "share": "share of noise"}
IMAGES = {"shuffled": "with another image", "blind": "without an image"}


def analysis_blocks(documents: Documents, colors: Colors | None = None) -> list[Block]:
    """All that there is to show of one or more runs; `colors` (label -> name of a colour) as in the rest of a page."""
    colors = colors or assign(documents)
    makers = (similarity_blocks, gradient_blocks, gain_blocks, image_blocks, note_blocks)
    return [block for make in makers for block in make(documents, colors)]


def similarity_blocks(documents: Documents, colors: Colors) -> list[Block]:
    """Means, effective rank and losses (controls for overfitting), then cosine and CKA of all pairs of layers, a matrix
    per label, image and text tokens apart."""
    blocks: list[Block] = []
    for tokens, title in TOKENS.items():
        found = {label: one["similarity"][tokens] for label, one in documents.items() if _similar(one, tokens)}
        for measure, name in MEASURES.items() if found else ():
            low = min(0.0, *(v for one in found.values() for row in one[measure] for v in row if v is not None))
            panels = [
                plots.heatmap(one[measure], title=label, low=low, high=1.0, x="layer") for label, one in found.items()
            ]
            blocks.append(Heading(f"{name}, {title}", 3))
            blocks.append(Figure(panels, scale=(f"{low:.2g}", "1", "of two layers"), size="small"))
    if not blocks:
        return []
    intro = "Of each pair of layers, on held-out samples; layer 0 is the input of the first block."
    return [
        Heading("Similarity of layers"),
        Text(intro),
        *_similarity_table(documents),
        *_loss_figure(documents, colors),
        *_rank_figure(documents, colors),
        *blocks,
    ]


def _similar(document: Mapping[str, Any], tokens: str) -> bool:
    return bool((document.get("similarity") or {}).get(tokens))


def _similarity_table(documents: Documents) -> list[Block]:
    header = ["", *(f"{name}, {tokens}" for tokens in TOKENS for name in ("cosine", "CKA"))]
    header += ["train loss", "held-out loss", "gap", "its change"]
    rows = []
    for label, one in documents.items():
        similar = [(one.get("similarity") or {}).get(tokens) or {} for tokens in TOKENS]
        losses = one.get("losses") or {}
        rows.append(
            [
                label,
                *(score(part.get(f"mean_{name}")) for part in similar for name in ("cosine", "cka")),
                *(score(losses.get(name)) for name in ("train", "held_out", "gap")),
                _signed(gap_change(losses)),
            ]
        )
    caption = (
        "Means over all pairs of different layers. Gap: held-out minus training loss at the end. It says little where "
        "held-out samples are of another kind than the training data; its change from the start of the stage to its "
        "end is what tells overfitting, compared between rows."
    )
    return [Table(header, rows, caption)]


def gap_change(losses: Mapping[str, Any]) -> float | None:
    """How far the gap between held-out and training loss opened from the start of the stage to its end."""
    points = losses.get("checkpoints") or []
    if len(points) < 2 or any(point.get(name) is None for point in (points[0], points[-1]) for name in LOSSES):
        return None
    first, last = (float(point["held_out"] - point["train"]) for point in (points[0], points[-1]))
    return last - first


def _signed(value: float | None) -> str:
    return score(None) if value is None else f"{value:+.3f}"


def _loss_figure(documents: Documents, colors: Colors) -> list[Block]:
    """Training and held-out loss over the steps of the stage."""
    panels = []
    for key, title in LOSSES.items():
        series = []
        for label, one in documents.items():
            points = (one.get("losses") or {}).get("checkpoints") or []
            points = [point for point in points if point.get(key) is not None]
            if points:
                places, values = [point["step"] for point in points], [point[key] for point in points]
                series.append(Series(label, places, values, colors[label]))
        if series:
            panels.append(plots.lines(series, title=title, x="step"))
    caption = "Loss on training samples and on held-out samples, at the checkpoints of the stage."
    return [Figure(panels, caption, legend=_legend(documents, colors, panels))] if panels else []


def _rank_figure(documents: Documents, colors: Colors) -> list[Block]:
    panels = []
    for tokens, title in TOKENS.items():
        series = [
            Series(label, range(len(ranks)), ranks, colors[label])
            for label, one in documents.items()
            if _similar(one, tokens) and (ranks := one["similarity"][tokens].get("effective_rank"))
        ]
        if series:
            panels.append(plots.lines(series, title=f"Effective rank, {title}", x="layer"))
    caption = "Effective rank of each layer's representations: low similarity alone is not expressive power."
    return [Figure(panels, caption, legend=_legend(documents, colors, panels))] if panels else []


def gradient_blocks(documents: Documents, colors: Colors) -> list[Block]:
    """Variance of the gradients and their share of noise: over steps, a panel per part; over depth, norm by norm."""
    measured = [one["gradients"] for one in documents.values() if _checkpoints(one)]
    if not measured:
        return []
    blocks: list[Block] = [Heading("Variance of gradients"), *_measured_on(measured)]
    for key, meaning in GRADIENTS.items():
        panels = [
            plots.lines(series, title=part, x="step", y=meaning, log_y=_positive(series))
            for part, series in _over_steps(documents, colors, key).items()
        ]

        def last(document: Mapping[str, Any], gain: Mapping[str, Any], key: str = key) -> float | None:
            norms = (_checkpoints(document) or [{}])[-1].get("norms") or {}
            return (norms.get(gain["name"]) or {}).get(key)

        depth = _over_depth(documents, colors, last, meaning)
        caption = f"{meaning.capitalize()} per part of the model over training."
        blocks += [Figure(panels, caption, legend=_legend(documents, colors, panels))] if panels else []
        caption = f"{meaning.capitalize()} of each norm over depth, at the last checkpoint."
        blocks += [Figure(depth, caption, legend=_legend(documents, colors, depth))] if depth else []
    return blocks


def _measured_on(measured: Sequence[Mapping[str, Any]]) -> list[Block]:
    """On which batches and when gradients were measured, and that they do not compare where the batches differ."""
    sizes = {(one.get("batches", "?"), one.get("batch_size", "?")) for one in measured}
    text = "From {} fixed batches of {} samples".format(*sizes.pop()) if len(sizes) == 1 else "From fixed batches"
    if len(measured) > 1:
        alike = len({tuple(point["step"] for point in one["checkpoints"]) for one in measured}) == 1
        text += ", at the same steps for every label" if alike else ", at steps that differ between labels"
    blocks: list[Block] = [Text(f"{text}. {measured[0].get('formula', '')}".strip())]
    if len({one["stream"] for one in measured if one.get("stream")}) > 1:
        note = "Gradients were measured on different batches (other data, batch size or length): they do not compare."
        blocks.append(Note(note))
    return blocks


def _over_steps(documents: Documents, colors: Colors, key: str) -> dict[str, list[Series]]:
    """Lines of a figure of the gradients, by part; a part that no run trains says so."""
    found: dict[str, list[Series]] = {}
    trained: set[str] = set()
    for label, one in documents.items():
        points = [(point["step"], point["parts"]) for point in _checkpoints(one)]
        trained |= set((one.get("gradients") or {}).get("trained") or ())
        for part in dict.fromkeys(part for _, parts in points for part in parts):
            here = [(step, parts[part].get(key)) for step, parts in points if part in parts]
            here = [(step, value) for step, value in here if value is not None]
            if here:
                steps, values = [step for step, _ in here], [value for _, value in here]
                found.setdefault(part, []).append(Series(label, steps, values, colors[label]))
    return {part if part in trained or not trained else f"{part} (not trained)": all_ for part, all_ in found.items()}


def _checkpoints(document: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return (document.get("gradients") or {}).get("checkpoints") or []


def gain_blocks(documents: Documents, colors: Colors) -> list[Block]:
    """How far each norm's gains moved, over depth: magnitude and angle, a panel per role; frozen norms are left out."""
    blocks: list[Block] = []
    for key, title, meaning in (
        ("change", "change of gains", "|Δg| / |g|, by the norm's place in the LLM"),
        ("angle", "angle in degrees", "Angle between the gains before and after"),
    ):

        def value(document: Mapping[str, Any], gain: Mapping[str, Any], key: str = key) -> float | None:
            return gain[key] if gain.get("trained", True) else None

        panels = _over_depth(documents, colors, value, title)
        if panels:
            blocks.append(Figure(panels, f"{meaning}.", legend=_legend(documents, colors, panels)))
    return [Heading("Gain maps"), *blocks] if blocks else []


def _over_depth(
    documents: Documents,
    colors: Colors,
    value: Callable[[Mapping[str, Any], Mapping[str, Any]], float | None],
    y: str,
) -> list[str]:
    """A panel per role with a line per label over the blocks; a role with one norm (final) is a row per label."""
    panels = []
    for role, title in ROLES.items():
        series, single = [], []
        for label, one in documents.items():
            gains = [gain for gain in one.get("gains") or () if gain["role"] == role]
            found = [(gain, shown) for gain in gains if (shown := value(one, gain)) is not None]
            values = [shown for _, shown in found]
            if len(found) == 1:
                single.append(Mark(label, values[0], colors[label]))
            elif found:
                places = [i if gain.get("block") is None else gain["block"] for i, (gain, _) in enumerate(found)]
                series.append(Series(label, places, values, colors[label]))
        if series:
            panels.append(plots.lines(series, title=title, x="block", y=y, log_y=_positive(series)))
        if single:
            panels.append(plots.bars(single, title=f"{title}, {y}"))
    return panels


def image_blocks(documents: Documents, colors: Colors) -> list[Block]:
    """What the image contributes: scores with its image, with another's, without."""
    found = {label: one["image"] for label, one in documents.items() if one.get("image")}
    if not found:
        return []
    names = list(dict.fromkeys(bench for one in found.values() for scores in one.values() for bench in scores))
    rows: list[list[str | Cell]] = []
    for label, one in found.items():
        cells: list[str | Cell] = []
        for name in names:
            others = [score(one[key].get(name)) for key in IMAGES if key in one]
            cells.append(Cell(score((one.get("none") or {}).get(name)), " / ".join(others)))
        rows.append([label, *cells])
    caption = f"Scores with the right image; small: {' / '.join(IMAGES.values())}."
    return [Heading("What the image contributes"), Table(["", *names], rows, caption)]


def note_blocks(documents: Documents, colors: Colors) -> list[Block]:
    """What else there is to know of a run, sentence by sentence."""
    notes = {label: one["notes"] for label, one in documents.items() if one.get("notes")}
    alike = len({tuple(found) for found in notes.values()}) == 1 and len(notes) == len(documents)
    told = (
        next(iter(notes.values())) if alike else [f"{label}: {note}" for label, all_ in notes.items() for note in all_]
    )
    return [Heading("Notes on the analysis", 3), Bullets(told)] if told else []


def _legend(documents: Documents, colors: Colors, panels: Sequence[str]) -> list[tuple[str, str]]:
    """The labels that are drawn in the panels, where there is more than one run."""
    drawn = "".join(panels)
    shown = [(label, colors[label]) for label in documents if f"var(--{colors[label]})" in drawn]
    return shown if len(documents) > 1 else []


def _positive(series: Sequence[Series]) -> bool:
    """Whether a logarithmic axis is due: all values positive, and far apart."""
    values = [value for one in series for value in one.y]
    return bool(values) and min(values) > 0 and max(values) / min(values) > 20
