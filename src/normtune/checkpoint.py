"""Checkpoints of a training: complete or absent, without pickle, never the frozen base.

On disk `checkpoints/STAGE-STEP/`: `tensors.safetensors` (tuned parameters under `p.`, AdamW's moments under `m.` and
`v.`, its steps under `s.`) and `state.json`. Not here: when to write one (training/).
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from normtune.adapter import put_tensors
from normtune.errors import InputError
from normtune.recipe import Recipe, load_recipe
from normtune.runlog import Run, atomic_folder, read_json, write_json
from normtune.strategy import is_lora, plain, tuning

FORMAT = 2

HARMLESS = frozenset(
    ("keep", "save_every", "threads", "device", "trackers", "bad_samples", "max_bad", "on_nonfinite", "watchdog")
)
"""Keys of a recipe that may change on a resume: none of them alters what a sound step computes."""


@dataclass(frozen=True)
class Position:
    """Where a training stands: `step` optimizer steps of stage number `stage` (named `name`) are done."""

    stage: int
    name: str
    step: int
    finished: bool  # the stage is complete
    lora: dict[str, Any] | None = None

    @property
    def order(self) -> tuple[int, int, bool]:
        return self.stage, self.step, self.finished


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, position: Position) -> Path:
    """Writes `folder/NAME-STEP`; returns its path.

    Raises:
        JobError: the disk is full; nothing half-written stays.
    """
    state = tuning(model)
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if plain(name) in state.tuned or parameter.requires_grad:
            tensors["p." + plain(name)] = parameter.detach().cpu().contiguous()
        moments = optimizer.state.get(parameter)
        if moments and "exp_avg" in moments:
            tensors["m." + plain(name)] = moments["exp_avg"].detach().cpu().contiguous()
            tensors["v." + plain(name)] = moments["exp_avg_sq"].detach().cpu().contiguous()
            tensors["s." + plain(name)] = moments["step"].detach().cpu().reshape(1)
    path = folder / f"{position.name}-{position.step}"
    with atomic_folder(path, replace=True) as temporary:
        save_file(tensors, temporary / "tensors.safetensors")
        write_json(temporary / "state.json", {"format": FORMAT, **asdict(position)})
    return path


def list_checkpoints(folder: Path) -> list[tuple[Position, Path]]:
    """Usable checkpoints in the order of training; damaged ones are left out."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(InputError, TypeError):
            record = read_json(path / "state.json", "checkpoint")
            if record.pop("format", None) == FORMAT and (path / "tensors.safetensors").is_file():
                found.append((Position(**record), path))
    return sorted(found, key=lambda item: item[0].order)


def prune(folder: Path, name: str, keep: int) -> None:
    """Removes all but the last `keep` checkpoints of a stage; the finished one always stays."""
    of_stage = [(position, path) for position, path in list_checkpoints(folder) if position.name == name]
    for position, path in of_stage[:-keep]:
        if not position.finished:
            shutil.rmtree(path, ignore_errors=True)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Raises InputError where the file is missing or damaged."""
    try:
        return load_file(path / "tensors.safetensors")
    except (SafetensorError, OSError) as error:
        raise InputError(f"checkpoint {path} is damaged ({error}); remove it and resume from the one before") from None


def load_parameters(model: nn.Module, tensors: dict[str, torch.Tensor], where: Path) -> None:
    """Puts the tuned tensors of a checkpoint into `model`, LoRA matrices included if the model has them.

    Raises:
        InputError: a tensor that the model lacks or whose shape differs.
    """
    values = {n.removeprefix("p."): t for n, t in tensors.items() if n.startswith("p.")}
    present = {plain(name): p for name, p in model.named_parameters()}
    for name, value in values.items():
        if name not in present or present[name].shape != value.shape:
            raise InputError(f"{where}: tensor {name} does not fit the model of this recipe; was the recipe changed?")
    put_tensors(model, tuning(model), {n: t for n, t in values.items() if not is_lora(n)})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_lora(name) and name in values:
                parameter.copy_(values[name])


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """AdamW's moments and counts of steps, as they were."""
    for name, parameter in model.named_parameters():
        if "m." + plain(name) in tensors and parameter.requires_grad:
            optimizer.state[parameter] = {
                "step": tensors["s." + plain(name)].reshape(()).to(parameter.device),  # where fused AdamW wants it
                "exp_avg": tensors["m." + plain(name)].to(parameter.device),
                "exp_avg_sq": tensors["v." + plain(name)].to(parameter.device),
            }


def check_same(recipe: Recipe, run: Run) -> None:
    """Refuses to resume under another recipe, naming the first keys that differ."""
    before = flatten(load_recipe(run.recipe).model_dump(mode="json"))
    now = flatten(recipe.model_dump(mode="json"))
    differing = (k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    keys = sorted(k for k in differing if k.partition(".")[0] not in HARMLESS)
    if keys:
        shown = ", ".join(f"{k} ({before.get(k)!r} then, {now.get(k)!r} now)" for k in keys[:3])
        raise InputError(
            f"{run.folder} was started with another recipe: {shown}{' ...' if len(keys) > 3 else ''};\n"
            "resume with the same values, or train into another folder (--out)"
        )


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(data, dict | list) and data:
        items = data.items() if isinstance(data, dict) else enumerate(data)
        return {
            k: v for key, value in items for k, v in flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: data}


def finished_first_stage(recipe: Recipe, folder: Path) -> Path:
    """The checkpoint that ends the first stage of an earlier run of the same model.

    Raises:
        InputError: no such run, another model, or a stage that is not finished.
    """
    if not (folder / "recipe.yaml").is_file():
        raise InputError(f"start_from: no run at {folder}; give the folder of a finished run")
    earlier = load_recipe(folder / "recipe.yaml")
    if earlier.model != recipe.model:
        raise InputError(
            f"start_from: {folder} was trained on another model; use the same model section, or start anew"
        )
    name = earlier.stages[0].name
    if name != recipe.stages[0].name:
        raise InputError(f"start_from: the first stage of {folder} is {name}, here it is {recipe.stages[0].name}")
    if len(recipe.stages) < 2:
        raise InputError("start_from reuses the first stage, and this recipe has no other; add a stage")
    for position, path in reversed(list_checkpoints(folder / "checkpoints")):
        if position.stage == 0 and position.finished:
            return path
    raise InputError(f"start_from: stage {name} of {folder} is not finished; resume that run first")
