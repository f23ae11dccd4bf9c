"""How many parameters each strategy trains, from shapes alone; the denominator is stated, since papers differ in it.

Source: PAPER (Zhao et al., arXiv 2312.11420), whose shares come out with LLM + vision encoder + connector; for
LoRA also its own matrices, as PEFT counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from normtune.strategy import STRATEGIES, apply, count, tuning


@dataclass(frozen=True)
class Share:
    """What a strategy trains of a model: numbers of parameters, and fp32 bytes of the trained ones."""

    strategy: str
    trainable: int
    total: int
    bytes: int
    skipped: list[str]

    @property
    def percent(self) -> float:
        return 100 * self.trainable / self.total


def shares(model: nn.Module, strategies: Sequence[str | list[str]], rank: int = 64) -> list[Share]:
    """A share per strategy. `model` may be on the meta device; it is left with the last strategy applied.

    Args:
        rank: of LoRA, on every linear layer of the blocks.

    Raises:
        InputError: a strategy that the model cannot take.
    """
    found = []
    for strategy in strategies:
        report = apply(model, strategy, rank=rank)
        label = f"{report.strategy} (r = {rank})" if "lora" in report.parts else report.strategy
        found.append(Share(label, report.parameters, report.total, report.bytes, report.skipped))
    return found


def denominator(model: nn.Module) -> dict[str, int]:
    """Parameters of the LLM (with its head), of the vision encoder and of the connector; constant layers left out.

    Tied tensors count once; `other` is what belongs to none of them.
    """
    state = tuning(model)
    found = state.anatomy
    left = {id(p): count(p) for p in model.parameters()}
    for name in found.constant:
        for parameter in model.get_submodule(name).parameters():
            left.pop(id(parameter))
    counted = {}
    roots = {"LLM": found.modules("llm"), "vision encoder": found.vision, "connector": found.connector}
    for label, names in roots.items():
        parameters = [p for name in names for p in model.get_submodule(name).parameters()]
        if label == "LLM" and not found.vision and not found.connector:
            parameters = list(model.parameters())
        counted[label] = sum(left.pop(id(p), 0) for p in parameters)
    counted["other"] = sum(left.values())
    return {label: number for label, number in counted.items() if number}


__all__ = ["STRATEGIES", "Share", "denominator", "shares"]
