"""Plans of what a recipe asks for, or of strategies side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from normtune.errors import InputError
from normtune.memory.planning import Plan, Shape, largest_batch, plan_step
from normtune.step import MICRO_BATCH
from normtune.strategy import pack_length, prefers_packing

if TYPE_CHECKING:
    from normtune.recipe import Recipe, Stage

SUPERVISED = 100
USABLE = 0.95
"""Share of a GPU's memory that a plan may fill; the rest is for the CUDA context and what the allocator wastes."""


@dataclass(frozen=True)
class Job:
    """A step to plan: `build` makes the untuned model on the meta device, anew each time."""

    build: Callable[[], nn.Module]
    stage: Stage
    shape: Shape
    dtype: str

    def plan(self, batch: int | None = None) -> Plan:
        shape = self.shape if batch is None else Shape(batch, self.shape.length, self.shape.supervised)
        return plan_step(self.build(), self.stage, shape, self.dtype)

    def largest_batch(self, memory: float) -> int:
        """The most samples of a micro-batch on a device of so many bytes; 0 where not even one fits."""
        return largest_batch(self.plan, int(USABLE * memory))


def shape_of(stage: Stage, device: str = "auto") -> Shape:
    """The largest micro-batch that a stage may run: every sample of `max_length` tokens, as many as a packed row takes.

    Args:
        device: of the recipe; `auto` is planned as a GPU.
    """
    kind = torch.device("cuda" if device == "auto" else device)
    size = stage.micro_batch_size or MICRO_BATCH
    if stage.packing is True or (stage.packing == "auto" and prefers_packing(kind)):
        size = min(stage.micro_batch_size or stage.batch_size, max(1, pack_length(kind) // stage.max_length))
    size = min(size, stage.batch_size)
    supervised = min(SUPERVISED, stage.max_length // 2)
    return Shape(size, stage.max_length, supervised, 2 if stage.batch_size > size else 1)


def plan_recipe(recipe: Recipe) -> list[Plan]:
    """A plan for each stage of a recipe, from the configs of its model alone.

    Raises:
        InputError: a model that cannot be found, or a strategy that it cannot take.
    """
    from normtune.skeletons import assembled_skeleton  # pydantic, which planning a model at hand does not need

    def build() -> nn.Module:
        return assembled_skeleton(recipe.model)

    return [Job(build, stage, shape_of(stage, recipe.device), recipe.model.dtype).plan() for stage in recipe.stages]


def parse_memory(text: str) -> float:
    """`24GB` -> 24e9 bytes, `24GiB` -> 24 * 2^30; a number alone is in GB.

    Raises:
        InputError: for anything else.
    """
    units = {"gib": 2.0**30, "gb": 1e9, "mib": 2.0**20, "mb": 1e6, "": 1e9}
    lower = text.strip().lower()
    unit = next(unit for unit in units if lower.endswith(unit))
    try:
        found = float(lower.removesuffix(unit)) * units[unit]
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise InputError(f"memory {text!r} is not known; give for example 24GB or 80GiB")
    return found
