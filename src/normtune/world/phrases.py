"""Sentences about scenes: names of things, captions, full descriptions, the scene as a reader is told it.

Not here: questions and answers (`text`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from normtune.world.scenes import Scene, Thing, pick


def name(thing: Thing) -> str:
    """The category in words: "red circle"."""
    return f"{thing.colour} {thing.shape}"


def plural(shape: str) -> str:
    return "crosses" if shape == "cross" else shape + "s"


def _series(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def caption(scene: Scene) -> str:
    """The canonical one-sentence caption: every thing in raster order, and the background."""
    things = _series([f"a {thing.size} {name(thing)}" for thing in scene.things])
    return f"{things} on a {scene.background} background."


def references(rng: np.random.Generator, scene: Scene) -> list[str]:
    """Five human-like captions of one scene: they differ in order, completeness and form."""
    things = list(scene.things)
    turned = [things[i] for i in rng.permutation(len(things))]
    return [
        caption(scene),
        f"{_series([f'a {name(t)}' for t in things])} on a {scene.background} background.",
        f"there is {_series([f'a {t.size} {name(t)}' for t in things])} on a {scene.background} background.",
        f"{_series([f'a {t.size} {name(t)}' for t in turned])} can be seen on a {scene.background} background.",
        f"{_series([f'a {t.size} {name(t)} at the {t.place}' for t in things])}.",
    ]


def detail(scene: Scene) -> str:
    """A full description: how many, then each thing with its place."""
    number = len(scene.things)
    head = f"the image shows {number} object{'s' if number > 1 else ''} on a {scene.background} background."
    return " ".join([head, *(f"a {t.size} {name(t)} is at the {t.place}." for t in scene.things)])


def description(rng: np.random.Generator, scene: Scene, place: bool = True, size: bool = True) -> str:
    """The scene in words as a reader would be told it, in one of several forms and a random order.

    Without `place` or `size` these attributes are left out throughout.
    """
    form = int(rng.random() * 4)
    parts = []
    for index in rng.permutation(len(scene.things)):
        thing = scene.things[index]
        what = f"{thing.size} {name(thing)}" if size else name(thing)
        if not place:
            parts.append(f"a {what}")
        elif form == 0:
            parts.append(f"a {what} at the {thing.place}")
        elif form == 1:
            parts.append(f"{thing.place}: {what}")
        elif form == 2:
            parts.append(f"a {what} is at the {thing.place}")
        else:
            parts.append(f"at the {thing.place} is a {what}")
    where = f"{scene.background} background"
    spot = int(rng.random() * 2) * len(parts)
    parts.insert(spot, where)
    return pick(rng, (", ", "; ", ". ")).join(parts) + "."
