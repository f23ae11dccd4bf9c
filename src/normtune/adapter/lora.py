"""The LoRA of an adapter: out of a model, into one, checked before. Not here: the layers (strategy/lora.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from normtune.adapter.files import PREFIX, Lora
from normtune.errors import InputError
from normtune.kernels import is_quantized
from normtune.strategy import LORA_NAME, Tuning, add_lora, is_lora, parameters, remove_lora, tuning
from normtune.strategy.lora import lora_targets


def put_lora(model: nn.Module, state: Tuning, wanted: tuple[dict[str, Any], Lora] | None) -> None:
    """LoRA layers with these options and matrices, or none."""
    if wanted is None:
        remove_lora(model, state)
        return
    options, lora = wanted
    add_lora(model, state, dict(options))
    for key, parameter in lora_parameters(model).items():
        with torch.no_grad():
            parameter.copy_(lora.tensors[key])


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """LoRA's matrices by the names that they have in PEFT's files."""
    return {PREFIX + n.replace(f".{LORA_NAME}.", "."): p for n, p in model.named_parameters() if is_lora(n)}


def lora_of(model: nn.Module) -> Lora:
    config = vars(model)["peft_config"][LORA_NAME].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return Lora(config, {k: p.detach().to("cpu", copy=True) for k, p in lora_parameters(model).items()})


def check_lora(model: nn.Module, options: dict[str, Any], lora: Lora, folder: Path) -> None:
    """Raises InputError, naming the first layer whose LoRA is not whole or not of this model."""
    if not isinstance(options, dict) or not {"rank", "alpha", "dropout", "seed"} <= options.keys():
        raise InputError(f"{folder / 'adapter.json'} is damaged (options of lora); copy the adapter again")
    present, wanted = parameters(model), lora_targets(tuning(model).anatomy, options.get("targets"))
    for name in {**dict.fromkeys(wanted), **dict.fromkeys(lora_layers(lora))}:
        a, b = (lora.tensors.get(f"{PREFIX}{name}.lora_{side}.weight") for side in "AB")
        weight = present.get(f"{name}.weight")
        if a is None or b is None or weight is None or name not in wanted:
            raise InputError(f"{folder}: LoRA of {name} is missing in the adapter or in this model; give its base")
        if not is_quantized(weight) and {a.shape[1], b.shape[0]} != set(weight.shape):
            raise InputError(f"{folder}: LoRA of {name} does not fit this model (weight {tuple(weight.shape)})")


def lora_layers(lora: Lora) -> list[str]:
    return [key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in lora.tensors]
