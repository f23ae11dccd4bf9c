"""torch.compile block by block, for training: no graph breaks, lengths dynamic, one graph for blocks that are alike.

A compiled block computes with the model's own norms and MLPs, not with lean ones (lean.py): the compiler's partitioner
saves what these would save, and fuses what they compute again. The 8-bit store and lean attention are in the graph.
A block is compiled for forwards that train; generation and evaluation run it as it is. What cannot be compiled runs
as it is as well, with one warning for all blocks.
Not here: which modules are blocks (structure).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from normtune.kernels.replacing import Replaced

GRAPHS = 64
"""How many graphs the blocks may need: the first block has no gradient to pass on, masks come and go, layers differ."""


IDENTITY = ("CLOSURE_MATCH", "FUNCTION_MATCH", "ID_MATCH")
"""Kinds of guards that ask whether an object is the very same one."""


class Compiled:
    """What `block(...)` calls: the compiled block where it trains, else the block's own call."""

    def __init__(self, block: nn.Module, give_up: Callable[[Exception], None], dynamic: bool, backend: str) -> None:
        self.block, self.give_up, self.failed = block, give_up, False
        self.fast = torch.compile(
            block._call_impl,
            fullgraph=True,
            dynamic=dynamic,
            backend=backend,
            options={"guard_filter_fn": forwards_of_any_block},
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block = self.block
        trains = block.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if not trains or kwargs.get("past_key_values") is not None:
            return block._call_impl(*args, **kwargs)
        # newer transformers checkpoint inside `forward`, older ones around this call; here it is always around it
        if getattr(block, "gradient_checkpointing", False) and type(block).__call__ is nn.Module.__call__:
            return block._gradient_checkpointing_func(functools.partial(self.run, **kwargs), *args)  # type: ignore
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        own = vars(self.block)
        checkpointing = own.get("gradient_checkpointing")
        if checkpointing:
            own["gradient_checkpointing"] = False
        try:
            if self.failed:  # checkpointing comes here again
                return self.block._call_impl(*args, **kwargs)
            with torch._dynamo.config.patch(recompile_limit=GRAPHS):
                return self.fast(*args, **kwargs)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            self.failed = True
            self.give_up(error)
            return self.block._call_impl(*args, **kwargs)
        finally:
            if checkpointing:
                own["gradient_checkpointing"] = checkpointing


def forwards_of_any_block(guards: Sequence[Any]) -> list[bool]:
    """Keeps all guards but those on the identity of forwards that we gave to a module.

    These differ from block to block; their function and arguments, which decide what is computed, have guards of
    their own.
    """
    return [not (guard.guard_type in IDENTITY and isinstance(guard.value, Replaced)) for guard in guards]


def compile_each(blocks: Sequence[nn.Module], dynamic: bool = True, backend: str = "inductor") -> None:
    """Compiles the blocks at their first call; where that fails all of them run as they are, after one warning."""

    def give_up(error: Exception) -> None:
        for block in blocks:
            uncompile(block)
        warnings.warn(f"compile: the blocks run without it: {first_line(error)}", RuntimeWarning, stacklevel=4)

    for block in blocks:
        vars(block)["_compiled_call_impl"] = Compiled(block, give_up, dynamic, backend)


def uncompile(module: nn.Module) -> None:
    """Gives the module its own call back; nothing happens to one that we have not compiled."""
    if isinstance(vars(module).get("_compiled_call_impl"), Compiled):
        del vars(module)["_compiled_call_impl"]


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def no_compiler(device: torch.device) -> str | None:
    """Why nothing can be compiled for `device`, in a line; None where it seems possible."""
    try:
        torch._dynamo.eval_frame.check_if_dynamo_supported()
        if device.type == "cuda":
            from torch.utils._triton import has_triton

            return None if has_triton() else "no Triton for this GPU"
        if device.type == "cpu":
            from torch._inductor.cpp_builder import get_cpp_compiler

            get_cpp_compiler()
    except Exception as error:  # each part of torch raises what it likes
        return first_line(error)
    return None
