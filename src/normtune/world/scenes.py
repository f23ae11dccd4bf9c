"""Scenes of the embedded world: a graph of coloured shapes on a 3 x 3 grid, drawn into 64 x 64 pixels.

A scene is one to four things (colour, shape, size, cell) on a plain background. Some categories are frequent
and some occur together, so that negatives chosen at random, by popularity or by co-occurrence differ in
difficulty, as they do in photographs. Every scene belongs to exactly one split by the hash of its graph, so
that no scene can be in two splits whatever the seeds are.

Not here: words about scenes (`text`), files (`files`), training (`build`). Needs numpy and Pillow only.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw

T = TypeVar("T")

SIDE = 64  # pixels
CELL = SIDE / 3
COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 215, 40),
    "purple": (150, 50, 190),
    "cyan": (40, 200, 215),
}
SHAPES = ("circle", "square", "triangle", "cross", "star")
SIZES = ("small", "large")
BACKGROUNDS = {"black": (22, 22, 26), "gray": (125, 125, 128), "white": (236, 236, 232)}
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
SPLITS = ("text", "train", "eval", "dev")  # "text": everything the language model and the encoders learn from
_SHARES = (0.70, 0.84, 0.92, 1.0)  # cumulative shares of SPLITS

Category = tuple[str, str]  # (colour, shape)
CATEGORIES: tuple[Category, ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)


@dataclass(frozen=True, order=True)
class Thing:
    """One object. `row` and `column` are 0..2; the order of things is raster order."""

    row: int
    column: int
    colour: str
    shape: str
    size: str

    @property
    def category(self) -> Category:
        return self.colour, self.shape

    @property
    def place(self) -> str:
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"


@dataclass(frozen=True)
class Scene:
    """A scene graph: things in raster order, each of its own category and in its own cell."""

    things: tuple[Thing, ...]
    background: str

    @property
    def key(self) -> str:
        """Canonical text of the graph; equal graphs have equal keys."""
        return self.background + "".join(
            f"|{t.row}{t.column} {t.colour} {t.shape} {t.size}" for t in sorted(self.things)
        )

    @property
    def categories(self) -> set[Category]:
        return {thing.category for thing in self.things}


@dataclass(frozen=True)
class Box:
    """Where a thing was drawn: centre and half side in pixels, and how far it is turned in radians."""

    x: float
    y: float
    radius: float
    turn: float


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of `options`, uniformly."""
    return options[int(rng.random() * len(options))]


@functools.cache
def popularity() -> np.ndarray:
    """Probability of each of CATEGORIES, float64 [30]; fixed for the world."""
    weights = 1.0 / (np.random.default_rng(11).permutation(len(CATEGORIES)) + 4.0)
    return weights / weights.sum()


@functools.cache
def partners() -> dict[Category, tuple[Category, ...]]:
    """The three categories that like to appear beside each category; fixed for the world."""
    rng = np.random.default_rng(12)
    table = {}
    for index, category in enumerate(CATEGORIES):
        others = [other for other in range(len(CATEGORIES)) if other != index]
        table[category] = tuple(CATEGORIES[i] for i in rng.choice(others, 3, replace=False))
    return table


@functools.cache
def _cumulative() -> np.ndarray:
    return np.cumsum(popularity())


def split_of(scene: Scene) -> str:
    """The one split that this scene belongs to, from the hash of its key."""
    digest = hashlib.blake2b(scene.key.encode(), digest_size=4).digest()
    share = int.from_bytes(digest, "big") / 2**32
    return next(name for name, limit in zip(SPLITS, _SHARES, strict=True) if share < limit)


def _popular(rng: np.random.Generator) -> Category:
    index = int(np.searchsorted(_cumulative(), rng.random()))
    return CATEGORIES[min(index, len(CATEGORIES) - 1)]


def sample(rng: np.random.Generator, split: str, least: int = 1, most: int = 4) -> Scene:
    """A scene of `least` to `most` things that belongs to `split`; depends on the state of `rng` only."""
    while True:
        count = least + int(rng.random() * (most - least + 1))
        chosen: list[Category] = []
        while len(chosen) < count:
            beside = chosen and rng.random() < 0.5
            category = pick(rng, partners()[pick(rng, chosen)]) if beside else _popular(rng)
            if category not in chosen:
                chosen.append(category)
        cells = rng.permutation(9)[:count]
        things = sorted(
            Thing(int(cell) // 3, int(cell) % 3, colour, shape, pick(rng, SIZES))
            for cell, (colour, shape) in zip(cells, chosen, strict=True)
        )
        scene = Scene(tuple(things), pick(rng, tuple(BACKGROUNDS)))
        if split_of(scene) == split:
            return scene


def layout(scene: Scene, rng: np.random.Generator) -> list[Box]:
    """Where each thing is drawn: jittered inside its cell. One Box per thing, in the scene's order."""
    boxes = []
    for thing in scene.things:
        radius = (5.2 if thing.size == "small" else 9.0) + rng.uniform(-0.6, 0.6)
        room = max(0.0, CELL / 2 - radius)
        x = (thing.column + 0.5) * CELL + rng.uniform(-room, room) * 0.7
        y = (thing.row + 0.5) * CELL + rng.uniform(-room, room) * 0.7
        boxes.append(Box(x, y, radius, rng.uniform(-0.25, 0.25)))
    return boxes


_CORNERS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -1.0), (0.95, 0.8), (-0.95, 0.8)],
    "cross": [
        (-0.32, -1), (0.32, -1), (0.32, -0.32), (1, -0.32), (1, 0.32), (0.32, 0.32),
        (0.32, 1), (-0.32, 1), (-0.32, 0.32), (-1, 0.32), (-1, -0.32), (-0.32, -0.32),
    ],
    "star": [
        (r * math.sin(k * math.pi / 5), -r * math.cos(k * math.pi / 5))
        for k, r in enumerate([1.08, 0.45] * 5)
    ],
}  # fmt: skip


def render(scene: Scene, rng: np.random.Generator, boxes: list[Box] | None = None) -> Image.Image:
    """Draws the scene: RGB, 64 x 64, with colour jitter and pixel noise. About 0.5 ms."""
    boxes = boxes if boxes is not None else layout(scene, rng)
    scale = 2  # drawn at twice the size and reduced, which smooths the edges

    def tint(colour: tuple[int, int, int]) -> tuple[int, ...]:
        return tuple(int(min(255, max(0, c + rng.uniform(-14, 14)))) for c in colour)

    canvas = Image.new("RGB", (SIDE * scale, SIDE * scale), tint(BACKGROUNDS[scene.background]))
    draw = ImageDraw.Draw(canvas)
    for thing, box in zip(scene.things, boxes, strict=True):
        fill = tint(COLOURS[thing.colour])
        x, y, r = box.x * scale, box.y * scale, box.radius * scale
        if thing.shape == "circle":
            draw.ellipse((x - 0.95 * r, y - 0.95 * r, x + 0.95 * r, y + 0.95 * r), fill=fill)
            continue
        cos, sin = math.cos(box.turn), math.sin(box.turn)
        points = [(x + r * (a * cos - b * sin), y + r * (a * sin + b * cos)) for a, b in _CORNERS[thing.shape]]
        draw.polygon(points, fill=fill)
    pixels = np.asarray(canvas.reduce(scale), dtype=np.float32)
    noisy = pixels + rng.normal(0, 5, pixels.shape[:2])[..., None]
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def owners(boxes: Sequence[Box], grid: int = 4) -> list[int]:
    """Which thing fills each patch of a `grid` x `grid` image, raster order; -1 is background.

    A thing owns the patches of which it covers an eighth or more (the one that covers most wins), and always
    the patch of which it covers most.
    """
    side = SIDE / grid
    owner, share = [-1] * grid**2, [side * side / 8] * grid**2
    best = []
    for index, box in enumerate(boxes):
        most, where = -1.0, 0
        for patch in range(grid**2):
            left, top = patch % grid * side, patch // grid * side
            width = min(left + side, box.x + box.radius) - max(left, box.x - box.radius)
            height = min(top + side, box.y + box.radius) - max(top, box.y - box.radius)
            area = max(0.0, width) * max(0.0, height)
            if area >= share[patch]:
                owner[patch], share[patch] = index, area
            if area > most:
                most, where = area, patch
        best.append(where)
    for index, patch in enumerate(best):
        owner[patch] = index
    return owner
