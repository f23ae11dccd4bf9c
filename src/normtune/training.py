"""One training loop for every stage and strategy.

`train(recipe)`: build the model, then per stage: apply the strategy, stream the data, step AdamW, log, checkpoint;
at the end an adapter. The order of the data depends on (seed, stage, epoch, step) alone, so a checkpoint is a step
number. Not here: what a strategy is (strategy.py), one step (step.py), batches (data.py), files (checkpoint.py).
"""

from __future__ import annotations

import itertools
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from normtune.adapter import save_adapter
from normtune.checkpoint import (
    Position,
    check_same,
    finished_first_stage,
    list_checkpoints,
    load_optimizer,
    load_parameters,
    prune,
    read_tensors,
    save_checkpoint,
)
from normtune.data import IGNORED, Collator, Mixture
from normtune.errors import InputError, NormtuneError
from normtune.progress import Bar, say
from normtune.recipe import Recipe, Stage, load_recipe, override_texts, parse_interval, recipe_hash, to_yaml
from normtune.runlog import Run
from normtune.step import Guard, add_throughput, check_rates, description, make_optimizer, note_of, take_step
from normtune.strategy import Report, apply, check, lean, restore, tuning
from normtune.tuned import build, open_tuned

MICRO_BATCH = 16


class Interrupted(NormtuneError):
    """Ctrl-C or SIGTERM: everything is saved, `--resume` goes on."""

    exit_code = 130


@dataclass
class Trained:
    """A finished run: its folder, the tuned model (in memory) and its processor, the last stage's report."""

    folder: Path
    model: Any
    processor: Any
    report: Report | None
    seconds: float


@dataclass
class Loop:
    """What the stages of one training share."""

    recipe: Recipe
    run: Run
    accelerator: Accelerator
    model: nn.Module
    processor: Any
    mixtures: list[Mixture]
    quiet: bool
    stop: threading.Event = field(default_factory=threading.Event)
    saved: float = field(default_factory=time.monotonic)  # when the last checkpoint was written

    def log(self, record: dict[str, Any], step: int | None = None) -> None:
        if not self.accelerator.is_main_process:
            return
        self.run.write(record)
        if step is not None and self.recipe.trackers:
            values = {f"{record['stage']}/{k}": v for k, v in record.items() if isinstance(v, int | float)}
            self.accelerator.log(values, step=step)

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process and not self.quiet:
            say(text)


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    quiet: bool = False,
    **overrides: Any,
) -> Trained:
    """Runs every stage of a recipe; leaves `runs/NAME` (or `out`) with log, checkpoints and adapter.

    Args:
        overrides: recipe keys by dotted name, e.g. `seed=1`, `**{"stages.1.learning_rate": 1e-4}`.

    Raises:
        InputError: wrong recipe, model or data; a run folder that exists (without `resume`).
        JobError: loss not finite, gains that do not move, disk full.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint has been written.
    """
    began = time.monotonic()
    recipe = load_recipe(recipe, override_texts(overrides))
    check_lora_order(recipe)
    run = Run(Path(out) if out else Path("runs") / recipe.name)
    if resume and (run.adapter / "adapter.json").is_file():
        check_same(recipe, run)
        if not quiet:
            say(f"{run.folder} is finished already; nothing to resume")
        tuned = open_tuned(run.folder)
        return Trained(run.folder, tuned.model, tuned.processor, None, 0.0)
    fresh = not run.folder.exists()
    loop = start(recipe, run, resume, quiet)
    report = None
    try:
        with interruptible(loop.stop):
            first, step = recover(loop, resume)
            for index in range(first, len(recipe.stages)):
                report = run_stage(loop, index, step)
                step = 0
    except InputError:
        if fresh and not list_checkpoints(run.checkpoints):  # nothing was trained: leave no run in the way
            shutil.rmtree(run.folder, ignore_errors=True)
        raise
    restore(loop.model)
    loop.accelerator.wait_for_everyone()
    if report is None:  # resumed after the last step: the adapter still says which strategy it is of
        report = apply_stage(loop, recipe.stages[-1])
    if loop.accelerator.is_main_process:
        facts: dict[str, Any] = {
            "base": {"model": recipe.model.model_dump(), "seed": recipe.seed},
            "recipe": recipe_hash(recipe),
        }
        save_adapter(loop.model, run.adapter, **facts)
        seconds = time.monotonic() - began
        loop.log({"event": "end", "seconds": round(seconds, 2)})
        loop.say(f"adapter written to {run.adapter}")
    if recipe.trackers:
        loop.accelerator.end_training()
    return Trained(run.folder, loop.model, loop.processor, report, time.monotonic() - began)


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
    if resume and run.recipe.is_file():
        check_same(recipe, run)
    elif not resume:
        Run.refuse_existing(run.folder)
    torch.manual_seed(recipe.seed)
    model, processor = build(recipe.model, recipe.seed)
    for stage in recipe.stages:
        check_rates(stage, check(model, stage.strategy, stage.lora.targets))
    mixtures = [Mixture(stage.data) for stage in recipe.stages]
    if recipe.start_from is not None:
        finished_first_stage(recipe, Path(recipe.start_from))
    if accelerator.is_main_process and not run.recipe.is_file():
        if resume:
            say(f"no run to resume in {run.folder}: starting from the beginning")
        Run.create(run.folder, to_yaml(recipe))
    accelerator.wait_for_everyone()
    model.to(accelerator.device)  # type: ignore[arg-type]
    if recipe.trackers:
        accelerator.init_trackers("normtune", {"recipe": recipe.name, "hash": recipe_hash(recipe), "seed": recipe.seed})
    return Loop(recipe, run, accelerator, model, processor, mixtures, quiet)


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
    return Accelerator(
        cpu=kind == "cpu", log_with=list(recipe.trackers) or None, project_dir=str(run.folder / "trackers")
    )


@contextmanager
def interruptible(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C and SIGTERM set `stop`; a second Ctrl-C ends at once."""

    def handler(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        say("finishing this step, then saving; once more to stop at once")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def recover(loop: Loop, resume: bool) -> tuple[int, int]:
    """(stage, step) to go on from: a checkpoint of this run, the first stage of `start_from`, or the start."""
    found = list_checkpoints(loop.run.checkpoints) if resume else []
    while found:
        position, path = found.pop()
        try:
            tensors = read_tensors(path)
        except InputError as error:
            loop.say(str(error))
            continue
        stage = loop.recipe.stages[position.stage]
        if not position.finished or position.lora:
            apply_stage(loop, stage)
        load_parameters(loop.model, tensors, path)
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


def apply_stage(loop: Loop, stage: Stage) -> Report:
    return apply(loop.model, stage.strategy, seed=loop.recipe.seed, **stage.lora.model_dump())


def run_stage(loop: Loop, index: int, first_step: int) -> Report:
    """One stage from `first_step` on: the story of the loop."""
    stage, seed = loop.recipe.stages[index], loop.recipe.seed * 1000 + index
    report = apply_stage(loop, stage)
    swaps = lean(loop.model)
    mixture = loop.mixtures[index]
    collator = Collator(loop.processor, stage.max_length)
    per_epoch, total = steps_of(stage, mixture)
    earlier = sum(steps_of(s, m)[1] for s, m in zip(loop.recipe.stages[:index], loop.mixtures, strict=False))
    optimizer = make_optimizer(loop.model, stage)
    for line in description(loop.model, stage, report, swaps.left, optimizer):
        loop.say(line)
    if first_step:
        path = loop.run.checkpoints / f"{stage.name}-{first_step}"
        load_optimizer(loop.model, optimizer, read_tensors(path))
    else:
        torch.manual_seed(seed)
    if stage.checkpoint_activations:
        loop.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    model = loop.accelerator.prepare_model(loop.model) if loop.accelerator.num_processes > 1 else loop.model
    loop.log(
        {"event": "start", "stage": stage.name, "step": first_step, "steps": total, "parameters": report.parameters}
    )
    guard = Guard(loop.model, stage, total)
    loop.model.train()

    def batches(step: int) -> list[dict[str, torch.Tensor]]:
        order = mixture.order(seed, step // per_epoch)
        at = step % per_epoch * stage.batch_size
        mine = order[at : at + stage.batch_size][loop.accelerator.process_index :: loop.accelerator.num_processes]
        size = stage.micro_batch_size or min(stage.batch_size, MICRO_BATCH)
        if not mine:  # fewer samples than processes: this one only takes part in the exchange of gradients
            idle = collator([mixture[order[at]]])
            return [{**idle, "labels": torch.full_like(idle["labels"], IGNORED)}]
        return [collator([mixture[i] for i in mine[j : j + size]]) for j in range(0, len(mine), size)]

    silent = loop.quiet or not loop.accelerator.is_main_process
    with Bar(stage.name, total, first_step, silent) as bar, ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(batches, first_step) if first_step < total else None
        for step in range(first_step, total):
            assert ahead is not None
            began = time.perf_counter()
            ready, ahead = ahead.result(), pool.submit(batches, step + 1) if step + 1 < total else None
            waited = time.perf_counter() - began
            record = take_step(loop.accelerator, model, optimizer, ready, stage, step, total)
            add_throughput(record, waited)
            guard.measure(step + 1, record)
            loop.log({"stage": stage.name, "step": step + 1, **record}, step=earlier + step + 1)
            bar.update(step + 1, note_of(record))
            guard.check(step + 1, record)
            keep_safe(loop, optimizer, index, step + 1, total)
    if stage.checkpoint_activations:
        loop.model.gradient_checkpointing_disable()  # type: ignore[operator]
    loop.log({"event": "stage end", "stage": stage.name, "data": dict(collator.counts), "movement": guard.last})
    return report


def steps_of(stage: Stage, mixture: Mixture) -> tuple[int, int]:
    """Optimizer steps of an epoch, and of the stage."""
    per_epoch = math.ceil(len(mixture.order(0, 0)) / stage.batch_size)
    return per_epoch, stage.max_steps or stage.epochs * per_epoch


def keep_safe(loop: Loop, optimizer: torch.optim.Optimizer, index: int, step: int, total: int) -> None:
    """Writes a checkpoint when one is due, when the stage ends, and when the run is interrupted."""
    steps, seconds = parse_interval(loop.recipe.save_every)
    stop, finished = loop.stop.is_set(), step == total
    due = step % steps == 0 if steps else time.monotonic() - loop.saved > (seconds or 0)
    if not (due or finished or stop):
        return
    stage = loop.recipe.stages[index]
    if loop.accelerator.is_main_process:
        lora = tuning(loop.model).lora
        position = Position(index, stage.name, step, finished, lora)
        save_checkpoint(loop.run.checkpoints, loop.model, optimizer, position)
        prune(loop.run.checkpoints, stage.name, loop.recipe.keep)
        loop.saved = time.monotonic()
    loop.accelerator.wait_for_everyone()
    if stop:
        raise Interrupted(
            f"stopped after step {step} of {stage.name}, saved in {loop.run.checkpoints}; go on with --resume"
        )
