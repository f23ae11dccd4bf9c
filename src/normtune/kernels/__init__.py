"""Twins of frozen-weight operations that keep less or compute in another dtype; plain torch is the readable truth."""

from normtune.kernels.precision import demote, is_quantized, promote

__all__ = ["demote", "is_quantized", "promote"]
