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

import torch
from accelerate import Accelerator
from torch import nn

from normtune.checkpoint import Position, load_optimizer, prune, read_tensors, save_checkpoint
from normtune.data import IGNORED, Collator, Mixture
from normtune.errors import NormtuneError
from normtune.progress import Bar, say
from normtune.recipe import Recipe, Stage, parse_interval
from normtune.runlog import Run
from normtune.step import Guard, add_throughput, description, make_optimizer, note_of, take_step
from normtune.strategy import Report, apply, lean, tuning

MICRO_BATCH = 16


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
