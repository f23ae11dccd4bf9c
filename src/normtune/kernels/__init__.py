"""Twins of frozen-weight operations that keep less or compute in another dtype; plain torch is the readable truth."""

from normtune.kernels.lean import Swaps, restore, swap
from normtune.kernels.loss import HeadLoss, Logits, find_logits, without_head
from normtune.kernels.precision import demote, promote
from normtune.kernels.quantized import is_quantized, keep_differentiable

__all__ = [
    "HeadLoss",
    "Logits",
    "Swaps",
    "demote",
    "find_logits",
    "is_quantized",
    "keep_differentiable",
    "promote",
    "restore",
    "swap",
    "without_head",
]
