"""Colours by name, for a light and a dark page; a plot knows the names alone.

Scope: the names, their values in both schemes, which series gets which. The eight series colours and the grey were
searched so that any two stay apart as simulated for protanopia, deuteranopia and tritanopia (Machado et al., 2009; at
least .09 in OKLab), and each has a contrast of at least 3 : 1 to the paper (WCAG 2.1, 1.4.11); text colours have at
least 4.5 : 1 (1.4.3). A test measures all of it. Series also differ by the shape of their marks, so that colour is
never the only sign.
"""

from __future__ import annotations

from collections.abc import Iterable

LIGHT = {
    "paper": "#fdfdfb",
    "raised": "#f3f3ef",
    "ink": "#1c1c1e",
    "muted": "#5d5f66",
    "line": "#d9d9d3",
    "accent": "#1f66ad",
    "good": "#0b6e4f",
    "bad": "#a8321a",
    "s0": "#094893",
    "s1": "#d12303",
    "s2": "#247756",
    "s3": "#5b2653",
    "s4": "#c68417",
    "s5": "#4b8ff7",
    "s6": "#7c44d5",
    "s7": "#8b1b00",
    "quiet": "#85878f",
}
DARK = {
    "paper": "#17181a",
    "raised": "#222427",
    "ink": "#e9e9e6",
    "muted": "#a5a8b0",
    "line": "#3a3c40",
    "accent": "#7fb6ea",
    "good": "#55c79b",
    "bad": "#f08a70",
    "s0": "#316ff4",
    "s1": "#d93313",
    "s2": "#98fdd4",
    "s3": "#b83cb7",
    "s4": "#fec44b",
    "s5": "#4fa5fa",
    "s6": "#dfbdfe",
    "s7": "#f68140",
    "quiet": "#8a8d96",
}
SERIES = 8
MARKERS = {
    "s0": ("o", "●"),
    "s1": ("s", "■"),
    "s2": ("^", "▲"),
    "s3": ("D", "◆"),
    "s4": ("v", "▼"),
    "s5": ("P", "✚"),
    "s6": ("X", "✖"),
    "s7": ("*", "★"),
    "quiet": ("o", "○"),
}
"""A series' mark by its colour: matplotlib's name, and the character that a legend shows."""
LEVELS = 12
"""Steps of a heatmap's colours, `h0` (nothing) to `h11` (most)."""
_RAMPS = {  # ends and middle of a heatmap's colours; the darkest of one hue stands out most from its own paper
    "light": ("#f1f3f4", "#5b9bc9", "#0b2f5c"),
    "dark": ("#24282d", "#2f7fb5", "#d3ecff"),
}


def ramp(scheme: str) -> list[str]:
    """LEVELS colours from nothing to most, linear between the three anchors of a scheme ("light" or "dark")."""
    anchors = [[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in _RAMPS[scheme]]
    colors = []
    for level in range(LEVELS):
        place = 2 * level / (LEVELS - 1)
        low, high = anchors[int(place > 1)], anchors[1 + int(place > 1)]
        part = place - 1 if place > 1 else place
        colors.append("#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(low, high, strict=True)))
    return colors


def scheme(name: str) -> dict[str, str]:
    """Every colour of a scheme ("light" or "dark") by name."""
    levels = {f"h{i}": color for i, color in enumerate(ramp(name))}
    return {**(LIGHT if name == "light" else DARK), **levels}


def assign(labels: Iterable[str], quiet: Iterable[str] = ()) -> dict[str, str]:
    """A colour's name for each label in order, the same wherever the label is drawn; those of `quiet` (controls) are
    grey. From the ninth on colours come again: the marks and the labels tell them apart."""
    grey, found, count = set(quiet), {}, 0
    for label in labels:
        if label in found:
            continue
        found[label] = "quiet" if label in grey else f"s{count % SERIES}"
        count += label not in grey
    return found
