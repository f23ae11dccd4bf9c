"""Attention kernels of a CUDA device behind one pair of functions: flash where a window says it all, else efficient.

Flash attention takes samples end to end (variable lengths, of which a plain batch is a case), grouped keys as they
are and sliding windows; fp16 and bf16 only. Efficient attention takes any mask and fp32; keys are repeated for the
time of its run. Both are torch's own operators, without their checks: `proved` tries them against F.sdpa first.

Shapes as in attention.py; a window is ALL, MASKED or the number of tokens that a token sees, itself counted.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from normtune.kernels.segments import ALL, MASKED

Tensors = tuple[torch.Tensor, ...]
aten = torch.ops.aten


def flashes(q: torch.Tensor, window: int) -> bool:
    """Whether flash attention takes it; its heads are multiples of 8 wide, and it needs an Ampere GPU."""
    fits = q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] % 8 == 0 and q.shape[3] <= 256
    return window != MASKED and fits and torch.cuda.get_device_capability(q.device) >= (8, 0)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    window: int,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output (B, h, S, D) and its log-sum-exp (B, h, S)."""
    b, heads, s, _ = q.shape
    if flashes(q, window):
        ends, longest = bounds(q, lengths)
        out, logsumexp, *_ = aten._flash_attention_forward(
            *map(flat, (q, k, v)), ends, ends, longest, longest, 0.0, True, False, scale=scale, **reach(window)
        )
        return unflat(out, b), logsumexp.view(heads, b, s).permute(1, 2, 0).contiguous().transpose(1, 2)
    out, logsumexp, *_ = aten._scaled_dot_product_efficient_attention(
        q, *repeated(q, k, v), bias(q, mask, lengths), True, scale=scale
    )
    return out, logsumexp[..., :s].transpose(1, 2).contiguous().transpose(1, 2)


def backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    mask: torch.Tensor | None,
    lengths: torch.Tensor | None,
    window: int,
    scale: float | None,
) -> Tensors:
    """Gradients of q, k and v."""
    b, heads, s, d = q.shape
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a dropout that there is not
    if flashes(q, window):
        ends, longest = bounds(q, lengths)
        inputs = (*map(flat, (grad, q, k, v, out)), logsumexp.transpose(0, 1).reshape(heads, b * s))
        found = aten._flash_attention_backward(
            *inputs, ends, ends, longest, longest, 0.0, True, seed, seed.new_empty(0), scale=scale, **reach(window)
        )
        return tuple(unflat(x, b) for x in found)
    padded = F.pad(logsumexp, (0, -s % 32)).contiguous()  # the kernel reads rows in blocks
    none = torch.zeros((), dtype=torch.int64, device=q.device)
    found = aten._scaled_dot_product_efficient_attention_backward(
        *(grad, q, *repeated(q, k, v), bias(q, mask, lengths), out, padded, none, none),
        *(0.0, [True, True, True, False]),
        scale=scale,
    )
    dq, *rest = found[:3]
    return dq, *(x.view(b, k.shape[1], -1, s, d).sum(2) for x in rest)


def flat(x: torch.Tensor) -> torch.Tensor:
    """(B, h, S, D) -> (B * S, h, D)."""
    x = x.transpose(1, 2).flatten(0, 1)
    return x if x.stride(2) == 1 else x.contiguous()


def unflat(x: torch.Tensor, b: int) -> torch.Tensor:
    """(B * S, h, D) -> (B, h, S, D)."""
    return x.unflatten(0, (b, -1)).transpose(1, 2)


def bounds(q: torch.Tensor, lengths: torch.Tensor | None) -> tuple[torch.Tensor, int]:
    """Where samples begin and end in `flat`: int32 (n + 1) on the device of q; and the length of the longest.

    Counted on the CPU: the GPU is not waited for. The row has to end where the last sample does, since gradients of
    rows beyond it are not a number (pytorch#176793).
    """
    b, _, s, _ = q.shape
    lengths = torch.full((b,), s) if lengths is None else lengths
    ends = F.pad(lengths.cumsum(0), (1, 0))
    if int(ends[-1]) != b * s:
        raise ValueError(f"samples of {int(ends[-1])} tokens in all in a row of {b * s}")
    return ends.to(q.device, torch.int32, non_blocking=True), int(lengths.max())


def reach(window: int) -> dict[str, int]:
    return {"window_size_left": -1 if window == ALL else window - 1, "window_size_right": 0}


def repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, g, S, D) -> (B, h, S, D)."""
    groups = q.shape[1] // k.shape[1]
    return (k, v) if groups == 1 else (k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1))


def bias(q: torch.Tensor, mask: torch.Tensor | None, lengths: torch.Tensor | None) -> torch.Tensor:
    """0 where a position is seen, -inf elsewhere; (B, h, S, S), rows aligned to 16 values as the kernel wants it."""
    b, heads, s, _ = q.shape
    place = torch.arange(s, device=q.device)
    if lengths is None:
        seen = torch.ones(s, s, dtype=torch.bool, device=q.device)
    else:
        owner = torch.arange(len(lengths)).repeat_interleave(lengths).to(q.device)
        seen = owner[:, None] == owner
    if mask is None:
        seen = seen & (place[:, None] >= place)
    elif mask.dtype == torch.bool:
        seen = seen & mask
    shape = torch.broadcast_shapes(seen.shape, (1, 1, s, s) if mask is None else mask.shape)
    room = q.new_zeros((*shape[:3], s + -s % 16))[..., :s]
    if mask is not None and mask.dtype != torch.bool:
        room += mask
    return room.masked_fill_(~seen, -torch.inf).expand(b, heads, s, s)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@functools.cache
def proved(device: torch.device, dtype: torch.dtype, run: Callable[..., torch.Tensor]) -> bool:
    """Whether `run(q, k, v, mask, lengths)` works on a device and agrees with F.sdpa, gradients too; tried once.

    In a thread of its own: there is neither no_grad nor a hook on saved tensors, as gradient checkpointing has them.
    """
    try:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(compare, device, dtype, run).result()
    except Exception as error:  # whatever a kernel of another build of torch raises means the same
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        warnings.warn(f"attention falls back to transformers' own on {device}: {cause}", stacklevel=2)
        return False
    return True


def compare(device: torch.device, dtype: torch.dtype, run: Callable[..., torch.Tensor]) -> None:
    """Two samples, causal, with a sliding window and with a mask of no order; RuntimeError where F.sdpa differs."""
    generator = torch.Generator().manual_seed(0)
    lengths, s = torch.tensor([23, 17, 0]), 40
    place, owner = torch.arange(s), torch.arange(3).repeat_interleave(lengths)
    causal = (owner[:, None] == owner) & (place[:, None] >= place)
    odd = causal & (torch.rand(s, s, generator=generator) > 0.3) | torch.eye(s, dtype=torch.bool)
    for mask in (causal, causal & (place[:, None] - place < 5), odd):
        heads = (torch.randn(1, h, s, 64, generator=generator) for h in (4, 2, 2, 4))
        q, k, v, grad = (x.to(device, dtype).requires_grad_() for x in heads)
        seen = mask[None, None].to(device)
        ours, (keys, values) = run(q, k, v, seen, lengths), repeated(q, k, v)
        theirs = F.scaled_dot_product_attention(q, keys, values, seen)
        pairs = zip(
            (ours, *torch.autograd.grad(ours, (q, k, v), grad)),
            (theirs, *torch.autograd.grad(theirs, (q, k, v), grad)),
            strict=True,
        )
        if not all((a - b).norm() <= 0.02 * b.norm() for a, b in pairs):
            raise RuntimeError("another result than F.sdpa's")
