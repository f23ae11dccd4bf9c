"""Scaled dot-product attention that keeps grouped keys and values as they are, not repeated for every query head.

transformers repeats K and V as soon as there is a mask, and autograd then keeps the repeated ones. Here q, k, v, the
output and its log-sum-exp are kept, which is what the kernels need. Rows that hold several samples (segments.py) are
computed sample by sample. Source: torch's flash attention (aten::_scaled_dot_product_flash_attention_for_cpu; on a GPU
aten::_flash_attention_forward, which torch.nn.attention.varlen runs as well) and its efficient attention for fp32 and
for masks that are not simply causal. Not here: other devices, dropout, biases; these go to transformers' own function.

The kernels are operators of our own, so that a compiler sees one node without data-dependent shapes.

Shapes: q (B, h, S, D), k and v (B, g, S, D) with h a multiple of g; mask (B or 1, 1 or h, S, S), True or 0 is seen;
lengths (n) of the samples in a row, zeros at the end, on the CPU; log-sum-exp (B, h, S) fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from normtune.kernels import attention_gpu
from normtune.kernels.segments import ALL, MASKED, current, window_of

MARK = "_normtune_lean"
"""Attribute of the attention modules that are to use it."""
aten = torch.ops.aten


class LeanAttention(torch.autograd.Function):
    """softmax(q k^T * scale + mask) v, causal or with a mask, within each of `lengths` where these are given."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
        scale: float | None,
        lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        out, logsumexp, window = attend(q, k, v, mask, lengths, causal, scale)
        if lengths is not None and not torch.compiler.is_compiling() and is_spare(int(window), lengths, q):
            mask = None
        ctx.save_for_backward(alone(q), alone(k), alone(v), out, logsumexp, mask, lengths, window)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        found = attend_backward(grads[0], *ctx.saved_tensors, ctx.causal, ctx.scale)
        return *found, None, None, None, None


@torch.library.custom_op("normtune::attend", mutates_args=())
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output (B, h, S, D), its log-sum-exp and, on the CPU, the window of `mask` (1) int64 or MASKED."""
    groups = q.shape[1] // k.shape[1]
    window = (ALL if mask is None else MASKED) if lengths is None else window_of(mask, lengths)
    if q.is_cuda:
        out, logsumexp = attention_gpu.forward(q, k, v, mask, lengths, window, scale)
    elif lengths is None:
        out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(
            q, repeat(k, groups), repeat(v, groups), 0.0, causal, attn_mask=additive(mask, q.dtype), scale=scale
        )
    else:
        out, logsumexp = like(q), like(q[..., :1], torch.float32)[..., 0]
        for at, own in samples(mask, lengths, window, q.shape[2]):
            out[:, :, at], logsumexp[:, :, at] = aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, :, at],
                repeat(k[:, :, at], groups),
                repeat(v[:, :, at], groups),
                0.0,
                own is None,
                attn_mask=additive(own, q.dtype),
                scale=scale,
            )
    return laid(out), logsumexp, torch.tensor([window])


@attend.register_fake
def _(q: Any, k: Any, v: Any, mask: Any, lengths: Any, causal: bool, scale: float | None) -> Any:
    return like(q), like(q[..., :1], torch.float32)[..., 0], torch.empty(1, dtype=torch.int64)


@torch.library.custom_op("normtune::attend_backward", mutates_args=())
def attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    window: torch.Tensor,
    causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, shaped as these are."""
    groups, width = q.shape[1] // k.shape[1], int(window)
    if q.is_cuda:
        grads = attention_gpu.backward(grad, q, k, v, out, logsumexp, mask, lengths, width, scale)
        return tuple(map(laid, grads))  # type: ignore[return-value]

    def run(at: Any, own: torch.Tensor | None, causal: bool) -> tuple[torch.Tensor, ...]:
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad[:, :, at],
            q[:, :, at],
            repeat(k[:, :, at], groups),
            repeat(v[:, :, at], groups),
            out[:, :, at],
            logsumexp[:, :, at],
            0.0,
            causal,
            attn_mask=additive(own, q.dtype),
            scale=scale,
        )
        return found[0], gather(found[1], groups), gather(found[2], groups)

    if lengths is None:
        return tuple(map(laid, run(slice(None), mask, causal)))  # type: ignore[return-value]
    whole = like(q), like(k), like(v)
    for at, own in samples(mask, lengths, width, q.shape[2]):
        for target, found in zip(whole, run(at, own, own is None), strict=True):
            target[:, :, at] = found
    return whole


@attend_backward.register_fake
def _(grad: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
    return like(q), like(k), like(v)


def like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Empty, of the shape (B, h, S, D) of `x`, in memory as (B, S, h, D): what a projection takes without a copy."""
    b, h, s, d = x.shape
    return x.new_empty((b, s, h, d), dtype=dtype).transpose(1, 2)


def laid(x: torch.Tensor) -> torch.Tensor:
    """`x` in memory as `like` has it, which is what a compiler was told."""
    target = like(x)
    return x if x.stride() == target.stride() else target.copy_(x)


def is_spare(window: int, lengths: torch.Tensor, q: torch.Tensor) -> bool:
    """Whether the lengths and the window say all that the mask says, to the kernel that is used."""
    within = attention_gpu.flashes(q, window) if q.is_cuda else int(lengths.max()) <= window
    return window == ALL or (window != MASKED and within)


def samples(
    mask: torch.Tensor | None, lengths: torch.Tensor, window: int, total: int
) -> Iterator[tuple[slice, torch.Tensor | None]]:
    """Where each sample lies, and its part of the mask unless it is causal as a whole."""
    start = 0
    for length in filter(None, lengths.tolist()):
        at, start = slice(start, start + length), start + length
        plain = window == ALL or length <= window
        yield at, None if mask is None or plain else mask[:, :, at, at]
    if start != total:
        raise ValueError(f"samples of {start} tokens in all in a row of {total}")


def alone(x: torch.Tensor) -> torch.Tensor:
    """`x`, copied where it is a slice of a larger tensor (a fused projection), which it would keep alive."""
    if torch.compiler.is_compiling():  # which does not see storages, and sees through a copy that is no operator
        return x if x.is_contiguous() or x.transpose(1, 2).is_contiguous() else copied(x)  # type: ignore[no-any-return]
    return x if x.untyped_storage().nbytes() < 1.5 * x.nbytes else x.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("normtune::copied", mutates_args=())
def copied(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


@copied.register_fake
def _(x: Any) -> Any:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


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
    lengths = current() if query.shape[0] == 1 else None
    if torch.is_autocast_enabled(query.device.type):  # which casts what it knows, F.sdpa and no other operator
        low = torch.get_autocast_dtype(query.device.type)
        query, key, value = (t.to(low) for t in (query, key, value))
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.to(low)
    causal = attention_mask is None and (is_causal if is_causal is not None else getattr(module, "is_causal", True))
    masked, learnt = attention_mask is not None, attention_mask is not None and attention_mask.requires_grad
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    lean = (
        vars(module).get(MARK)
        and dropout == 0.0
        and query.shape[2] == key.shape[2] > 1
        and query.shape[3] == value.shape[3]
        and query.dtype != torch.float64  # whose log-sum-exp would have to be another
        and all(options.get(name) is None for name in ("position_bias", "cache", "softcap"))
        and (causal or masked or (lengths is None and not query.is_cuda))
        and (learns or lengths is not None)
        and not learnt
    )
    if not lean or not runs_on(query):
        return theirs(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
        )
    out = LeanAttention.apply(query, key, value, attention_mask, bool(causal), scaling, lengths)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous(), None


def runs_on(query: torch.Tensor) -> bool:
    """Whether the kernels here know the device."""
    if query.is_cuda and torch.version.hip is None:
        if isinstance(query, FakeTensor):  # a plan: there may be no such device here
            return True
        return attention_gpu.proved(query.device, query.dtype, trial)  # type: ignore[no-any-return]
    return query.device.type in ("cpu", "meta")


def trial(*inputs: torch.Tensor) -> torch.Tensor:
    q, k, v, mask, lengths = inputs
    return LeanAttention.apply(q, k, v, mask, False, None, lengths)  # type: ignore[no-any-return,no-untyped-call]


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
