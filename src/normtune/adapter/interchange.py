"""PEFT's format: adapters that `peft.PeftModel.from_pretrained` loads, and LNTuning adapters that PEFT wrote.

PEFT's LNTuning replaces a module by a trained copy of the whole module, so that every tensor of a tuned module is
written, tuned or not. Norms are its target modules, other modules its `modules_to_save`. PEFT keeps the copies in the
dtype of the base: on a bf16 base it rounds the gains, on an fp32 base its logits are ours. Source: peft 0.21,
`tuners/ln_tuning`, `utils/save_and_load.py`.
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normtune.adapter.arithmetic import Adapter
from normtune.adapter.files import CONFIG, FORMAT, PREFIX, WEIGHTS, read_tensors, write_peft
from normtune.adapter.lora import lora_of
from normtune.errors import InputError
from normtune.layers import unwrapped
from normtune.runlog import atomic_folder, read_json
from normtune.strategy import GAIN_PARTS, parameters, plain, refuse_cast, tuning


def export_peft(model: nn.Module, folder: str | Path) -> Path:
    """Writes what was tuned as a folder that `peft.PeftModel.from_pretrained(base, folder)` loads.

    Without LoRA an LNTuning adapter of exactly the tuned modules, by their full names; with LoRA a LoRA adapter that
    holds the other tuned modules as `modules_to_save`. Tensors are fp32; PEFT casts them to the base's dtype.

    Raises:
        InputError: nothing was tuned, a parameter of the model itself was, a layer has LoRA and trained tensors of its
            own, or the folder exists.
        JobError: the disk is full, or the model was cast as a whole since it was tuned.
    """
    model = unwrapped(model)
    state = tuning(model)
    refuse_cast(model)
    if not state.tuned and state.lora is None:
        raise InputError("the model has no tuned tensors; call normtune.apply and train before exporting")
    owners = tuned_modules(model, state.tuned)
    norms = {root for part in GAIN_PARTS for root in state.anatomy.modules(part)}
    if state.lora is not None:
        lora, targets = lora_of(model), []
        config, tensors = lora.config, dict(lora.tensors)
        refuse_twice(owners, config["target_modules"])
    else:  # PEFT wants a target: where no norm is tuned, the first one as it is
        leaves = [name for name in owners if not any(True for _ in model.get_submodule(name).children())]
        targets = [name for name in leaves if name in norms] or state.anatomy.norms[:1]
        config, tensors = ln_tuning_config(targets), {}
    saved = [name for name in owners if name not in targets]
    for name in [*targets, *saved]:
        below = "ln_tuning_layers." if name in targets else ""
        for key, value in model.get_submodule(name).state_dict().items():
            value = value.float() if value.is_floating_point() else value
            tensors[f"{PREFIX}{name}.{below}{plain(key)}"] = value.detach().to("cpu", copy=True)
    source = getattr(getattr(model, "config", None), "_name_or_path", None)
    config = {**config, "inference_mode": True, "modules_to_save": saved or None, "base_model_name_or_path": source}
    with atomic_folder(Path(folder)) as temporary:
        write_peft(temporary, config, tensors)
    return Path(folder)


def refuse_twice(owners: list[str], adapted: list[str]) -> None:
    """Raises InputError where a layer has LoRA and trained tensors of its own: PEFT cannot hold both."""
    both = [name for name in adapted if any(name == owner or name.startswith(owner + ".") for owner in owners)]
    if both:
        raise InputError(
            f"PEFT cannot hold LoRA and trained tensors of the same layer ({both[0]} has both);\n"
            "export --format transformers (normtune.merge) holds everything"
        )


def ln_tuning_config(targets: list[str]) -> dict[str, Any]:
    from peft import LNTuningConfig

    return LNTuningConfig(target_modules=targets).to_dict()


def tuned_modules(model: nn.Module, tuned: list[str]) -> list[str]:
    """Names of the modules that hold tuned parameters, under every name of a tied one, none inside another.

    Raises:
        InputError: a parameter of the model itself.
    """
    wanted = {id(parameter) for name, parameter in parameters(model).items() if name in tuned}
    every = model.named_parameters(remove_duplicate=False)
    owners = dict.fromkeys(plain(name).rpartition(".")[0] for name, parameter in every if id(parameter) in wanted)
    if "" in owners:
        raise InputError("PEFT cannot hold a parameter of the model itself; use normtune.save_adapter")
    return [name for name in owners if not any(name.startswith(other + ".") for other in owners)]


def is_peft(folder: Path) -> bool:
    """Whether a folder is an adapter in PEFT's format and not one of ours."""
    return (folder / CONFIG).is_file() and not (folder / "adapter.json").is_file()


def read_peft(folder: Path, model: nn.Module) -> Adapter:
    """An LNTuning adapter of PEFT for `model`; it does not hold the base's gains.

    Raises:
        InputError: another method than LNTuning, no safetensors, damaged files, names that the model lacks, or a tied
            tensor that was trained to two values.
    """
    config = read_json(folder / CONFIG, "PEFT's configuration")
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LN_TUNING":
        raise InputError(
            f"{folder} is a PEFT adapter of type {kind}; normtune reads LN_TUNING only:\n"
            "load it with peft.PeftModel.from_pretrained"
        )
    if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise InputError(f"{folder} holds a pickle (adapter_model.bin); save it again with safe_serialization=True")
    first = {id(parameter): name for name, parameter in parameters(model).items()}
    names = {plain(name): first[id(p)] for name, p in model.named_parameters(remove_duplicate=False) if id(p) in first}
    buffers = {name for name, _ in model.named_buffers()}
    tensors: dict[str, torch.Tensor] = {}
    for key, value in read_tensors(folder / WEIGHTS).items():
        name = own_name(key, names)
        if ".base_layer." in key or name in buffers:  # copies of the base that PEFT adds
            continue
        name = names.get(name, name)
        if name in tensors and not torch.equal(tensors[name], value.float()):
            raise InputError(f"{folder}: {name} is tied in this model and was trained to two values; untie the base")
        tensors[name] = value.float()
    record = {"format": FORMAT, "strategy": None, "parts": [], "lora": None, "peft": config}
    return Adapter(tensors, record=record)


def own_name(key: str, known: Container[str]) -> str:
    """The parameter's name; PEFT leaves the adapter's name before tensors of a module that has children."""
    module, _, rest = key.removeprefix(PREFIX).partition(".ln_tuning_layers.")
    if f"{module}.{rest}" not in known and "." in rest:
        rest = rest.partition(".")[2]
    return f"{module}.{rest}" if rest else module
