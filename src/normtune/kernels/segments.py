"""Samples that lie end to end in one row: where each begins and ends, and how far back a token sees within its own.

`with segments(lengths):` around a forward tells lean attention (attention.py) that a row holds several samples, so
that it computes them one by one and the mask of the whole row is not needed. Which tokens see which stays the model's
knowledge: its own mask says so, and `find_window` reads from it whether that is the usual thing.

Shapes: lengths (n), tokens of each sample; masks (1, 1, T, T), True or 0 is seen, T the sum of the lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F

MULTIPLE = 16  # lengths are filled up with zeros: compiled code is not made anew for each number of samples
ALL = -1
"""As a window: back to the first token of the sample."""
MASKED = 0
"""As a window: only the mask itself says it."""

_lengths: torch.Tensor | None = None
_windows: dict[tuple[int, int], tuple[torch.Tensor, int]] = {}


@contextmanager
def segments(lengths: torch.Tensor | None) -> Iterator[None]:
    """Within, rows hold samples of `lengths` (n) int64 on the CPU, end to end; None: nothing is packed."""
    global _lengths
    before = _lengths
    if lengths is not None and len(lengths) % MULTIPLE:
        lengths = F.pad(lengths, (0, -len(lengths) % MULTIPLE))
    _lengths = lengths
    _windows.clear()
    try:
        yield
    finally:
        _lengths = before
        _windows.clear()


def current() -> torch.Tensor | None:
    """Lengths of the samples in the row at hand, zeros behind them; None where nothing is packed."""
    return _lengths


def recomputed() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` of torch.utils.checkpoint: the second forward of a block sees the samples that the first one saw."""
    return nullcontext(), segments(_lengths)


def window_of(mask: torch.Tensor | None, lengths: torch.Tensor) -> int:
    """`find_window`, once for each mask of a forward."""
    if mask is None:
        return ALL
    key = mask.data_ptr(), mask._version
    known = _windows.get(key)
    if known is None or known[0].shape != mask.shape:
        known = _windows[key] = mask, find_window(mask, lengths)  # with the mask: its address stays taken
    return known[1]


def find_window(mask: torch.Tensor, lengths: torch.Tensor) -> int:
    """How many tokens back a token sees, itself counted: ALL, or the width of a sliding window.

    MASKED where the mask (B, heads, T, T) is not simply causal within each sample, as where images are seen both ways
    or padding is masked. One look at the device.
    """
    if mask.shape[:2] != (1, 1) or mask.shape[2] != mask.shape[3] or mask.shape[3] != int(lengths.sum()):
        return MASKED
    seen = (mask if mask.dtype == torch.bool else mask == 0)[0, 0]
    place = torch.arange(len(seen), device=mask.device)
    start = (lengths.cumsum(0) - lengths).repeat_interleave(lengths).to(mask.device)
    width = seen.sum(1).max()
    first = torch.maximum(start, place - width + 1)
    right = (seen == ((place >= first[:, None]) & (place <= place[:, None]))).all()
    if mask.dtype != torch.bool:  # a bias is no mask: all the rest has to be out of sight
        right &= (seen | (mask[0, 0] <= torch.finfo(mask.dtype).min / 2)).all()
    fits, found = torch.stack([right.long(), width]).tolist()
    if not fits:
        return MASKED
    return ALL if found == int(lengths.max()) else found
