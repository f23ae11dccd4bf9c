"""Where an interrupted training goes on, and what it may go on with. Not here: how a run begins (starting.py)."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from normtune.checkpoint import (
    Position,
    finished_first_stage,
    list_checkpoints,
    load_parameters,
    read_state,
    read_tensors,
    tidy,
)
from normtune.errors import InputError
from normtune.recipe import recipe_hash, to_yaml
from normtune.runlog import write_text
from normtune.training.loop import Loop, apply_stage


def recover(loop: Loop, resume: bool, force: bool = False) -> tuple[int, int]:
    """(stage, step) to go on from: a checkpoint of this run, the first stage of `start_from`, or the start.

    The first process chooses: what others see of a shared folder may be older.

    Raises:
        InputError: a checkpoint that does not belong to this recipe and data (unless `force`, where it can be used), or
            that another process does not see.
    """
    main = loop.accelerator.is_main_process
    last = last_whole(loop) if resume and main else None
    (name,) = broadcast_object_list([last and last[1].name])
    if name is not None:
        path = loop.run.checkpoints / name
        position, path, tensors = last or (read_state(path)[0], path, read_tensors(path))
        check_fits(loop, position, path, force)
        stage = loop.recipe.stages[position.stage]
        if not position.finished or position.lora:
            apply_stage(loop, stage)
        load_parameters(loop.model, tensors, path)
        loop.tracker = position.tracker or loop.tracker
        loop.say(f"resuming after step {position.step} of {position.name}")
        return (position.stage + 1, 0) if position.finished else (position.stage, position.step)
    if resume:
        loop.say("no usable checkpoint: starting from the beginning")
    if loop.recipe.start_from is None:
        return 0, 0
    path = finished_first_stage(loop.recipe, Path(loop.recipe.start_from))
    if "lora" in loop.recipe.stages[0].strategy:
        apply_stage(loop, loop.recipe.stages[0])
    load_parameters(loop.model, read_tensors(path), path)
    loop.say(f"stage {loop.recipe.stages[0].name} taken from {path}")
    return 1, 0


def last_whole(loop: Loop) -> tuple[Position, Path, dict[str, torch.Tensor]] | None:
    """The last checkpoint that is what was written; those behind it are told of and passed over."""
    tidy(loop.run.folder)
    tidy(loop.run.checkpoints)
    found = list_checkpoints(loop.run.checkpoints, loop.say)
    while found:
        position, path = found.pop()
        try:
            return position, path, read_tensors(path)
        except InputError as error:
            loop.say(f"{str(error).splitlines()[0]}; {'going on from the one before' if found else 'it was the last'}")
    return None


def check_fits(loop: Loop, position: Position, path: Path, force: bool) -> None:
    """Refuses a checkpoint of another stage or of other data: the order of samples would not go on."""
    names = [stage.name for stage in loop.recipe.stages]
    if position.stage >= len(names) or names[position.stage] != position.name:
        raise InputError(
            f"{path} is of stage {position.name}, number {position.stage + 1}; the recipe has {', '.join(names)}\n"
            "Resume with the stages that the run was started with, or train into another folder (--out)."
        )
    mixture = loop.mixtures[position.stage]
    then, now = position.samples, len(mixture)
    same = then in (None, now) and position.data in (None, mixture.content)
    if not position.finished and not same and not force:
        how = "as many samples, but others" if then == now else f"{then} samples then, {now} now"
        raise InputError(
            f"the data of stage {position.name} has changed since {path}: {how}\n"
            "Put the files back, train into another folder (--out), or go on with what is there now (--force)."
        )
    if position.processes not in (None, loop.accelerator.num_processes):
        loop.say(
            f"{position.processes} processes then, {loop.accelerator.num_processes} now: "
            "results agree up to rounding, not bit for bit"
        )


def accept(loop: Loop, changed: dict[str, Any]) -> None:
    """From here on the run is one of the changed recipe; the log says what it was before."""
    if changed and loop.accelerator.is_main_process:
        loop.log({"event": "recipe", "changed": changed})
        write_text(loop.run.recipe, to_yaml(loop.recipe))
        loop.say(f"going on with another recipe: {', '.join(changed)}")


def open_trackers(loop: Loop) -> None:
    """Begins, or goes on with, what the recipe's trackers keep of this run."""
    recipe = loop.recipe
    if not recipe.trackers:
        return
    loop.tracker = loop.tracker or uuid.uuid4().hex[:12]
    config = {"recipe": recipe.name, "hash": recipe_hash(recipe), "seed": recipe.seed}
    options = {"wandb": {"id": loop.tracker, "resume": "allow"}} if "wandb" in recipe.trackers else {}
    loop.accelerator.init_trackers("normtune", config, init_kwargs=options)
