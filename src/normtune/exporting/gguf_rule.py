"""The rule by which stored gains follow a tuning: a ratio to the base's effective gains, so that folded factors stay.

A file may hold factor * (o + g): o is 1 where the norm computes with 1 + g and the file holds the sum, else 0; the
factor is what a quantizer moved from the next matrix into the gain (AWQ: Lin et al., arXiv 2306.00978), else 1. Pure
functions of arrays (N), fp64. Not here: files.
"""

from __future__ import annotations

import numpy as np

ROUNDING = 2.0**-8  # twice what bf16 rounds, relative


def close(values: np.ndarray, base: np.ndarray, offset: float) -> bool:
    """Whether `values` are offset + base, up to what bf16 or fp16 rounds of base or of the sum."""
    limit = ROUNDING * np.maximum(np.abs(base), np.abs(offset + base)) + 1e-7
    return bool((np.abs(values - (offset + base)) <= limit).all())


def folded(values: np.ndarray, base: np.ndarray, offset: float) -> np.ndarray:
    """The factor by which each stored gain is larger than the base's effective one; (N), 1 where that one is 0."""
    if close(values, base, offset):
        return np.ones_like(values)
    effective = offset + base
    return np.divide(values, effective, out=np.ones_like(values), where=effective != 0)


def ratio_rule(values: np.ndarray, base: np.ndarray, tuned: np.ndarray, offset: float) -> np.ndarray:
    """values * (offset + tuned) / (offset + base), fp32; where the file holds the base's own gains: offset + tuned.

    All (N), fp64. Raises ZeroDivisionError where a scaled gain of 0 is to become another value: its scale is unknown.
    """
    before, after = offset + base, offset + tuned
    if close(values, base, offset):
        return after.astype(np.float32)
    if ((before == 0) & (after != 0)).any():
        raise ZeroDivisionError
    return (values * np.divide(after, before, out=np.ones_like(after), where=before != 0)).astype(np.float32)
