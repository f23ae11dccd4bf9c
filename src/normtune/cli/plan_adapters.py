"""`normtune plan --adapters N`: what a bank of N adapters takes. Not here: a training step (plan.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def plan_adapters(model: nn.Module, adapters: int, json: bool) -> None:
    """Prints the memory of so many adapters of the model's norms beside it."""
    from normtune.bank import planned
    from normtune.cli.output import print_json

    found = planned(model, adapters)
    if json:
        print_json(found.to_dict())
    else:
        print(found)
