"""Variance and noise scale of gradients over batches, by part and by norm.

Scope: mean-loss gradients of the trainable tensors, batch by batch, into a running mean and a sum of squares. Nothing
is updated. Not here: which batches, which checkpoints (stages.py).

Source: the simple noise scale of McCandlish et al., arXiv 1812.06162 (their B_simple over the batch size); the running
mean and sum of squares: Welford, 1962.

For gradients g_1 .. g_m of m batches and their mean G, over the values of a part or norm:
    variance = sum_b |g_b - G|^2 / (m - 1), divided by the number of values;
    noise = V / (|G|^2 - V / m) with V = sum_b |g_b - G|^2 / (m - 1), not divided; |G|^2 - V / m is an unbiased
    estimate of the squared norm of the true gradient;
    share = sum_b |g_b - G|^2 / sum_b |g_b|^2, from 0 (all batches agree) to about 1 - 1/m (pure noise).
Noise and share do not depend on how a part is scaled or how many values it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from normtune.analysis.similarity import significant
from normtune.analysis.states import quiet_model
from normtune.errors import JobError
from normtune.layers import unwrapped
from normtune.step import on_device, size_of, supervised_loss
from normtune.strategy import tuning

FORMULA = (
    "variance = sum_b |g_b - G|^2 / (m - 1) / values; noise = V / (|G|^2 - V / m), V = variance x values; "
    "share = sum_b |g_b - G|^2 / sum_b |g_b|^2; norm = |G|; g_b are the mean-loss gradients of m batches, G their mean"
)
Batch = dict[str, torch.Tensor]


class Spread:
    """Running mean of a tensor over batches, and the sum of squared deviations from it."""

    def __init__(self, like: torch.Tensor) -> None:
        self.count, self.squares = 0, 0.0
        self.mean = torch.zeros_like(like, dtype=torch.float32)

    def add(self, gradient: torch.Tensor | None) -> None:
        """One batch's gradient, fp32, which is overwritten; None is zero."""
        self.count += 1
        step = -self.mean if gradient is None else gradient.sub_(self.mean)
        self.squares += squared(step) * (self.count - 1) / self.count
        self.mean += step.div_(self.count)


def spread_of(trained: Mapping[str, nn.Parameter], batches: Iterable[Iterable[torch.Tensor]]) -> dict[str, Spread]:
    """Spreads of the gradients of `trained`, by name.

    Args:
        batches: for each batch losses that add up to its loss; each is freed before the next one is made. A loss that
            depends on nothing trainable counts as zero.
    """
    spreads = {name: Spread(p) for name, p in trained.items()}
    for losses in batches:
        for parameter in trained.values():
            parameter.grad = None
        for loss in losses:
            if loss.requires_grad:
                loss.backward()
        for name, parameter in trained.items():
            spreads[name].add(parameter.grad)
            parameter.grad = None
    return spreads


def gradient_spread(model: nn.Module, batches: Iterable[Sequence[Batch]]) -> dict[str, Spread]:
    """`spread_of` all trainable parameters of a tuned model, for the mean loss over a batch's supervised tokens.

    The model runs in eval mode (no dropout) and is left as it was, gradients included. Memory beside the model: two
    fp32 copies of the trainable tensors (a gradient and its running mean), and what one micro-batch keeps for backward.

    Args:
        batches: for each batch its micro-batches, as a `Collator` makes them.

    Raises:
        JobError: a batch without a supervised token, or a gradient that is not finite.
    """
    inner = unwrapped(model)
    trained = {name: p for name, p in inner.named_parameters() if p.requires_grad}
    dtype, device = tuning(inner).dtype, next(iter(trained.values())).device

    def losses(batch: Sequence[Batch]) -> Iterator[torch.Tensor]:
        supervised = sum(size_of(micro)[0] for micro in batch)
        if not supervised:
            raise JobError("gradients: no sample of a batch has a supervised token; see max_length")
        for micro in batch:
            yield supervised_loss(inner, on_device(micro, device, dtype)) / supervised

    with quiet_model(inner), torch.enable_grad():
        spreads = spread_of(trained, map(losses, batches))
    wrong = [name for name, spread in spreads.items() if not bool(torch.isfinite(spread.mean).all())]
    if wrong:
        raise JobError(f"the gradient of {wrong[0]} is not finite; the run's learning_rate was too high")
    return spreads


def figures(spreads: Sequence[Spread]) -> dict[str, Any]:
    """`variance` (per value), `noise`, `share`, `norm` and `values` of tensors together; see the module's formulas.

    `noise` is None where the estimate of the true gradient's squared norm is not positive (the gradient is lost in the
    noise of so few batches), `share` where all gradients are zero.
    """
    count, values = spreads[0].count, sum(spread.mean.numel() for spread in spreads)
    squares, norm = sum(spread.squares for spread in spreads), sum(squared(spread.mean) for spread in spreads)
    total = squares / (count - 1)
    true, length = norm - total / count, squares + count * norm
    return {
        "variance": significant(total / values),
        "noise": significant(total / true) if true > 0 else None,
        "share": significant(squares / length) if length else None,
        "norm": significant(norm**0.5),
        "values": values,
    }


def by_group(spreads: Mapping[str, Spread], groups: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """`figures` of each group of parameter names; names without a spread are left out, and so are empty groups."""
    found = {label: [spreads[name] for name in names if name in spreads] for label, names in groups.items()}
    return {label: figures(members) for label, members in found.items() if members}


def squared(tensor: torch.Tensor) -> float:
    """|tensor|^2, added up in fp64 where the device has it."""
    dtype = torch.float32 if tensor.device.type == "mps" else torch.float64
    return float(torch.linalg.vector_norm(tensor, dtype=dtype)) ** 2
