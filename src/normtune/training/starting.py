"""How a run begins: everything is checked before anything is written. Not here: where one goes on (resuming.py)."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator

from normtune.checkpoint import finished_first_stage
from normtune.data import Mixture
from normtune.data.skipping import Skipped
from normtune.errors import InputError
from normtune.features import prepare_features
from normtune.progress import say
from normtune.recipe import Recipe, to_yaml
from normtune.runlog import Run, write_text
from normtune.sharding import join, shard
from normtune.step import check_rates
from normtune.strategy import check
from normtune.training.batching import choose_packing
from normtune.training.loop import Loop
from normtune.tuned import attach_encoder, build, move


def check_lora_order(recipe: Recipe) -> None:
    """A later stage without LoRA, or with other options of it, would throw an earlier stage's LoRA away."""
    uses = ["lora" in stage.strategy for stage in recipe.stages]
    for before, (has, following) in enumerate(itertools.pairwise(uses)):
        if has and not following:
            names = recipe.stages[before].name, recipe.stages[before + 1].name
            raise InputError(f"stage {names[0]} trains lora and {names[1]} does not: lora must stay to the last stage")
        if has and recipe.stages[before].lora != recipe.stages[before + 1].lora:
            raise InputError("two stages train lora with different options: give both the same rank, alpha and dropout")


def start(recipe: Recipe, run: Run, resume: bool, quiet: bool) -> Loop:
    """Device, data check, model and run folder; nothing is written before all input has proved usable."""
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    accelerator = make_accelerator(recipe, run)
    if not resume:
        Run.refuse_existing(run.folder)
    torch.manual_seed(recipe.seed)
    skipped = Skipped(recipe.max_bad) if recipe.bad_samples == "skip" else None
    with first_of_node(accelerator):  # an index that is not there yet is written once
        mixtures = [Mixture(stage.data, skipped) for stage in recipe.stages]
    if skipped is not None:
        skipped.count(sum(map(len, mixtures)))
    prepared = prepare_features(recipe, mixtures, quiet=quiet, skip=skipped is not None)
    accelerator.wait_for_everyone()  # all look at what is stored before one of them adds to it
    looks = any(stage.evaluate_every for stage in recipe.stages)  # an evaluation on the way needs the encoder
    model, processor = build(recipe.model, recipe.seed, prepared.known if prepared and not looks else None)
    trained = []  # in any stage
    for stage in recipe.stages:
        parts = check(model, stage.strategy, stage.lora.targets)
        check_rates(stage, parts)
        trained += [parameter for part in parts.values() for parameter in part]
        if any(parameter.is_meta for part in parts.values() for parameter in part):
            attach_encoder(model, recipe.model)  # left out since features are stored, but trained in a later stage
    if recipe.start_from is not None:
        finished_first_stage(recipe, Path(recipe.start_from))
    if recipe.model.shard and accelerator.num_processes > 1:
        shard(model, accelerator.device, trained)
    else:
        move(model, accelerator.device)
    for stage in recipe.stages:
        if stage.packing is True:  # to be told now, not after the first stage
            choose_packing(model, stage, accelerator.device)
    if prepared is not None:
        prepared.check(model)
        at, of = accelerator.process_index, accelerator.num_processes
        prepared.fill(model, processor, rank=at, ranks=of, quiet=quiet)
    if accelerator.is_main_process and not run.recipe.is_file():
        if resume:
            say(f"no run to resume in {run.folder}: starting from the beginning")
        if resume and run.folder.is_dir():  # a scheduler's files may be there
            write_text(run.recipe, to_yaml(recipe))
        else:
            Run.create(run.folder, to_yaml(recipe))
    accelerator.wait_for_everyone()
    if skipped is not None:  # a file for each process; what all have found in the files stands in the first one's
        at = accelerator.process_index
        with accelerator.main_process_first():
            skipped.keep(run.folder / (f"skipped.{at}.jsonl" if at else "skipped.jsonl"))
    return Loop(recipe, run, accelerator, model, processor, mixtures, quiet, prepared, skipped)


@contextmanager
def first_of_node(accelerator: Accelerator) -> Iterator[None]:
    """The first process of each machine goes first; the others follow even where it fails, with their own error."""
    if not accelerator.is_local_main_process:
        accelerator.wait_for_everyone()
    try:
        yield
    finally:
        if accelerator.is_local_main_process:
            accelerator.wait_for_everyone()


def restarted() -> bool:
    """Whether torchrun has started this process again after a failure (`--max-restarts`): it goes on, unasked."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def make_accelerator(recipe: Recipe, run: Run) -> Accelerator:
    kind, _, number = recipe.device.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda, but torch finds no CUDA device; use device: auto or cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise InputError("device: mps, but torch finds no MPS device; use device: auto or cpu")
    if number:
        torch.cuda.set_device(int(number))
    for tracker in recipe.trackers:
        try:
            __import__(tracker)
        except ImportError:
            raise InputError(f"trackers: {tracker} is not installed; pip install {tracker}") from None
    # said, since accelerate takes several processes without a device for strangers to one another
    cpu = kind == "cpu" or not torch.accelerator.is_available()
    join(cpu)
    return Accelerator(cpu=cpu, log_with=list(recipe.trackers) or None, project_dir=str(run.folder / "trackers"))
