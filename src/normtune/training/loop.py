"""One stage of a training: step, log, guard, checkpoint. Not here: how a run begins (starting.py) or goes on
(resuming.py), what is said of a step that fails (guarding.py), how a checkpoint gets to the disk (saving.py).
"""

from __future__ import annotations

import math
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from normtune.checkpoint import Position, copy_tensors, load_optimizer, read_tensors
from normtune.data import Collator, Mixture
from normtune.data.skipping import Skipped
from normtune.errors import JobError
from normtune.features import Prepared
from normtune.flops import count_flops, peak_rate
from normtune.progress import Bar, say
from normtune.recipe import Recipe, Stage, parse_interval
from normtune.runlog import Run
from normtune.sharding import level, replicated
from normtune.step import Abandoned, Guard, add_throughput, description, make_optimizer, note_of
from normtune.strategy import Report, apply, checkpoint, compile_blocks, lean, restore, tuning
from normtune.training.batching import Batches, choose_packing, steps_of
from normtune.training.evaluating import Evaluate, evaluate_if_due
from normtune.training.guarding import guarded_step
from normtune.training.saving import Saver
from normtune.training.stopping import Interrupted, Stop
from normtune.training.watchdog import Watchdog


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
    prepared: Prepared | None = None
    skipped: Skipped | None = None  # samples that cannot be used, where the recipe says to go on without them
    evaluate: Evaluate | None = None
    stop: Stop = field(default_factory=Stop)
    saver: Saver = field(init=False)
    saved: float = field(default_factory=time.monotonic)  # when the last checkpoint was taken
    bad_steps: int = 0  # in a row, left out since not finite
    tracker: str | None = None  # id of the run in an outside tracker

    def __post_init__(self) -> None:
        self.saver = Saver(self.run.checkpoints, self.recipe.keep)

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


def apply_stage(loop: Loop, stage: Stage) -> Report:
    return apply(loop.model, stage.strategy, seed=loop.recipe.seed, **stage.lora.model_dump())


def run_stage(loop: Loop, index: int, first_step: int) -> Report:
    """One stage from `first_step` on: the story of the loop."""
    stage = loop.recipe.stages[index]
    report = apply_stage(loop, stage)
    batches, notes = prepare_stage(loop, index)
    _, total = steps_of(stage, batches.mixture)
    earlier = sum(steps_of(s, m)[1] for s, m in zip(loop.recipe.stages[:index], loop.mixtures, strict=False))
    optimizer = make_optimizer(loop.model, stage)
    for line in description(loop.model, stage, report, notes, optimizer):
        loop.say(line)
    if first_step:
        path = loop.run.checkpoints / f"{stage.name}-{first_step}"
        load_optimizer(loop.model, optimizer, read_tensors(path))
    model = replicated(loop.accelerator, loop.model)
    sizes = {"parameters": report.parameters, "total": report.total}
    loop.log({"event": "start", "stage": stage.name, "step": first_step, "steps": total, **sizes})
    guard = Guard(loop.model, stage, total)
    flops, peak = count_flops(loop.model, cached=stage.cache_features), peak_of(loop)
    loop.model.train()
    silent = loop.quiet or not loop.accelerator.is_main_process
    on_steps = parse_interval(loop.recipe.save_every)[0] is not None
    watchdog = Watchdog(loop.recipe.watchdog, stage.name)
    with Bar(stage.name, total, first_step, silent) as bar, ThreadPoolExecutor(1) as pool, watchdog:
        ahead = pool.submit(batches, first_step) if first_step < total else None
        for step in range(first_step, total):
            assert ahead is not None
            began = time.perf_counter()
            ready, ahead = ahead.result(), pool.submit(batches, step + 1) if step + 1 < total else None
            ready = level(loop.model, ready, loop.accelerator.device)
            waited = time.perf_counter() - began
            torch.manual_seed(seed_of(batches.seed, step, loop.accelerator.process_index))
            try:
                record = guarded_step(loop, model, optimizer, ready, batches, step, total)
            except Abandoned:
                keep_safe(loop, optimizer, index, step, total)  # raises Interrupted
                raise
            if on_steps:  # a kill repeats `save_every` steps at most: none is logged before its checkpoint is complete
                loop.saver.settle()
            if record is not None:
                add_throughput(record, waited, flops, peak)
                guard.measure(step + 1, record)
                loop.log({"stage": stage.name, "step": step + 1, **record}, step=earlier + step + 1)
                bar.update(step + 1, note_of(record))
                guard.check(step + 1, record)
            evaluate_if_due(loop, stage, step + 1, total, earlier + step + 1)
            watchdog.beat(step + 1)
            keep_safe(loop, optimizer, index, step + 1, total)
    if stage.checkpoint_activations:
        checkpoint(loop.model, on=False)
    counts = dict(batches.collator.counts)
    loop.log({"event": "stage end", "stage": stage.name, "data": counts, "movement": guard.last})
    return report


def seed_of(seed: int, step: int, process: int) -> int:
    """Of dropout in a step: a resumed run draws what it would have drawn, and each process its own."""
    return int(np.random.SeedSequence([seed, step, process]).generate_state(1, np.uint64)[0])


def prepare_stage(loop: Loop, index: int) -> tuple[Batches, list[str]]:
    """How the stage computes, as its recipe says: what is kept for backward, compiled, packed, read from disk.

    Returns:
        its batches, and what a user should know of what was left as it is.
    """
    stage, model = loop.recipe.stages[index], loop.model
    restore(model)  # an earlier stage may have been compiled
    swaps = lean(model, stage.activations)
    notes = [f"not lean: {what}" for what in swaps.left]
    if stage.compile:
        notes.append(compile_blocks(model) or "the first steps compile the blocks")
    if stage.checkpoint_activations:
        checkpoint(model, on=True)
    pack, why = choose_packing(model, stage, loop.accelerator.device)
    notes += [why or f"packed rows of up to {pack:,} tokens"] if why or pack else []
    store = loop.prepared.store if loop.prepared is not None and stage.cache_features else None
    collator = Collator(loop.processor, stage.max_length, store, loop.skipped)
    at, of = loop.accelerator.process_index, loop.accelerator.num_processes
    return Batches(loop.mixtures[index], collator, stage, loop.recipe.seed * 1000 + index, pack, at, of), notes


def peak_of(loop: Loop) -> float | None:
    """The datasheet's FLOP/s of all devices together, where it is known."""
    if loop.accelerator.device.type != "cuda":
        return None
    rate = peak_rate(torch.cuda.get_device_name(loop.accelerator.device), tuning(loop.model).dtype)
    return rate and rate * loop.accelerator.num_processes


def keep_safe(loop: Loop, optimizer: torch.optim.Optimizer, index: int, step: int, total: int) -> None:
    """Takes a checkpoint when one is due, when the stage ends, and when the run is interrupted.

    Raises:
        Interrupted: the training was told to stop; the checkpoint is complete.
        JobError, InputError: the checkpoint before could not be written.
    """
    steps, seconds = parse_interval(loop.recipe.save_every)
    main, told = loop.accelerator.is_main_process, loop.stop.is_set()
    late = main and time.monotonic() - loop.saved > (seconds or math.inf) and not loop.saver.busy
    terminated = told and loop.stop.number == signal.SIGTERM
    # one clock, and one signal for all: a process that goes on alone would wait for the others for ever
    asked = torch.tensor([late, told, terminated, loop.saver.failed], dtype=torch.long, device=loop.accelerator.device)
    late, told, terminated, failed = (count > 0 for count in loop.accelerator.reduce(asked).tolist())
    if failed:
        loop.saver.finish()
        raise JobError("a checkpoint could not be written; the first process says why")
    if not (late or told or step == total or (steps and step % steps == 0)):
        return
    if main and step:  # before the first step there is nothing to keep
        loop.saver.save(copy_tensors(loop.model, optimizer), position_of(loop, index, step))
        loop.saved = time.monotonic()
    if told:
        loop.saver.finish()
        loop.accelerator.wait_for_everyone()
        saved = f"saved in {loop.run.checkpoints}" if loop.run.checkpoints.is_dir() else "with nothing to save yet"
        raise Interrupted(
            f"stopped after step {step} of {loop.recipe.stages[index].name}, {saved}; go on with --resume",
            signal.SIGTERM if terminated else signal.SIGINT,
        )


def position_of(loop: Loop, index: int, step: int) -> Position:
    """After `step` steps of stage number `index`."""
    stage, mixture = loop.recipe.stages[index], loop.mixtures[index]
    _, total = steps_of(stage, mixture)
    return Position(
        stage=index,
        name=stage.name,
        step=step,
        finished=step == total,
        lora=tuning(loop.model).lora,
        total=total,
        samples=len(mixture),
        data=mixture.content,
        processes=loop.accelerator.num_processes,
        tracker=loop.tracker,
    )
