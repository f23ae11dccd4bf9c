"""Scaled dot-product attention that keeps grouped keys and values as they are, not repeated for every query head.

transformers repeats K and V as soon as there is a mask, and autograd then keeps the repeated ones. Here they are
repeated in forward and again in backward, and q, k, v, the output and its log-sum-exp are kept: what the kernel needs.
Source: torch's CPU flash attention (aten::_scaled_dot_product_flash_attention_for_cpu), which F.sdpa runs as well.
Not here: other devices, dropout, biases; these go to transformers' own function.

Shapes: q (B, h, S, D), k and v (B, g, S, D) with h a multiple of g; mask (B or 1, 1 or h, S, S), True or 0 is seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

MARK = "_normtune_lean"
"""Attribute of the attention modules that are to use it."""


class LeanAttention(torch.autograd.Function):
    """softmax(q k^T * scale + mask) v, causal or with a mask."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
        scale: float | None,
    ) -> torch.Tensor:
        groups = q.shape[1] // k.shape[1]
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, repeat(k, groups), repeat(v, groups), 0.0, causal, attn_mask=additive(mask, q.dtype), scale=scale
        )
        ctx.save_for_backward(alone(q), alone(k), alone(v), out, logsumexp, mask)
        ctx.causal, ctx.scale, ctx.groups = causal, scale, groups
        return out  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, out, logsumexp, mask = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grads[0],
            q,
            repeat(k, ctx.groups),
            repeat(v, ctx.groups),
            out,
            logsumexp,
            0.0,
            ctx.causal,
            attn_mask=additive(mask, q.dtype),
            scale=ctx.scale,
        )
        return grad_q, gather(grad_k, ctx.groups), gather(grad_v, ctx.groups), None, None, None


def alone(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied where it is a slice of a larger tensor (a fused projection), which it would keep alive."""
    return x if x.untyped_storage().nbytes() < 1.5 * x.nbytes else x.clone(memory_format=torch.contiguous_format)


def repeat(x: torch.Tensor, groups: int) -> torch.Tensor:
    """(B, g, S, D) -> (B, g * groups, S, D)."""
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def gather(grad: torch.Tensor, groups: int) -> torch.Tensor:
    """The gradient of `repeat`: (B, g * groups, S, D) -> (B, g, S, D)."""
    if groups == 1:
        return grad
    b, heads, s, d = grad.shape
    return grad.view(b, heads // groups, groups, s, d).sum(2)


def additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """0 where a position is seen and -inf elsewhere, as F.sdpa makes it of a boolean mask."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def attention(
    theirs: Callable[..., Any],
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers, (B, h, S, D) -> (B, S, h, D): lean for marked modules, else `theirs`."""
    lean = vars(module).get(MARK) and dropout == 0.0 and query.device.type in ("cpu", "meta")
    lean = lean and query.shape[2] == key.shape[2] > 1 and query.shape[3] == value.shape[3]
    lean = lean and not any(options.get(key) is not None for key in ("position_bias", "cache", "softcap"))
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if not lean or not learns or (attention_mask is not None and attention_mask.requires_grad):
        return theirs(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
        )
    causal = attention_mask is None and (is_causal if is_causal is not None else getattr(module, "is_causal", True))
    out = LeanAttention.apply(query, key, value, attention_mask, bool(causal), scaling)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous(), None


def mark(module: nn.Module) -> None:
    """Lets an attention module that runs on transformers' sdpa function run on ours; it is registered in its place.

    Models choose code by the name "sdpa" (of masks, of eager parts), so the name stays; modules that are not marked
    get transformers' own function.
    """
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    theirs = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if not (isinstance(theirs, functools.partial) and theirs.func is attention):
        AttentionInterface.register("sdpa", functools.partial(attention, theirs))
    vars(module)[MARK] = True


def unmark(module: nn.Module) -> None:
    vars(module).pop(MARK, None)
