"""Which questions are asked, and which image each of them is shown.

Scope: a fair part of a benchmark (`select`) and the baselines `blind` and `shuffled`. Everything is drawn from a
seed with Python's own generator, so training's random state is not touched. Not here: opening images.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Literal

from normtune.errors import InputError
from normtune.tasks import Item

Baseline = Literal["none", "blind", "shuffled"]
BASELINES: tuple[Baseline, ...] = ("none", "blind", "shuffled")


def select(items: Sequence[Item], limit: int | None, seed: int = 0) -> list[Item]:
    """At least `limit` of `items`, in their order; all of them without a limit.

    An image's questions within one group (POPE's split, MME's subtask) are taken together or not at all, so that
    POPE stays balanced and MME keeps its pairs; the last image may carry the count over `limit`. Groups take
    turns, and all of them go through the images in one order drawn with `seed`: POPE's splits share images."""
    if limit is None or limit >= len(items):
        return list(items)
    groups: dict[str, dict[str, list[int]]] = {}
    for place, item in enumerate(items):
        image = item.id if item.image is None else str(item.image)
        groups.setdefault(item.group, {}).setdefault(image, []).append(place)
    images = sorted({image for units in groups.values() for image in units})
    random.Random(seed).shuffle(images)
    queues = [[units[image] for image in images if image in units] for units in groups.values()]
    taken: list[int] = []
    for turn in range(max(map(len, queues))):
        for queue in queues:
            if turn < len(queue) and len(taken) < limit:
                taken += queue[turn]
    return [items[place] for place in sorted(taken)]


def images_shown(name: str, items: Sequence[Item], baseline: Baseline, seed: int = 0) -> list[Path | None]:
    """The image that each item of benchmark `name` is shown under `baseline`, None for no image.

    InputError, before anything is asked, when a file that is needed is missing."""
    if baseline == "blind":
        return [None] * len(items)
    needed: dict[Path, Item] = {}
    for item in items:
        if item.image is not None:
            needed.setdefault(item.image, item)
    missing = [path for path in needed if not path.is_file()]
    if missing:
        raise InputError(
            f"{name}, item '{needed[missing[0]].id}': no image {missing[0]} "
            f"({len(missing)} of {len(needed)} images are missing).\nPut the benchmark's images there."
        )
    if baseline == "none" or not needed:
        return [item.image for item in items]
    other = shuffled_images(list(needed), seed)
    return [None if item.image is None else other[item.image] for item in items]


def shuffled_images(images: Sequence[Path], seed: int = 0) -> dict[Path, Path]:
    """For each of `images` another one: a random cycle through all distinct pictures, so none keeps its own.

    Files with equal bytes are one picture (MME has the same photograph in several subtasks). InputError when
    there are not two distinct pictures."""
    by_size: dict[int, list[Path]] = {}
    for path in dict.fromkeys(images):
        by_size.setdefault(path.stat().st_size, []).append(path)
    pictures: dict[Hashable, list[Path]] = {}
    for size, paths in by_size.items():
        for path in paths:
            content = b"" if len(paths) == 1 else hashlib.sha256(path.read_bytes()).digest()
            pictures.setdefault((size, content), []).append(path)
    if len(pictures) < 2:
        raise InputError(
            f"{images[0].parent}: fewer than two distinct images, so none can be exchanged.\n"
            "Raise the limit, or leave the baseline 'shuffled' out."
        )
    cycle = sorted(pictures.values())
    random.Random(seed).shuffle(cycle)
    following = cycle[1:] + cycle[:1]
    return {path: new[0] for old, new in zip(cycle, following, strict=True) for path in old}
