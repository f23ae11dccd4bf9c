"""How many parameters each strategy trains, from shapes alone; the denominator is stated, since papers differ in it.

Source: PAPER (Zhao et al., arXiv 2312.11420), whose shares come out with LLM + vision encoder + connector; for
LoRA also its own matrices, as PEFT counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from normtune.errors import InputError
from normtune.strategy import apply, count, tuning


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


def shares(
    model: nn.Module,
    strategies: Sequence[str | list[str]],
    rank: int = 64,
    skip: bool = False,
    targets: Sequence[str] | None = None,
) -> tuple[list[Share], dict[str, str]]:
    """A share per strategy, and why the model cannot take the others (with `skip`).

    `model` may be on the meta device; it is left with the last strategy applied.

    Args:
        rank, targets: of LoRA, as `apply` takes them.
        skip: leave out what the model cannot take, instead of raising.

    Raises:
        InputError: a strategy that the model cannot take.
    """
    found: list[Share] = []
    refused: dict[str, str] = {}
    for strategy in strategies:
        try:
            report = apply(model, strategy, rank=rank, targets=targets)
        except InputError as error:
            if not skip:
                raise
            refused["+".join(strategy) if isinstance(strategy, list) else strategy] = str(error)
            continue
        label = f"{report.strategy} (r = {rank})" if "lora" in report.parts else report.strategy
        found.append(Share(label, report.parameters, report.total, report.bytes, report.skipped))
    return found, refused


def denominator(model: nn.Module) -> dict[str, int]:
    """Parameters of the LLM (with its head), of the vision encoder and of the connector; constant layers left out.

    Tied tensors count once; `other` is what belongs to none of them.
    """
    state = tuning(model)
    found = state.anatomy
    constants = found.constants(model)
    left = {id(p): count(p) for p in model.parameters() if id(p) not in constants}
    text = not found.vision and not found.connector
    # the encoder first: in some models it is inside the LLM's module
    members = {
        "vision encoder": found.parameters(model, "vision"),
        "LLM": list(model.parameters()) if text else found.parameters(model, "llm"),
        "connector": found.parameters(model, "connector"),
    }
    counted = {label: sum(left.pop(id(p), 0) for p in parameters) for label, parameters in members.items()}
    counted["other"] = sum(left.values())
    return {label: counted[label] for label in ("LLM", "vision encoder", "connector", "other") if counted[label]}
