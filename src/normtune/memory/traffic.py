"""What a process sends and receives in an optimizer step, by strategy, from shapes alone.

Whole copies: the gradients of what trains are summed once per step. Sharded (normtune.sharding): so are they, and each
block's frozen matrices are gathered in every micro-batch, once for its forward and once for its backward. Not here:
the exchanges of a few numbers (counts, the loss), how much of it hides behind computing, the network's speed.

A ring moves S bytes through each of n processes so: all-gather and reduce-scatter (n - 1) / n x S, all-reduce twice
that (P. Patarasuk and X. Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from normtune.sharding import frozen_matrices
from normtune.strategy import apply

GATHERINGS = 2
"""Of a block in a micro-batch: before its forward, and again before its backward."""


@dataclass(frozen=True)
class Traffic:
    """Of an optimizer step.

    Attributes:
        gradients: bytes of the trainable tensors' gradients, fp32, summed once.
        gathered: bytes of the sharded matrices, as they are stored, gathered `GATHERINGS` x `micro_batches` times.
    """

    gradients: int
    gathered: int = 0
    micro_batches: int = 1

    @property
    def all_gather(self) -> int:
        return GATHERINGS * self.micro_batches * self.gathered

    def sent(self, processes: int) -> float:
        """Bytes that each of so many processes sends, and as many that it receives, in rings."""
        return (2 * self.gradients + self.all_gather) * (processes - 1) / processes


def plan_traffic(
    model: nn.Module, strategy: str | list[str], *, shard: bool = False, micro_batches: int = 1, size: int = 2
) -> Traffic:
    """What a step of `strategy` exchanges.

    Args:
        model: on the meta device or not; it is left with the strategy applied.
        size: bytes of a frozen weight; 2: bf16.

    Raises:
        InputError: a strategy that the model cannot take.
    """
    report = apply(model, strategy)
    if not shard:
        return Traffic(report.bytes, micro_batches=micro_batches)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = sum(p.numel() for _, matrices in frozen_matrices(model, trained) for p in matrices)
    return Traffic(report.bytes, size * weights, micro_batches)
