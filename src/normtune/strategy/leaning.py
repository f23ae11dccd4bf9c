"""`lean(model)`: the leanest backward for the model at hand; `compile_blocks(model)`; `restore(model)`: as it was."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from normtune import kernels
from normtune.errors import InputError
from normtune.kernels import Swaps
from normtune.kernels.compiling import compile_each, no_compiler, uncompile
from normtune.kernels.segments import recomputed
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


def compile_blocks(model: nn.Module, dynamic: bool = True) -> str | None:
    """Compiles each block of the LLM at its first forward that trains; blocks that are alike share their graphs.

    Call it after `apply` and `lean`. Generation, evaluation and forwards with a cache (`use_cache`, transformers'
    default) run the blocks as they are. Where a block cannot be compiled after all, all of them run as they are and
    there is one RuntimeWarning.

    Args:
        dynamic: one graph for all lengths; otherwise each new length is compiled anew.

    Returns:
        None; or, where nothing can be compiled here, a line that says why, and the model stays as it is.
    """
    model = unwrapped(model)
    blocks = [model.get_submodule(name) for name in tuning(model).anatomy.blocks]
    why = no_compiler(next(blocks[0].parameters()).device)
    if why is not None:
        return f"compile: the blocks run without it: {why}"
    compile_each(blocks, dynamic)
    return None


def checkpoint(model: nn.Module, on: bool) -> None:
    """Activation checkpointing of each block, in packed rows too; or takes it away.

    Raises:
        InputError: the model has none.
    """
    model = unwrapped(model)
    verb = "enable" if on else "disable"
    # the name of transformers before and after 5.20 or so; the older one warns where both exist
    names = [f"{what}_checkpointing_{verb}" for what in ("activation", "gradient")]
    switch: Any = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    if switch is None or not getattr(model, "supports_gradient_checkpointing", True):
        raise InputError(f"{type(model).__name__} has no activation checkpointing; set checkpoint_activations: false")
    switch(*([{"use_reentrant": False, "context_fn": recomputed}] if on else []))


def restore(model: nn.Module) -> None:
    """Takes back what `lean` and `compile_blocks` did."""
    model = unwrapped(model)
    tuning(model).lean = None
    kernels.restore(model)
    for module in model.modules():
        uncompile(module)
