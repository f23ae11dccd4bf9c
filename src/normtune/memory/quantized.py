"""Stand-ins for bitsandbytes' 4- and 8-bit layers on fake tensors: the bytes of their weights, and of their work.

The bytes are a formula: bitsandbytes' own code does not run on fake tensors. Source: bitsandbytes 0.50, `functional.py`
(quantize_4bit: two values in a byte, an absmax for 64 values; double quantization: that absmax in a byte, one fp32 for
256 of them and an offset) and `nn/modules.py` (Int8Params: a byte for a value, an fp32 for a row).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from normtune.layers import features

BLOCK, NESTED = 64, 256
CODES = 16 * 4, 256 * 4  # tables of the 4-bit and of the nested 8-bit values


def nf4_bytes(weights: int, double: bool = True) -> int:
    """Bytes of a layer's weights in NF4, with double quantization of the scales or without."""
    scales = -(-weights // BLOCK)
    packed = -(-weights // 2) + CODES[0]
    return packed + (scales + 4 * -(-scales // NESTED) + CODES[1] + 4 if double else 4 * scales)


def int8_bytes(rows: int, columns: int) -> int:
    """Bytes of a layer's weights (rows, columns) in 8 bits."""
    return rows * columns + 4 * rows


class Dequantized(torch.autograd.Function):
    """x W^T + b where W (O, I) is made when it is needed, in forward and again in backward, and never kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, rows: int) -> torch.Tensor:
        ctx.shape = rows, x.shape[-1]
        return F.linear(x, x.new_empty(ctx.shape), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return grads[0] @ grads[0].new_empty(ctx.shape), None, None


def stand_in(layer: nn.Module, dtype: str) -> None:
    """Makes a frozen linear layer one of `dtype` (nf4, int8), as far as bytes go."""
    columns, rows = features(layer)
    layer.in_features, layer.out_features = columns, rows  # type: ignore[assignment]
    size = nf4_bytes(rows * columns) if dtype == "nf4" else int8_bytes(rows, columns)
    packed = torch.empty(size, dtype=torch.uint8, device=layer.weight.device)  # type: ignore[arg-type]
    layer.weight = nn.Parameter(packed, requires_grad=False)
    layer.forward = functools.partial(_forward, layer, rows)  # type: ignore[method-assign]


def _forward(layer: nn.Module, rows: int, x: torch.Tensor) -> torch.Tensor:
    return Dequantized.apply(x, layer.bias, rows)  # type: ignore[no-any-return,no-untyped-call]
