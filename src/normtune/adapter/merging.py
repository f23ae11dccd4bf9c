"""`merge`: the tuned model as a plain transformers model; `survival`: what rounding leaves of a tuning.

A gain near 1 moves in bf16 in steps of 2^-8, and a bf16 weight stays where it is unless its LoRA update reaches half a
unit in its last place: merging can round a tuning away. Not here: adapters in files (loading.py).
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normtune.adapter.loading import KEY
from normtune.errors import InputError, JobError
from normtune.kernels import demote, is_quantized, restore
from normtune.layers import unwrapped
from normtune.strategy import (
    CHUNK,
    LORA_NAME,
    Tuning,
    base_gains,
    parameters,
    refuse_banked,
    refuse_cast,
    remove_lora,
    sample,
    tuning,
)


@dataclass(frozen=True)
class Survival:
    """What rounding leaves of a tuning; a figure is 1 where there is nothing to lose.

    Attributes:
        gains: number of gains that differ from the base's in fp32.
        differing: share of them that still differ from the base after rounding, 0 to 1.
        survived: 1 - |rounded - tuned| / |tuned - base| over all gains, not below 0.
        lora: share of LoRA's change of the weights that is kept, <rounded change, change> / <change, change> over all
            adapted weights; rounding that is not biased keeps it near 1. None without LoRA.
        rest: the same over the other tuned tensors, or over a sample of 4096 values of each. None without.
    """

    gains: int
    differing: float
    survived: float
    lora: float | None = None
    rest: float | None = None

    @property
    def worst(self) -> float:
        return min(v for v in (self.differing, self.survived, self.lora, self.rest) if v is not None)

    def __str__(self) -> str:
        parts = []
        if self.gains:
            parts.append(
                f"{self.differing:.1%} of {self.gains} tuned gains still differ, "
                f"{self.survived:.1%} of the change survives"
            )
        if self.lora is not None:
            parts.append(f"{self.lora:.1%} of the LoRA update is kept")
        if self.rest is not None:
            parts.append(f"{self.rest:.1%} of the change of the other tensors is kept")
        return ", ".join(parts) or "nothing was tuned"


def survival(model: nn.Module, dtype: torch.dtype) -> Survival:
    """What would be left of the tuning after rounding to `dtype`.

    Raises:
        JobError: the model was cast as a whole since it was tuned.
    """
    refuse_cast(model)
    state, present, gains = tuning(model), parameters(model), base_gains(model)
    moved = differing = 0
    lost_square = change_square = 0.0
    for name in (name for name in state.tuned if name in gains):
        base = gains[name].double()
        gain = present[name].detach().cpu()
        rounded = gain.to(dtype).double()
        moved += int((gain != base).sum())
        differing += int(((gain != base) & (rounded != base.to(dtype).double())).sum())
        lost_square += float((rounded - gain.double()).square().sum())
        change_square += float((gain.double() - base).square().sum())
    rest = share_kept(rest_changes(state, present, gains), dtype)
    lora = share_kept(lora_changes(model, state), dtype)
    if moved == 0:
        return Survival(0, 1.0, 1.0, lora, rest)
    survived = max(0.0, 1 - (lost_square / change_square) ** 0.5)
    return Survival(moved, differing / moved, survived, lora, rest)


def rest_changes(
    state: Tuning, present: Mapping[str, nn.Parameter], gains: Container[str]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(base, fp32 change) of the tuned tensors that are no gains: whole where the base is kept, else of its sample."""
    for name in state.tuned:
        if name in gains or name not in present:
            continue
        parameter = present[name].detach()
        if name in state.base:
            base = state.base[name].to(parameter.device)
            yield base, parameter - base.float()
        elif name in state.samples:
            base = state.samples[name].to(parameter.device)
            yield base, sample(parameter) - base.float()


def share_kept(changes: Iterator[tuple[torch.Tensor, torch.Tensor]], dtype: torch.dtype) -> float | None:
    """<rounded change, change> / <change, change> over pairs (base weight, fp32 change); None where nothing changed."""
    kept = whole = 0.0
    for whole_base, whole_change in changes:
        pieces = zip(whole_base.detach().reshape(-1).split(CHUNK), whole_change.reshape(-1).split(CHUNK), strict=True)
        for base, change in pieces:  # temporary copies of a chunk, not of an embedding
            start = base.float()
            rounded = (start + change).to(dtype).float() - start
            kept += float((rounded * change).sum(dtype=torch.float64))
            whole += float(change.square().sum(dtype=torch.float64))
    return kept / whole if whole else None


def lora_changes(model: nn.Module, state: Tuning) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(weight, alpha / r * B A) of every adapted layer, one at a time."""
    for layer in lora_layers(model, state):
        yield layer.base_layer.weight, layer.get_delta_weight(LORA_NAME).detach().float()


def lora_layers(model: nn.Module, state: Tuning) -> Iterator[Any]:
    if state.lora is None:
        return
    from peft.tuners.lora import LoraLayer

    for name in state.anatomy.linears:
        layer = model.get_submodule(name)
        if isinstance(layer, LoraLayer):
            yield layer


def merge(model: nn.Module, dtype: torch.dtype | None = None, *, force: bool = False, least: float = 0.9) -> Survival:
    """Makes `model` a plain transformers model again: tuned tensors in the base's dtype, LoRA folded in.

    Of several loaded adapters the active one is merged; the others are forgotten.

    Args:
        dtype: of all floating-point weights of the merged model (default: each as in the base).
        least: smallest share of the tuning that must survive rounding.

    Raises:
        InputError: a quantized base, or a model in a bank.
        JobError: less than `least` survives, and `force` is not set; the model is unchanged.
    """
    model = unwrapped(model)
    refuse_banked(model)
    quantized = [name for name, parameter in model.named_parameters() if is_quantized(parameter)]
    if quantized:
        raise InputError(
            f"a quantized base cannot be merged into ({quantized[0]} is not stored in floating point);\n"
            "save the adapter, load it onto the base in bfloat16 or float32, and merge there"
        )
    state = tuning(model)
    result = survival(model, dtype or state.dtype)
    if result.worst < least and not force:
        name = str(dtype or state.dtype).removeprefix("torch.")
        raise JobError(
            f"merging into {name} would round the tuning away: {result};\n"
            "merge with --dtype float32 (larger files, nothing lost), or --force"
        )
    fold_lora(model, state, dtype)
    restore(model)
    for module in model.modules():
        demote(module)
    for name, parameter in parameters(model).items():
        parameter.requires_grad_(False)
        if parameter.dtype.is_floating_point:
            parameter.data = parameter.data.to(dtype or state.origin.get(name, parameter.dtype))
    if hasattr(model, "config"):
        set_config_dtype(model.config, dtype or state.dtype)
    for key in ("_normtune", KEY):
        vars(model).pop(key, None)
    return result


def set_config_dtype(config: Any, dtype: torch.dtype) -> None:
    for part in (config, *(getattr(config, n, None) for n in ("text_config", "vision_config"))):
        if part is not None:
            part.dtype = dtype


def fold_lora(model: nn.Module, state: Tuning, dtype: torch.dtype | None) -> None:
    """W + alpha / r * B A into the layer's own weight, summed in fp32 and rounded once, layer by layer."""
    names = {id(p): name for name, p in parameters(model).items()}
    for layer in list(lora_layers(model, state)):
        weight = layer.base_layer.weight
        target = dtype or state.origin.get(names[id(weight)], weight.dtype)
        weight.data = (weight.data.float() + layer.get_delta_weight(LORA_NAME).float()).to(target)
    remove_lora(model, state)
