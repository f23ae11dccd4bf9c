"""Plans of what a recipe asks for, or of strategies side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

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
    notes: tuple[str, ...] = ()

    def plan(self, batch: int | None = None) -> Plan:
        shape = self.shape if batch is None else replace(self.shape, batch=batch)
        found = plan_step(self.build(), self.stage, shape, self.dtype)
        found.notes[:0] = self.notes
        return found

    def largest_batch(self, memory: float) -> int:
        """The most samples of a micro-batch on a device of so many bytes; 0 where not even one fits."""
        return largest_batch(self.plan, int(USABLE * memory))


def job_of(
    build: Callable[[], nn.Module],
    stage: Stage,
    dtype: str,
    device: str = "auto",
    batch: int | None = None,
    supervised: int | None = None,
) -> Job:
    """A job for a stage as it runs on a device; `batch` and `supervised` replace those of `shape_of`."""
    shape = shape_of(stage, device, batch)
    kind = planned_device(device)
    where = {"cuda": "a GPU", "cpu": "a CPU"}.get(kind.type, kind.type)
    packed = batch is None and packs(stage, kind)
    rows = f"packed rows of {pack_length(kind):,} tokens" if packed else "padded rows"
    shape = replace(shape, supervised=supervised or shape.supervised)
    return Job(build, stage, shape, dtype, (f"planned for {where}, {rows}",))


def shape_of(stage: Stage, device: str = "auto", batch: int | None = None) -> Shape:
    """The largest micro-batch that a stage may run: every sample of `max_length` tokens, as many as a packed row takes.

    Args:
        device: of the recipe; `auto` is planned as a GPU.
        batch: samples of it, instead.
    """
    kind = planned_device(device)
    size = stage.micro_batch_size or MICRO_BATCH
    if packs(stage, kind):
        size = min(stage.micro_batch_size or stage.batch_size, max(1, pack_length(kind) // stage.max_length))
    size = batch or min(size, stage.batch_size)
    supervised = max(1, min(SUPERVISED, stage.max_length // 2))
    return Shape(size, stage.max_length, supervised, 2 if stage.batch_size > size else 1)


def planned_device(device: str) -> torch.device:
    return torch.device("cuda" if device == "auto" else device)


def packs(stage: Stage, device: torch.device) -> bool:
    return stage.packing is True or (stage.packing == "auto" and prefers_packing(device))


def plan_recipe(recipe: Recipe) -> list[Plan]:
    """A plan for each stage of a recipe, from the configs of its model alone.

    Raises:
        InputError: a model that cannot be found, or a strategy that it cannot take.
    """
    from normtune.skeletons import assembled_skeleton  # pydantic, which planning a model at hand does not need

    def build() -> nn.Module:
        return assembled_skeleton(recipe.model)

    return [job_of(build, stage, recipe.model.dtype, recipe.device).plan() for stage in recipe.stages]
