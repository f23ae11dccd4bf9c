"""The `lora` part: LoRA matrices beside linear layers of the blocks, through PEFT, in place.

Source: Hu et al., arXiv 2106.09685; PEFT's `inject_adapter_in_model`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from normtune.errors import InputError, did_you_mean
from normtune.strategy.state import Tuning, is_lora
from normtune.structure import PART_NAMES, Anatomy

LORA_NAME = "default"


def lora_targets(found: Anatomy, targets: list[str] | None) -> list[str]:
    """Names of the linear layers that LoRA adapts: all of the blocks, or those of `targets` (parts, regex:PATTERN).

    Raises:
        InputError: an unknown target, or one that holds no linear layer of the blocks.
    """
    if targets is None:
        return list(found.linears)
    if not targets:
        raise InputError("lora: an empty list of targets adapts nothing; leave out targets for all linear layers")
    chosen: dict[str, None] = {}
    for target in targets:
        if target.startswith("regex:"):
            try:
                pattern = re.compile(target.removeprefix("regex:"))
            except re.error as error:
                raise InputError(f"lora: target {target!r} is no regular expression: {error}") from None
            names = [name for name in found.linears if pattern.search(name)]
        elif target in PART_NAMES:
            roots = found.modules(target)
            names = [n for n in found.linears if any(n == root or n.startswith(root + ".") for root in roots)]
        else:
            raise InputError(
                f"lora: unknown target {target!r}{did_you_mean(target, PART_NAMES)}; give parts such as attn_q or "
                "mlp, or regex:PATTERN"
            )
        if not names:
            raise InputError(f"lora: target {target!r} holds no linear layer of the blocks; leave out targets for all")
        chosen.update(dict.fromkeys(names))
    return [name for name in found.linears if name in chosen]


def check_options(found: Anatomy, options: dict[str, Any]) -> None:
    """Raises InputError for options of LoRA that make no sense, and as `lora_targets`."""
    if not (isinstance(options["rank"], int) and options["rank"] > 0):
        raise InputError(f"lora: rank {options['rank']!r} is no positive number of dimensions; usual are 8 to 128")
    if not options["alpha"] > 0:
        raise InputError(f"lora: alpha {options['alpha']!r} is not positive, and the update would be nothing")
    if not 0 <= options["dropout"] < 1:
        raise InputError(f"lora: dropout {options['dropout']!r} is no probability below 1")
    lora_targets(found, options["targets"])


def is_trained(model: nn.Module) -> bool:
    """Whether a LoRA update is not zero: its matrices B start as zeros."""
    matrices = [p for name, p in model.named_parameters() if ".lora_B." in name and not p.is_meta]
    return any(bool(p.detach().any()) for p in matrices)


def add_lora(model: nn.Module, state: Tuning, options: dict[str, Any]) -> None:
    """Injects LoRA matrices (fp32) in place; identical ones that are there stay.

    Args:
        options: rank, alpha, dropout, seed (of the matrices A), and targets (None: every linear layer of the blocks).
    """
    if state.lora == options:
        return
    targets = lora_targets(state.anatomy, options.get("targets"))
    remove_lora(model, state)
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=options["rank"],
        lora_alpha=options["alpha"],
        lora_dropout=options["dropout"],
        target_modules=[str(number) for number in range(len(targets))],
        fan_in_fan_out=not isinstance(model.get_submodule(targets[0]), nn.Linear),  # GPT-2's transposed weights
        bias="none",
    )
    # In a box of their own: next to the model's config PEFT would choose other targets for some architectures.
    box = nn.ModuleDict({str(number): model.get_submodule(name) for number, name in enumerate(targets)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options["seed"])
        # matrices of a model on the meta device would be drawn on the CPU and then thrown away
        meta = next(box.parameters()).is_meta
        inject_adapter_in_model(config, box, adapter_name=LORA_NAME, low_cpu_mem_usage=meta)
    for name, layer in zip(targets, box.values(), strict=True):
        for key, parameter in layer.named_parameters():
            if is_lora("." + key):
                parameter.data = parameter.data.float()
        model.set_submodule(name, layer.train(model.training))  # PEFT's layers come in train mode, with dropout
    config.target_modules = set(targets)
    vars(model)["peft_config"] = {LORA_NAME: config}
    state.lora = options


def remove_lora(model: nn.Module, state: Tuning) -> None:
    """Takes the LoRA layers out again; their matrices are gone."""
    if state.lora is None:
        return
    from peft.tuners.lora import LoraLayer

    for name in state.anatomy.linears:
        layer = model.get_submodule(name)
        if isinstance(layer, LoraLayer):
            model.set_submodule(name, layer.base_layer)  # type: ignore[arg-type]
    vars(model).pop("peft_config", None)
    state.lora = None
