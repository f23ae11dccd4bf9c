"""The micro-batches of each optimizer step: which samples, in which layout. Not here: tensors (data/)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from normtune.data import IGNORED, Collator, Mixture, Row, micro_batches
from normtune.errors import InputError
from normtune.recipe import Stage
from normtune.step import MICRO_BATCH
from normtune.strategy import can_pack, pack_length, prefers_packing


@dataclass
class Batches:
    """`batches(step)`: what process `process` of `processes` computes in an optimizer step.

    A step's samples are a function of (seed, step) alone; how they are grouped changes no result, only speed.
    """

    mixture: Mixture
    collator: Collator
    stage: Stage
    seed: int
    pack: int | None  # tokens of a packed row; None: padded rows
    process: int = 0
    processes: int = 1

    def __call__(self, step: int) -> list[dict[str, torch.Tensor]]:
        groups = self.groups(step)
        if groups:
            return [self.layout(group) for group in groups]
        # fewer samples than processes: this one only takes part in the exchange of gradients
        idle = self.layout(self.collator.encode([self.mixture[self.samples(step)[0]]]))
        return [{**idle, "labels": torch.full_like(idle["labels"], IGNORED)}]

    def samples(self, step: int) -> list[int]:
        """The samples of a step, over all processes."""
        per_epoch, _ = steps_of(self.stage, self.mixture)
        at = step % per_epoch * self.stage.batch_size
        return self.mixture.order(self.seed, step // per_epoch)[at : at + self.stage.batch_size]

    def groups(self, step: int) -> list[list[Row]]:
        """The rows of each micro-batch of this process; none where it is idle."""
        rows = self.collator.encode([self.mixture[i] for i in self.samples(step)[self.process :: self.processes]])
        packed = self.pack is not None
        size = self.stage.micro_batch_size or (len(rows) if packed else MICRO_BATCH)
        return micro_batches(rows, size, packed, self.pack or 0) if rows else []

    def layout(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        return self.collator.padded(rows) if self.pack is None else self.collator.packed(rows)


def steps_of(stage: Stage, mixture: Mixture) -> tuple[int, int]:
    """Optimizer steps of an epoch, and of the stage."""
    per_epoch = math.ceil(mixture.per_epoch / stage.batch_size)
    return per_epoch, stage.max_steps or stage.epochs * per_epoch


def choose_packing(model: nn.Module, stage: Stage, device: torch.device) -> tuple[int | None, str]:
    """Tokens of a packed row, or None for padded rows; and why not, where that is worth a line.

    Raises:
        InputError: the stage asks for packing and samples of one row would see one another in this model.
    """
    if stage.packing is False or (stage.packing == "auto" and not prefers_packing(device)):
        return None, ""
    reason = can_pack(model)
    if reason is None:
        return pack_length(device), ""
    if stage.packing is True:
        raise InputError(f"stage {stage.name}: packing is not possible in this model: {reason}; set packing: auto")
    return None, f"not packed: {reason}"
