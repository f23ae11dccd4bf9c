"""`lean(model)`: the leanest backward for the model at hand; `restore(model)`: its own forward again."""

from __future__ import annotations

from torch import nn

from normtune import kernels
from normtune.kernels import Swaps
from normtune.layers import unwrapped
from normtune.strategy.state import swap_forwards, tuning


def lean(model: nn.Module) -> Swaps:
    """Norms, MLPs and attention of the LLM keep for backward what is needed and nothing else; outputs stay equal.

    Call it before or after `apply`, in any training program. Kept are, for each token and block of a Llama, the
    inputs of both norms, q, k, v, the output of attention, gate and up.

    Returns:
        what was swapped, and what was left alone because it computes otherwise than expected.
    """
    model = unwrapped(model)
    kernels.restore(model)
    state = tuning(model)
    state.lean = True
    return swap_forwards(model, state)


def restore(model: nn.Module) -> None:
    """Takes back what `lean` did."""
    tuning(model).lean = False
    kernels.restore(model)
