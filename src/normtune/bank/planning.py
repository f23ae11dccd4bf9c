"""What N adapters of a model take in memory, from its shape alone. Not here: a training step (memory/)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from normtune.strategy import LLM_GAINS, tuning


@dataclass(frozen=True)
class Planned:
    """Memory of `adapters` adapters.

    Attributes:
        gains: values of the LLM's norms, each adapter.
        connector: values of a connector of its own; 0 where the model has none. Always kept in fp32.
    """

    adapters: int
    gains: int
    connector: int

    def bytes(self, width: int = 4, connectors: bool = False) -> int:
        """Of all adapters, gains in so many bytes; with a connector each."""
        return self.adapters * (self.gains * width + (4 * self.connector if connectors else 0))

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "adapters": self.adapters,
            "gains": self.gains,
            "bytes_float32": self.bytes(4),
            "bytes_bfloat16": self.bytes(2),
        }
        if self.connector:
            found["bytes_with_connectors"] = self.bytes(4, connectors=True)
        return found

    def __str__(self) -> str:
        many = "adapter" if self.adapters == 1 else "adapters"
        text = f"{self.adapters:,} {many} of {self.gains:,} gains: {size(self.bytes(4))} in float32, "
        text += f"{size(self.bytes(2))} in bfloat16"
        if self.connector:
            text += f"; with a connector each {size(self.bytes(4, connectors=True))}"
        return text


def size(count: int) -> str:
    """Bytes in the unit that leaves few digits: 25.0 kB, 1.06 GB."""
    units = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"), (1, "B"))
    unit, name = next(((unit, name) for unit, name in units if count >= unit), units[-1])
    return f"{count / unit:.3g} {name}"


def planned(model: nn.Module, adapters: int) -> Planned:
    """Memory of so many adapters of the model's norms; its weights may be on the meta device."""
    found = tuning(model).anatomy
    gains = {id(p): p.numel() for part in LLM_GAINS for p in found.parameters(model, part)}
    return Planned(adapters, sum(gains.values()), sum(p.numel() for p in found.parameters(model, "connector")))
