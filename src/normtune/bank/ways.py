"""How a norm computes with gains by row [B, 1, H], bit for bit as with one gain [H]: tried on random values.

Most norms multiply by their parameter, and broadcasting changes no bit: their own forward runs on gains by row. A fused
kernel (torch's LayerNorm and RMSNorm) takes one gain only: it runs with a neutral gain, gain and bias follow; where
that differs in the last bit, rows run group by group. Not here: which gains (rows.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from normtune.bank.entries import bare_twin, shell

Own = dict[str, torch.Tensor]
ROWS, LENGTHS = 3, (1, 5)


@dataclass(frozen=True)
class Way:
    """How rows get their gains.

    Attributes:
        neutral: the gain that the module runs with, 1 (or 0 where it adds 1 itself); None: it takes gains by row.
        fused: whether gain and bias are one operation.
        groups: rows of one adapter after another, with the module's own forward.
    """

    neutral: float | None = None
    fused: bool = False
    groups: bool = False

    def twin(self, module: nn.Module, own: Own) -> nn.Module:
        """The module with gains by row, `own` being [B, 1, ..., *shape]; bound to no `groups`."""
        if self.neutral is None:
            return bare_twin(module, own)
        shapes = {name: p.shape for name, p in module.named_parameters(recurse=False)}
        first, *rest = own
        neutral = {first: own[first].new_full(shapes[first], self.neutral)}
        made = bare_twin(module, neutral | {name: own[name].new_zeros(shapes[name]) for name in rest})
        gain = own[first] if self.neutral else 1 + own[first]
        bias = own[rest[0]] if rest else None

        def forward(*args: object, **kwargs: object) -> torch.Tensor:
            y = type(module).forward(made, *args, **kwargs)
            if bias is None:
                return y * gain  # type: ignore[no-any-return]
            return torch.addcmul(bias, y, gain) if self.fused else y * gain + bias

        made.forward = forward
        return shell(made)


WAYS = (Way(), *(Way(neutral, fused) for neutral in (1.0, 0.0) for fused in (False, True)))
GROUPS = Way(groups=True)


def way_of(module: nn.Module) -> Way:
    """The first way whose outputs are those of one gain at a time, bit for bit, in fp32 on the module's device."""
    parameters = dict(module.named_parameters(recurse=False))
    device = next(iter(parameters.values())).device
    generator = torch.Generator().manual_seed(0)
    by_row = {n: torch.randn(ROWS, *p.shape, generator=generator).to(device) for n, p in parameters.items()}
    shape = next(iter(parameters.values())).shape
    with torch.no_grad():
        samples: list[tuple[torch.Tensor, ...]] = []
        for length in LENGTHS:
            x, gate = torch.randn(2, ROWS, length, *shape, generator=generator).to(device)
            samples += [given for given in ((x,), (x, gate)) if takes(module, by_row, given)]
        for way in WAYS:
            if samples and all(agrees(module, way, by_row, given) for given in samples):
                return way
    return GROUPS


def takes(module: nn.Module, by_row: Own, given: Sequence[torch.Tensor]) -> bool:
    """Whether the norm runs on that: some take a gate, or demand one."""
    try:
        bare_twin(module, {name: gains[0] for name, gains in by_row.items()})(*given)
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return False
    return True


def agrees(module: nn.Module, way: Way, by_row: Own, given: Sequence[torch.Tensor]) -> bool:
    """Whether the way gives the bits of one gain at a time; given [B, S, *shape]."""
    twins = [bare_twin(module, {name: gains[row] for name, gains in by_row.items()}) for row in range(ROWS)]
    wanted = torch.stack([twin(*given)[row] for row, twin in enumerate(twins)])
    try:
        found = way.twin(module, {name: gains[:, None] for name, gains in by_row.items()})(*given)
    except (RuntimeError, ValueError, TypeError):  # it takes no gains of that shape
        return False
    return torch.equal(found, wanted)
