"""Autograd functions that compute what the model computes and keep less for backward. No matmul is done twice.

`LeanNorm` keeps the norm's input alone, `GatedProduct` the two inputs of act(gate) * up, `Elementwise` the input of an
activation; the last two as 8-bit integers if asked to. Forward runs the model's own operations, bit for bit; backward
computes what it needs of them again from these inputs (element-wise work). Source of the gradients: the quotient rule
for x / sqrt(mean(x^2) + eps), as in Zhang and Sennrich, arXiv 1910.07467, and Ba et al., arXiv 1607.06450; of the
8-bit store: symmetric quantization by groups, as of activations in ActNN, Chen et al., arXiv 2104.14129.

Legend: N rows (batch and positions), H width; shapes (..., H).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

Unary = Callable[[torch.Tensor], torch.Tensor]


class LeanNorm(torch.autograd.Function):
    """y = n * g + b with n = (x - c) / sqrt(mean((x - c)^2) + eps), c the mean of x or 0, g the gain or 1 + gain."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        gain: torch.Tensor,
        bias: torch.Tensor | None,
        own: Unary,
        centred: bool,
        offset: float,
        eps: float,
    ) -> torch.Tensor:
        """`own` is the module's forward; `offset` is added to the gain (0 or 1)."""
        ctx.save_for_backward(x, gain)
        ctx.centred, ctx.offset, ctx.eps = centred, offset, eps
        ctx.bias_dtype = None if bias is None else bias.dtype
        return own(x)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        needs_x, needs_gain, needs_bias = ctx.needs_input_grad[:3]
        x, gain = ctx.saved_tensors
        grad, h = grads[0].float(), x.float()
        if ctx.centred:
            h = h - h.mean(-1, keepdim=True)
        scale = torch.rsqrt(h.square().mean(-1, keepdim=True) + ctx.eps)
        normalized = h * scale
        rows = tuple(range(grad.dim() - gain.dim()))
        grad_gain = (grad * normalized).sum(rows).to(gain.dtype) if needs_gain else None
        grad_bias = grad.sum(rows).to(ctx.bias_dtype) if needs_bias else None
        grad_x = None
        if needs_x:
            inner = grad * (gain.float() + ctx.offset)
            inner = inner - normalized * (inner * normalized).mean(-1, keepdim=True)
            if ctx.centred:
                inner = inner - inner.mean(-1, keepdim=True)
            grad_x = (inner * scale).to(x.dtype)
        return grad_x, grad_gain, grad_bias, None, None, None, None


def again(act: Unary, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A leaf with the values of `x`, and act of it with a graph, for the gradient of act."""
    with torch.enable_grad():
        start = x.detach().requires_grad_()
        return start, act(start)


def group_size(width: int) -> int:
    """Values that share a scale: the largest divisor of `width` up to 192, `width` itself where that is small."""
    best = max(size for size in range(1, 193) if width % size == 0)
    return best if best >= 32 else width


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., I) -> int8 (..., G, I/G) and a scale of x's dtype for each group, (..., G, 1).

    The divisor is 126: a scale that was rounded down to bf16 must not lift the largest value over 127.
    """
    groups = x.unflatten(-1, (-1, group_size(x.shape[-1])))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale = (torch.maximum(-low, high) / 126).clamp_min_(torch.finfo(x.dtype).tiny)
    return (groups / scale).round_().to(torch.int8), scale


def keep(x: torch.Tensor, eight_bit: bool) -> tuple[torch.Tensor, ...]:
    """What to save of `x` for backward."""
    return quantize(x) if eight_bit else (x,)


def kept(saved: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The value, or nearly, of what `keep` gave."""
    return saved[0] if len(saved) == 1 else (saved[0] * saved[1]).flatten(-2)


class GatedProduct(torch.autograd.Function):
    """y = act(gate) * up, all of one shape (..., I); act is any element-wise function without parameters."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, act: Unary, eight_bit: bool) -> torch.Tensor:
        ctx.save_for_backward(*keep(gate, eight_bit), *keep(up, eight_bit))
        ctx.act = act
        return act(gate) * up

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        saved = ctx.saved_tensors  # once only: checkpointing computes them again at each look
        half = len(saved) // 2
        gate, up = kept(saved[:half]), kept(saved[half:])
        start, active = again(ctx.act, gate)
        (grad_gate,) = torch.autograd.grad(active, start, grads[0] * up)
        return grad_gate, grads[0] * active.detach(), None, None


class Elementwise(torch.autograd.Function):
    """y = act(x) for any element-wise function without parameters."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, act: Unary, eight_bit: bool) -> torch.Tensor:
        ctx.save_for_backward(*keep(x, eight_bit))
        ctx.act = act
        return act(x)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        start, active = again(ctx.act, kept(ctx.saved_tensors))
        return torch.autograd.grad(active, start, grads[0])[0], None, None


@torch.library.custom_op("normtune::quantize", mutates_args=())
def quantize_op(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`quantize` as one node of a graph, and a 1 of x's dtype.

    What a node of unknown kind gives in forward is saved for backward, not made again. A product with the 1 puts the
    node into forward, which has no other use for it.
    """
    values, scale = quantize(x)
    return values.contiguous(), scale.contiguous(), x.new_ones(())


@quantize_op.register_fake
def _(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    size = group_size(x.shape[-1])
    groups = *x.shape[:-1], x.shape[-1] // size
    return x.new_empty((*groups, size), dtype=torch.int8), x.new_empty((*groups, 1)), x.new_empty(())


class Rounded(torch.autograd.Function):
    """x as its 8-bit copy gives it, and the 1 of `quantize_op`; the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        *saved, one = quantize_op(x)
        ctx.mark_non_differentiable(one)
        return kept(tuple(saved)), one

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


class Instead(torch.autograd.Function):
    """The value of `value`, the gradient of `path`."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, grads[0]


def in_graph(function: Callable[..., torch.Tensor], eight_bit: bool, *inputs: torch.Tensor) -> torch.Tensor:
    """function(*inputs) for a compiled graph, whose partitioner chooses what is saved: the least that backward needs.

    With `eight_bit` the gradient is that at the 8-bit copies, so that these are the least.
    """
    value = function(*inputs)
    if not eight_bit:
        return value
    copies = []
    for x in inputs:
        near, one = Rounded.apply(x)  # type: ignore[no-untyped-call]
        copies.append(near)
        value = value * one
    return Instead.apply(value, function(*copies))  # type: ignore[no-any-return,no-untyped-call]


def gated_product(gate: torch.Tensor, up: torch.Tensor, act: Unary, eight_bit: bool) -> torch.Tensor:
    """act(gate) * up, keeping gate and up, as int8 if `eight_bit`."""
    if torch.compiler.is_compiling():
        return in_graph(lambda gate, up: act(gate) * up, eight_bit, gate, up)
    return GatedProduct.apply(gate, up, act, eight_bit)  # type: ignore[no-any-return,no-untyped-call]


def elementwise(x: torch.Tensor, act: Unary, eight_bit: bool) -> torch.Tensor:
    """act(x), keeping x, as int8 if `eight_bit`."""
    if torch.compiler.is_compiling():
        return in_graph(act, eight_bit, x)
    return Elementwise.apply(x, act, eight_bit)  # type: ignore[no-any-return,no-untyped-call]
