"""One stage of a training: step, log, guard, checkpoint. Not here: how a run begins (starting.py)."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from normtune.checkpoint import Position, load_optimizer, prune, read_tensors, save_checkpoint
from normtune.data import Collator, Mixture
from normtune.errors import NormtuneError
from normtune.features import Prepared
from normtune.flops import count_flops, peak_rate
from normtune.progress import Bar, say
from normtune.recipe import Recipe, Stage, parse_interval
from normtune.runlog import Run
from normtune.step import Guard, add_throughput, description, make_optimizer, note_of, take_step
from normtune.strategy import Report, apply, checkpoint, compile_blocks, lean, restore, tuning
from normtune.training.batching import Batches, choose_packing, steps_of
from normtune.training.evaluating import Evaluate, evaluate_if_due


class Interrupted(NormtuneError):
    """Ctrl-C or SIGTERM: everything is saved, `--resume` goes on."""

    exit_code = 130


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
    evaluate: Evaluate | None = None
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
    several = loop.accelerator.num_processes > 1
    # everything is where it belongs; an encoder without weights could not be moved
    model = loop.accelerator.prepare_model(loop.model, device_placement=False) if several else loop.model
    sizes = {"parameters": report.parameters, "total": report.total}
    loop.log({"event": "start", "stage": stage.name, "step": first_step, "steps": total, **sizes})
    guard = Guard(loop.model, stage, total)
    flops, peak = count_flops(loop.model, cached=stage.cache_features), peak_of(loop)
    loop.model.train()
    silent = loop.quiet or not loop.accelerator.is_main_process
    with Bar(stage.name, total, first_step, silent) as bar, ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(batches, first_step) if first_step < total else None
        for step in range(first_step, total):
            assert ahead is not None
            began = time.perf_counter()
            ready, ahead = ahead.result(), pool.submit(batches, step + 1) if step + 1 < total else None
            waited = time.perf_counter() - began
            torch.manual_seed(seed_of(batches.seed, step, loop.accelerator.process_index))
            record = take_step(loop.accelerator, model, optimizer, ready, stage, step, total)
            add_throughput(record, waited, flops, peak)
            guard.measure(step + 1, record)
            loop.log({"stage": stage.name, "step": step + 1, **record}, step=earlier + step + 1)
            bar.update(step + 1, note_of(record))
            guard.check(step + 1, record)
            evaluate_if_due(loop, stage, step + 1, total, earlier + step + 1)
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
    collator = Collator(loop.processor, stage.max_length, store)
    at, of = loop.accelerator.process_index, loop.accelerator.num_processes
    return Batches(loop.mixtures[index], collator, stage, loop.recipe.seed * 1000 + index, pack, at, of), notes


def peak_of(loop: Loop) -> float | None:
    """The datasheet's FLOP/s of all devices together, where it is known."""
    if loop.accelerator.device.type != "cuda":
        return None
    rate = peak_rate(torch.cuda.get_device_name(loop.accelerator.device), tuning(loop.model).dtype)
    return rate and rate * loop.accelerator.num_processes


def keep_safe(loop: Loop, optimizer: torch.optim.Optimizer, index: int, step: int, total: int) -> None:
    """Writes a checkpoint when one is due, when the stage ends, and when the run is interrupted."""
    steps, seconds = parse_interval(loop.recipe.save_every)
    main, finished = loop.accelerator.is_main_process, step == total
    late = main and time.monotonic() - loop.saved > (seconds or math.inf)
    # one clock, and one signal for all: a process that goes on alone would wait for the others for ever
    asked = torch.tensor([late, loop.stop.is_set()], dtype=torch.long, device=loop.accelerator.device)
    late, stop = (count > 0 for count in loop.accelerator.reduce(asked).tolist())
    if not (late or finished or stop or (steps and step % steps == 0)):
        return
    stage = loop.recipe.stages[index]
    if main:
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
