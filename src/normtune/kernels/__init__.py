"""Twins of frozen-weight operations that keep less or compute in another dtype; plain torch is the readable truth."""

from normtune.kernels.lean import Swaps, restore, swap
from normtune.kernels.precision import demote, promote
from normtune.kernels.quantized import is_quantized, keep_differentiable

__all__ = ["Swaps", "demote", "is_quantized", "keep_differentiable", "promote", "restore", "swap"]
