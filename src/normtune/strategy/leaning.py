"""`lean(model)`: the leanest backward for the model at hand; `restore(model)`: its own forward again."""

from __future__ import annotations

from typing import Literal

from torch import nn

from normtune import kernels
from normtune.errors import InputError
from normtune.kernels import Swaps
from normtune.layers import unwrapped
from normtune.strategy.state import swap_forwards, tuning


def lean(model: nn.Module, activations: Literal["exact", "8bit"] = "exact") -> Swaps:
    """Norms, MLPs and attention of the LLM keep for backward what is needed and nothing else; outputs stay equal.

    Call it before or after `apply`, in any training program. Kept are, for each token and block of a Llama, the
    inputs of both norms, q, k, v, the output of attention, gate and up.

    Args:
        activations: `8bit` keeps gate and up (without a gate, the input of the activation) as int8, which leaves the
            outputs as they are and changes gradients by less than 1 % of their norm.

    Returns:
        what was swapped, and what was left alone because it computes otherwise than expected.

    Raises:
        InputError: another word for `activations`.
    """
    if activations not in ("exact", "8bit"):
        raise InputError(f"activations: {activations!r} is unknown; exact or 8bit")
    model = unwrapped(model)
    kernels.restore(model)
    state = tuning(model)
    state.lean = activations
    return swap_forwards(model, state)


def restore(model: nn.Module) -> None:
    """Takes back what `lean` did."""
    tuning(model).lean = None
    kernels.restore(model)
