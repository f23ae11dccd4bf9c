"""The head and the cross-entropy at supervised positions, in chunks: no logits of the whole batch, forward or backward.

Forward computes the gradient with respect to the hidden states (and to a trainable head) chunk by chunk and keeps
that alone. Source: the idea is Liger's and Apple's fused linear cross-entropy; the operations here are torch's.

Legend: N supervised positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

CHUNK = 1 << 23  # logits at a time, 32 MB in fp32
SLICE = 4096  # rows of a head in fp32 that are cast at a time


@dataclass(frozen=True)
class Logits:
    """What a model does to the head's output z: z * scale, then cap * tanh(. / cap) where there is a cap."""

    scale: float = 1.0
    cap: float | None = None

    def of(self, z: torch.Tensor) -> torch.Tensor:
        z = z if self.scale == 1.0 else z * self.scale
        return z if self.cap is None else torch.tanh(z / self.cap) * self.cap

    def gradient(self, logits: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """The gradient with respect to z, given the logits."""
        if self.cap is not None:
            grad = grad * (1 - (logits / self.cap).square())
        return grad if self.scale == 1.0 else grad * self.scale


class HeadLoss(torch.autograd.Function):
    """Sum over N of the cross-entropy of head(hidden) against labels, in fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        logits: Logits,
    ) -> torch.Tensor:
        """hidden (N, H), weight (V, H) and bias (V) of any float dtype, labels (N) -> ()."""
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        total = torch.zeros((), device=hidden.device)
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias and bias is not None else None
        size = max(1, CHUNK // weight.shape[0])
        for start in range(0, len(hidden), size):
            rows, target = hidden[start : start + size], labels[start : start + size, None]
            out = logits.of(head_of(rows, weight, bias)).float()
            logs = F.log_softmax(out, dim=-1)
            total -= logs.gather(1, target).sum()
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            grad = logs.exp_()
            grad.scatter_add_(1, target, torch.full_like(target, -1.0, dtype=grad.dtype))
            grad = logits.gradient(out, grad).to(hidden.dtype)
            for own, low in slices(weight, hidden.dtype):
                if grad_hidden is not None:
                    grad_hidden[start : start + size] += grad[:, own] @ low
                if grad_weight is not None:
                    grad_weight[own] += grad[:, own].t() @ rows
            if grad_bias is not None:
                grad_bias += grad.sum(0, dtype=torch.float32)
        grad_hidden = None if grad_hidden is None else grad_hidden.to(hidden.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        hidden, weight, bias = ctx.saved_tensors
        return (
            None if hidden is None else (hidden.float() * grads[0]).to(hidden.dtype),
            None if weight is None else weight.mul_(grads[0]).to(ctx.dtypes[0]),
            None if bias is None else bias.mul_(grads[0]).to(ctx.dtypes[1]),
            None,
            None,
        )


def slices(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of `weight` (V, H) in `dtype`: all of them where they have it, else some at a time: the cast is not kept."""
    size = weight.shape[0] if weight.dtype == dtype else SLICE
    for start in range(0, weight.shape[0], size):
        own = slice(start, start + size)
        yield own, weight[own].to(dtype)


def head_of(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """F.linear in the dtype of `rows` (n, H) -> (n, V)."""
    parts = [
        F.linear(rows, low, None if bias is None else bias[own].to(rows.dtype))
        for own, low in slices(weight, rows.dtype)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@contextmanager
def without_head(head: nn.Module, answer: torch.Tensor | None = None) -> Iterator[list[torch.Tensor]]:
    """Within, the head gives what it is given to a list, and `answer` (or a zero for each position) to the model."""
    given: list[torch.Tensor] = []

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        given.append(hidden)
        return hidden.new_zeros(*hidden.shape[:-1], 1) if answer is None else answer

    before = vars(head).get("forward")
    head.forward = forward  # type: ignore[method-assign]
    try:
        yield given
    finally:
        del head.forward
        if before is not None:
            head.forward = before


def find_logits(model: nn.Module, head: nn.Module) -> Logits | None:
    """What the model does between its head and its logits, told from what comes of a ramp; None if it is another thing.

    Runs the model on one token of text.
    """
    ramp = torch.tensor([1e-2, 0.5, 1.0, 3.0, 10.0, -40.0, 200.0, 1e6])
    device = next(head.parameters()).device
    training = [module for module in model.modules() if module.training]
    model.eval()  # dropout would take from the training's random numbers
    with torch.no_grad(), without_head(head, ramp.to(device)[None, None]) as given:
        try:
            found = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False).logits
        except Exception:  # a model that does not run on text alone
            return None
        finally:
            for module in training:
                module.training = True
    if len(given) != 1 or found.shape != (1, 1, len(ramp)):
        return None
    got = found.flatten().double().cpu()
    scale = float(got[0] / ramp[0])
    capped = abs(float(got[-1])) < 0.5 * scale * 1e6
    guess = Logits(scale if abs(scale - 1) > 1e-4 else 1.0, float(got[-1]) if capped else None)
    return guess if torch.allclose(guess.of(ramp.double()), got, rtol=1e-4) else None
