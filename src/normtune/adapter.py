"""Adapters: the trained tensors of a model, with the identity of the base that they belong to.

Scope: save, load, remove, merge; verification of the base by its own gains; what survives rounding.
On disk: `adapter.safetensors` (trained tensors fp32; the base's gains under `base.`), `adapter.json`, and `lora/` in
PEFT's format where LoRA was trained. No pickle. Not here: training state (training.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from normtune.errors import InputError, JobError
from normtune.kernels import demote
from normtune.runlog import atomic_folder, provenance, read_json, write_json
from normtune.strategy import (
    LORA_NAME,
    Tuning,
    add_lora,
    base_gains,
    hold_base,
    is_lora,
    mark_tuned,
    match_precision,
    parameters,
    remove_lora,
    settle,
    tuning,
)

FORMAT = 1
BASE = "base."


@dataclass(frozen=True)
class Survival:
    """What rounding leaves of a tuning.

    Attributes:
        gains: number of gains that differ from the base's in fp32.
        differing: share of them that still differ from the base after rounding, 0 to 1.
        survived: 1 - |rounded - tuned| / |tuned - base| over all gains, not below 0.
    """

    gains: int
    differing: float
    survived: float

    @property
    def worst(self) -> float:
        return min(self.differing, self.survived)

    def __str__(self) -> str:
        return (
            f"{self.differing:.1%} of {self.gains} tuned gains still differ, {self.survived:.1%} of the change survives"
        )


def save_adapter(model: nn.Module, folder: str | Path, **facts: Any) -> Path:
    """Writes the trained tensors of `model` (whole or not at all); `facts` (base, recipe hash, ...) go into the JSON.

    Raises:
        InputError: nothing was tuned, or the folder exists.
        JobError: the disk is full.
    """
    state = tuning(model)
    present = parameters(model)
    names = [n for n in state.tuned if n in present]
    if not names and state.lora is None:
        raise InputError("the model has no tuned tensors; call normtune.apply and train before saving an adapter")
    tensors = {n: present[n].detach().float().cpu().contiguous() for n in names}
    tensors.update({BASE + n: t.contiguous() for n, t in base_gains(model).items()})
    report = state.report
    record = {
        "format": FORMAT,
        "strategy": report.strategy if report else None,
        "parts": list(report.parts) if report else [],
        "parameters": sum(present[n].numel() for n in names),
        "lora": state.lora,
        "dtype": str(state.dtype).removeprefix("torch."),
        **facts,
        "provenance": provenance(),
    }
    with atomic_folder(Path(folder)) as temporary:
        save_file(tensors, temporary / "adapter.safetensors", {"format": "pt", "normtune": str(FORMAT)})
        write_json(temporary / "adapter.json", record)
        if state.lora is not None:
            save_lora(model, temporary / "lora")
    return Path(folder)


def save_lora(model: nn.Module, folder: Path) -> None:
    from peft import get_peft_model_state_dict

    folder.mkdir()
    config: Any = vars(model)["peft_config"][LORA_NAME]
    config.save_pretrained(folder)
    tensors = get_peft_model_state_dict(model, adapter_name=LORA_NAME)
    save_file(
        {f"base_model.model.{n}": t.contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors"
    )


def read_adapter(folder: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the record of an adapter folder.

    Raises:
        InputError: missing or damaged files, or a format of a newer version.
    """
    folder = Path(folder)
    if not (folder / "adapter.json").is_file():
        raise InputError(f"no adapter in {folder} (adapter.json is missing); give the adapter folder of a finished run")
    record = read_json(folder / "adapter.json", "the adapter's record")
    if record.get("format") != FORMAT:
        raise InputError(f"{folder} has adapter format {record.get('format')}, this version reads {FORMAT}")
    try:
        return load_file(folder / "adapter.safetensors"), record
    except FileNotFoundError:
        raise InputError(f"no adapter.safetensors in {folder}; the adapter is incomplete") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder / 'adapter.safetensors'} is damaged ({error}); copy it again") from None


def load_adapter(model: nn.Module, folder: str | Path, *, force: bool = False) -> dict[str, Any]:
    """Puts an adapter's tensors into `model` (frozen, fp32, in place of the base's); returns its record.

    Raises:
        InputError: no adapter, a model whose own gains are not those that the adapter was trained on (unless
            `force`), or tensors that do not fit.
    """
    tensors, record = read_adapter(folder)
    state = tuning(model)
    verify_base(model, tensors, Path(folder), force)
    values = {n: t for n, t in tensors.items() if not n.startswith(BASE)}
    present = parameters(model)
    for name, value in values.items():
        if name not in present or present[name].shape != value.shape:
            there = tuple(present[name].shape) if name in present else "nothing"
            raise InputError(
                f"{folder}: tensor {name} {tuple(value.shape)} does not fit this model ({there} there); "
                "load the adapter onto the base that it was trained on"
            )
    remove_adapter(model)
    settle(model)
    originals = {n: present[n].detach().cpu().clone() for n in values}
    put_tensors(model, state, values)
    if record.get("lora"):
        load_lora(model, state, record["lora"], Path(folder) / "lora")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    vars(model)["_normtune_originals"] = originals
    return record


def put_tensors(model: nn.Module, state: Tuning, values: Mapping[str, torch.Tensor]) -> None:
    """Copies fp32 values into parameters, which become fp32 and count as tuned."""
    hold_base(model, values)
    for name, parameter in parameters(model).items():
        if name in values:
            if parameter.dtype != torch.float32:
                state.origin[name] = parameter.dtype
            with torch.no_grad():
                parameter.data = parameter.data.float()
                parameter.copy_(values[name])
    mark_tuned(model, values)
    match_precision(model, state)


def verify_base(model: nn.Module, tensors: Mapping[str, torch.Tensor], folder: Path, force: bool) -> None:
    """Refuses a base whose gains are not those under `base.`."""
    stored = {n.removeprefix(BASE): t for n, t in tensors.items() if n.startswith(BASE)}
    if force:
        return
    own = base_gains(model)
    if not own.keys() <= stored.keys():
        odd = sorted(stored.keys() ^ own.keys())[0]
        raise InputError(
            f"{folder} belongs to another base: {odd} is not in both models; give the base it was trained on"
        )
    # a bf16 or fp16 copy of the same base is the same base
    wrong = [n for n, t in stored.items() if n in own and (t.shape != own[n].shape or far(t, own[n]))]
    if wrong:
        raise InputError(
            f"{folder} belongs to another base: {len(wrong)} of {len(stored)} norms differ, first {wrong[0]};\n"
            "give the base it was trained on, or force loading (--force)"
        )


def far(a: torch.Tensor, b: torch.Tensor) -> bool:
    return not torch.allclose(a, b, rtol=2**-7, atol=1e-6)


def load_lora(model: nn.Module, state: Tuning, options: dict[str, Any], folder: Path) -> None:
    add_lora(model, state, options)
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{folder} is incomplete or damaged ({error}); copy the adapter again") from None
    for name, parameter in model.named_parameters():
        if is_lora(name):
            key = "base_model.model." + name.replace(f".{LORA_NAME}.", ".")
            if key not in tensors:
                raise InputError(f"{folder}: no tensor {key}; the adapter does not fit this model")
            with torch.no_grad():
                parameter.copy_(tensors[key])
            parameter.requires_grad_(False)


def remove_adapter(model: nn.Module) -> None:
    """Gives the base back as it was before `load_adapter`; nothing happens where none was loaded."""
    originals = vars(model).pop("_normtune_originals", None)
    if originals is None:
        return
    state = tuning(model)
    remove_lora(model, state)
    for name, parameter in parameters(model).items():
        if name in originals:
            parameter.data = originals[name].to(parameter.device)
            state.origin.pop(name, None)
            state.base.pop(name, None)
    state.tuned = [n for n in state.tuned if n not in originals]
    match_precision(model, state)


def survival(model: nn.Module, dtype: torch.dtype) -> Survival:
    """What of the tuned gains would be left after rounding to `dtype`."""
    state = tuning(model)
    present, gains = parameters(model), base_gains(model)
    tuned = [n for n in state.tuned if n in gains]
    moved = kept = 0
    lost_square = change_square = 0.0
    for name in tuned:
        base = gains[name].double()
        gain = present[name].detach().cpu().double()
        rounded = present[name].detach().cpu().to(dtype).double()
        moved += int((gain != base).sum())
        kept += int(((gain != base) & (rounded != base.to(dtype).double())).sum())
        lost_square += float((rounded - gain).square().sum())
        change_square += float((gain - base).square().sum())
    if moved == 0:
        return Survival(0, 1.0, 1.0)
    return Survival(moved, kept / moved, max(0.0, 1 - (lost_square / change_square) ** 0.5))


def merge(model: nn.Module, dtype: torch.dtype | None = None, *, force: bool = False, least: float = 0.9) -> Survival:
    """Makes `model` a plain transformers model again: tuned tensors in the base's dtype, LoRA folded in.

    Args:
        dtype: of the merged floating-point weights (default: the base's).
        least: smallest share of the tuning that must survive rounding.

    Raises:
        JobError: less than `least` survives, and `force` is not set; the model is unchanged.
    """
    state = tuning(model)
    dtype = dtype or state.dtype
    result = survival(model, dtype)
    if result.worst < least and not force:
        name = str(dtype).removeprefix("torch.")
        raise JobError(
            f"merging into {name} would round the tuning away: {result};\n"
            "merge with --dtype float32 (larger files, nothing lost), or --force"
        )
    if state.lora is not None:
        fold_lora(model, state, dtype)
    for module in model.modules():
        demote(module)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dtype.is_floating_point:
            parameter.data = parameter.data.to(dtype)
    if hasattr(model, "config"):
        set_config_dtype(model.config, dtype)
    for key in ("_normtune", "_normtune_originals"):
        vars(model).pop(key, None)
    return result


def set_config_dtype(config: Any, dtype: torch.dtype) -> None:
    for part in (config, *(getattr(config, n, None) for n in ("text_config", "vision_config"))):
        if part is not None:
            part.dtype = dtype


def fold_lora(model: nn.Module, state: Tuning, dtype: torch.dtype) -> None:
    """W + alpha / r * B A into the layer's own weight of `dtype`, by PEFT."""
    from peft.tuners.lora import LoraLayer

    for name in state.anatomy.linears:
        layer = model.get_submodule(name)
        if isinstance(layer, LoraLayer):
            for parameter in layer.base_layer.parameters():  # type: ignore[union-attr]
                parameter.data = parameter.data.to(dtype)
            layer.merge()  # type: ignore[operator]
    remove_lora(model, state)
