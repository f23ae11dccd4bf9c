"""Checkpoints of a training: complete or absent, verified before use, without pickle, never the frozen base.

On disk `checkpoints/STAGE-STEP/`: `tensors.safetensors` (tuned parameters under `p.`, AdamW's moments under `m.` and
`v.`, its steps under `s.`) and `state.json`: where the training stands, the SHA-256 of each file and of itself. No
random state: dropout and the order of the data are drawn from (seed, stage, step, process). Not here: when to write
one, and in which thread (training/).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
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
from normtune.runlog import Run, atomic_folder, file_hash, read_json, write_json
from normtune.strategy import is_lora, plain, tuning

FORMAT = 3
EARLIER = 2  # without checksums
STATE, TENSORS = "state.json", "tensors.safetensors"

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
    total: int | None = None  # steps of the stage, over which its schedule runs
    samples: int | None = None  # of the stage's data
    data: str | None = None  # `Mixture.content` of it
    processes: int | None = None
    tracker: str | None = None  # id under which an outside tracker knows the run

    @property
    def order(self) -> tuple[int, int, bool]:
        return self.stage, self.step, self.finished


def copy_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Copies in memory of what a checkpoint holds; later steps do not change them."""
    state = tuning(model)
    tensors: dict[str, torch.Tensor] = {}

    def keep(name: str, tensor: torch.Tensor) -> None:
        tensors[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)

    for name, parameter in model.named_parameters():
        if plain(name) in state.tuned or parameter.requires_grad:
            keep("p." + plain(name), parameter)
        moments = optimizer.state.get(parameter)
        if moments and "exp_avg" in moments:
            keep("m." + plain(name), moments["exp_avg"])
            keep("v." + plain(name), moments["exp_avg_sq"])
            keep("s." + plain(name), moments["step"].reshape(1))
    return tensors


def write_checkpoint(folder: Path, tensors: dict[str, torch.Tensor], position: Position) -> Path:
    """Writes `folder/NAME-STEP`; returns its path.

    Raises:
        JobError: the disk is full; nothing half-written stays. InputError: the folder cannot be written.
    """
    path = folder / f"{position.name}-{position.step}"
    with atomic_folder(path, replace=True) as temporary:
        save_file(tensors, temporary / TENSORS)
        record = {"format": FORMAT, **asdict(position), "files": {TENSORS: file_hash(temporary / TENSORS)}}
        write_json(temporary / STATE, {**record, "sha256": seal(record)})
    return path


def seal(record: dict[str, Any]) -> str:
    """SHA-256 of a record, in hex."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def read_state(path: Path) -> tuple[Position, dict[str, str]]:
    """Where the training stood at a checkpoint, and the SHA-256 of each of its files.

    Raises:
        InputError: no checkpoint, one of another format, or a damaged one.
    """
    record = read_json(path / STATE, "checkpoint")
    if not isinstance(record, dict) or record.get("format") not in (EARLIER, FORMAT):
        raise damaged(path, f"{STATE} is of no known format")
    if record["format"] == FORMAT and record.pop("sha256", None) != seal(record):
        raise damaged(path, f"{STATE} is not what was written")
    del record["format"]
    files = record.pop("files", {})
    try:
        return Position(**record), files
    except TypeError:
        raise damaged(path, f"{STATE} lacks an entry") from None


def damaged(path: Path, why: str) -> InputError:
    return InputError(f"checkpoint {path} is damaged ({why})\nResume its training: it goes on from the one before.")


def list_checkpoints(folder: Path, tell: Callable[[str], None] | None = None) -> list[tuple[Position, Path]]:
    """Checkpoints in the order of training; `tell` is told of each whose state is damaged, and left out.

    Their tensors are verified when they are read.
    """
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(".") or not path.is_dir():
            continue
        try:
            found.append((read_state(path)[0], path))
        except InputError as error:
            if tell is not None:
                tell(str(error).splitlines()[0])
    return sorted(found, key=lambda item: item[0].order)


def prune(folder: Path, position: Position, keep: int) -> None:
    """Removes all but the last `keep` checkpoints of a stage up to `position`; the finished one always stays.

    Those behind `position` go: the training went on from before them, since they were damaged.
    """
    found = list_checkpoints(folder)
    stale = [path for other, path in found if other.order > position.order]
    of_stage = [(other, path) for other, path in found if other.name == position.name and other.order <= position.order]
    for path in stale + [path for other, path in of_stage[:-keep] if not other.finished]:
        shutil.rmtree(path, ignore_errors=True)


def tidy(folder: Path) -> None:
    """Removes what a killed process left of `atomic_folder`; puts back what it was about to replace."""
    for path in folder.glob(".*.old") if folder.is_dir() else ():
        whole = folder / path.name[1:].rsplit(".", 2)[0]
        if (path / "was").exists() and not whole.exists():
            os.replace(path / "was", whole)
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".*.part") if folder.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Raises InputError where the file is missing or not what was written."""
    _, files = read_state(path)
    try:
        for name, digest in files.items():
            if file_hash(path / name) != digest:
                raise damaged(path, f"{name} is not what was written")
        return load_file(path / TENSORS)
    except (SafetensorError, OSError) as error:
        raise damaged(path, str(error)) from None


def load_parameters(model: nn.Module, tensors: dict[str, torch.Tensor], where: Path) -> None:
    """Puts the tuned tensors of a checkpoint into `model`, LoRA matrices included if the model has them.

    One that holds the model's own values was not changed by its training, and does not count as tuned here either.

    Raises:
        InputError: a tensor that the model lacks or whose shape differs.
    """
    values = {n.removeprefix("p."): t for n, t in tensors.items() if n.startswith("p.")}
    present = {plain(name): p for name, p in model.named_parameters()}
    for name, value in values.items():
        if name not in present or present[name].shape != value.shape:
            raise InputError(f"{where}: tensor {name} does not fit the model of this recipe; was the recipe changed?")
    changed = {n: t for n, t in values.items() if not is_lora(n) and not same_bits(present[n], t)}
    put_tensors(model, tuning(model), changed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_lora(name) and name in values:
                parameter.copy_(values[name])


def same_bits(parameter: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a parameter, as fp32, is `value` (fp32, on the CPU) to the bit."""
    own = parameter.detach().to("cpu", torch.float32).contiguous()
    return torch.equal(own.view(torch.int32), value.view(torch.int32))


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """AdamW's moments and counts of steps, as they were."""
    for name, parameter in model.named_parameters():
        if "m." + plain(name) in tensors and parameter.requires_grad:
            optimizer.state[parameter] = {
                "step": tensors["s." + plain(name)].reshape(()).to(parameter.device),  # where fused AdamW wants it
                "exp_avg": tensors["m." + plain(name)].to(parameter.device),
                "exp_avg_sq": tensors["v." + plain(name)].to(parameter.device),
            }


def check_same(recipe: Recipe, run: Run, force: bool = False) -> dict[str, Any]:
    """What differs between the recipe of a run and `recipe`: key -> [then, now]; harmless keys left out.

    Raises:
        InputError: anything differs (unless `force`), naming the first keys.
    """
    before = flatten(load_recipe(run.recipe).model_dump(mode="json"))
    now = flatten(recipe.model_dump(mode="json"))
    differing = (k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    keys = sorted(k for k in differing if k.partition(".")[0] not in HARMLESS)
    if keys and not force:
        shown = ", ".join(f"{k} ({before.get(k)!r} then, {now.get(k)!r} now)" for k in keys[:3])
        raise InputError(
            f"{run.folder} was started with another recipe: {shown}{' ...' if len(keys) > 3 else ''};\n"
            "resume with the same values, train into another folder (--out), or go on with these (--force)"
        )
    return {key: [before.get(key), now.get(key)] for key in keys}


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
    if weights_of(earlier) != weights_of(recipe):
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


def weights_of(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says of its model that decides the weights."""
    return recipe.model.model_dump(exclude={"shard", "trust_remote_code"})
