"""An adapter on disk: `adapter.safetensors`, `adapter.json`, and `lora/` where LoRA was trained. No pickle.

`adapter.safetensors` holds the trained tensors in fp32 under the names of the model's parameters, and the base's own
gains under `base.` and their names; `adapter.json` the record (format, strategy, parts, base, provenance); `lora/`
is in PEFT's format. Not here: what the tensors mean (arithmetic.py), a model (loading.py), PEFT's folders
(interchange.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from normtune.errors import InputError
from normtune.runlog import atomic_folder, read_json, write_json

FORMAT = 1
BASE = "base."
CONFIG = "adapter_config.json"  # PEFT's names of its two files
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # before every name in PEFT's files


@dataclass(frozen=True)
class Lora:
    """LoRA matrices under PEFT's names (`base_model.model.NAME.lora_A.weight`) and PEFT's configuration."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def adapter_folder(path: str | Path) -> Path:
    """The adapter of a run's folder; any other path is the adapter's own."""
    folder = Path(path)
    return folder / "adapter" if (folder / "recipe.yaml").is_file() else folder


def find_adapter(path: str | Path) -> Path:
    """As `adapter_folder`; raises InputError where no adapter is, ours or PEFT's: asked before a model is loaded."""
    folder = adapter_folder(path)
    if not any((folder / name).is_file() for name in ("adapter.json", CONFIG)):
        raise none_in(folder)
    return folder


def none_in(folder: Path) -> InputError:
    why = "adapter.json is missing" if folder.is_dir() else "no such folder"
    return InputError(f"no adapter in {folder} ({why}); give the folder of a finished run, or of an adapter")


def read_adapter(folder: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors (the base's under `base.`) and the record of an adapter folder.

    Raises:
        InputError: missing or damaged files, or a format of a newer version.
    """
    folder = Path(folder)
    if not (folder / "adapter.json").is_file():
        if (folder / CONFIG).is_file():
            raise InputError(f"{folder} is an adapter in PEFT's format; normtune.load_adapter puts it into a model")
        raise none_in(folder)
    record = read_json(folder / "adapter.json", "the adapter's record")
    if not isinstance(record, dict):
        raise InputError(f"{folder / 'adapter.json'} is damaged (no record in it); copy the adapter again")
    if record.get("format") != FORMAT:
        raise InputError(f"{folder} has adapter format {record.get('format')}, this version reads {FORMAT}")
    return read_tensors(folder / "adapter.safetensors"), record


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """A safetensors file of floating-point tensors.

    Raises:
        InputError: missing, damaged, or of integers.
    """
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise InputError(f"no {path.name} in {path.parent}; the adapter is incomplete") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged ({error}); copy it again") from None
    wrong = [name for name, tensor in tensors.items() if not tensor.dtype.is_floating_point]
    if wrong:
        raise InputError(f"{path}: {wrong[0]} is {tensors[wrong[0]].dtype}; an adapter holds floating-point tensors")
    return tensors


def read_lora(folder: Path) -> Lora:
    """Raises InputError where a file is missing or damaged."""
    return Lora(read_json(folder / CONFIG, "PEFT's configuration"), read_tensors(folder / WEIGHTS))


def write_adapter(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    record: dict[str, Any],
    lora: Lora | None = None,
    replace: bool = False,
) -> Path:
    """Writes an adapter folder, whole or not at all.

    Args:
        tensors: the trained ones, and the base's under `base.`.

    Raises:
        InputError: the folder exists and is not empty (unless `replace`).
        JobError: the disk is full.
    """
    with atomic_folder(folder, replace) as temporary:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            temporary / "adapter.safetensors",
            {"format": "pt", "normtune": str(FORMAT)},
        )
        write_json(temporary / "adapter.json", record)
        if lora is not None:
            (temporary / "lora").mkdir()
            write_peft(temporary / "lora", lora.config, lora.tensors)
    return folder


def write_peft(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """PEFT's two files in a folder that exists."""
    write_json(folder / CONFIG, config)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
