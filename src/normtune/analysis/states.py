"""Hidden states between the blocks of a model during a forward, and a model that a measurement leaves as it was.

Scope: layer 0 is the input of the first block, layer l the output of block l, before the final norm. States are handed
out batch by batch and kept by nobody here. Not here: what is computed from them (similarity.py).

Legend: B rows, S tokens of the longest row, T tokens of one kind in a batch, H hidden size, L blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from normtune.errors import JobError
from normtune.structure import Anatomy


@contextmanager
def quiet_model(model: nn.Module) -> Iterator[None]:
    """In eval mode (no dropout) and with a random state of its own; gradients, modes and state are put back after."""
    training = [module for module in model.modules() if module.training]
    gradients = [(p, p.grad) for p in model.parameters()]
    model.eval()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for module in training:
            module.training = True
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def block_states(model: nn.Module, found: Anatomy) -> Iterator[list[torch.Tensor]]:
    """A list that a forward within fills with L + 1 tensors [B, S, H]; clear it before the next one."""
    states: list[torch.Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.is_floating_point()]
        states.append(given[0].detach())

    def after(_: nn.Module, __: Any, output: Any) -> None:
        states.append((output if isinstance(output, torch.Tensor) else output[0]).detach())

    blocks = [model.get_submodule(name) for name in found.blocks]
    with ExitStack() as hooks:
        hooks.callback(blocks[0].register_forward_pre_hook(before, with_kwargs=True).remove)
        for block in blocks:
            hooks.callback(block.register_forward_hook(after).remove)
        yield states


def kinds_of_tokens(batch: Mapping[str, torch.Tensor], image_token: int | None) -> dict[str, torch.Tensor]:
    """Where the tokens of images and of text stand in the flattened rows, padding left out: each [T] int64."""
    ids, real = batch["input_ids"].flatten(), batch["attention_mask"].flatten() != 0
    image = ids == image_token if image_token is not None else torch.zeros_like(real)
    places = {"image": image & real, "text": ~image & real}
    return {kind: torch.nonzero(where).squeeze(1) for kind, where in places.items()}


def states_at(states: list[torch.Tensor], layers: int, places: torch.Tensor) -> list[torch.Tensor]:
    """The states of the tokens at `places` [T], layer by layer: `layers` tensors [T, H].

    Raises:
        JobError: blocks that did not run once each.
    """
    if len(states) != layers:
        raise JobError(f"{len(states)} states of {layers} layers were seen: the blocks do not run once each")
    return [state.reshape(-1, state.shape[-1]).index_select(0, places.to(state.device)) for state in states]
