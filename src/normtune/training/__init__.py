"""One training loop for every stage and strategy.

`train(recipe)`: build the model, then per stage: apply the strategy, stream the data, step AdamW, log, checkpoint;
at the end an adapter. The order of the data depends on (seed, stage, epoch, step) alone, so a checkpoint is a step
number. Not here: what a strategy is (strategy/), one step (step.py), batches (data/), files (checkpoint.py).
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normtune.adapter import save_adapter
from normtune.checkpoint import check_same, list_checkpoints
from normtune.errors import InputError
from normtune.progress import say
from normtune.recipe import Recipe, load_recipe, override_texts
from normtune.runlog import Run, read_lines
from normtune.strategy import Report, restore
from normtune.training.evaluating import Evaluate, base_facts
from normtune.training.loop import Loop, apply_stage, run_stage
from normtune.training.peak import PEAK_OF, Peak
from normtune.training.resuming import accept, open_trackers, recover
from normtune.training.starting import check_lora_order, restarted, start
from normtune.training.stopping import Interrupted, interruptible
from normtune.tuned import attach_encoder, open_tuned

__all__ = ["Interrupted", "Trained", "train"]


@dataclass
class Trained:
    """A finished run: its folder, the tuned model (in memory) and its processor, the last stage's report."""

    folder: Path
    model: Any
    processor: Any
    report: Report | None
    seconds: float


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    quiet: bool = False,
    evaluate: Evaluate | None = None,
    **overrides: Any,
) -> Trained:
    """Runs every stage of a recipe; leaves `runs/NAME` (or `out`) with log, checkpoints and adapter.

    Args:
        resume: go on from the last checkpoint that is whole; start over where there is none, return a finished run.
        force: resume although the recipe or the data has changed.
        evaluate: what stages with `evaluate_every` call: (model, processor) -> scores by name (see
            `normtune.evaluation.during.during_training`).
        overrides: recipe keys by dotted name, e.g. `seed=1`, `**{"stages.1.learning_rate": 1e-4}`.

    Raises:
        InputError: wrong recipe, model or data; a run folder that exists (without `resume`), or that another process
            trains into; another recipe than that of the run (without `force`).
        JobError: loss not finite, gains that do not move, disk full, out of memory.
        Interrupted: Ctrl-C or SIGTERM; a checkpoint has been written.
    """
    began, peak = time.monotonic(), Peak()
    recipe = load_recipe(recipe, override_texts(overrides))
    check_lora_order(recipe)
    run = Run(Path(out) if out else Path("runs") / recipe.name)
    resume = resume or restarted()
    if resume and not run.recipe.is_file() and list_checkpoints(run.checkpoints):
        raise InputError(f"{run.folder} has checkpoints and no recipe.yaml; put it back, or choose another --out")
    changed = check_same(recipe, run, force) if resume and run.recipe.is_file() else {}
    if resume and (run.adapter / "adapter.json").is_file():
        if not quiet:
            say(f"{run.folder} is finished already; nothing to resume")
        tuned = open_tuned(run.folder)
        return Trained(run.folder, tuned.model, tuned.processor, None, 0.0)
    with ExitStack() as held:
        first = os.environ.get("RANK", "0") == "0"  # of several processes one holds the folder
        there = resume and run.folder.is_dir()
        if first and there:
            held.enter_context(run.alone())
        fresh = not run.folder.exists()
        loop = start(recipe, run, resume, quiet)
        if first and not there:
            held.enter_context(run.alone())
        loop.evaluate = evaluate
        report = run_stages(loop, resume, force, changed, fresh)
        restore(loop.model)
        loop.accelerator.wait_for_everyone()
        if report is None:  # resumed after the last step: the adapter still says which strategy it is of
            report = apply_stage(loop, recipe.stages[-1])
        if loop.accelerator.is_main_process:
            seconds = time.monotonic() - began
            device = loop.accelerator.device
            memory = {"peak_bytes": peak.bytes(device), "peak_of": "GPU memory" if device.type == "cuda" else PEAK_OF}
            loop.log({"event": "end", "seconds": round(seconds, 2), **memory})
            save_adapter(loop.model, run.adapter, **base_facts(recipe))  # last: with it the run is finished
            loop.say(f"adapter written to {run.adapter}")
    attach_encoder(loop.model, recipe.model)
    if recipe.trackers:
        loop.accelerator.end_training()
    return Trained(run.folder, loop.model, loop.processor, report, time.monotonic() - began)


def run_stages(loop: Loop, resume: bool, force: bool, changed: dict[str, Any], fresh: bool) -> Report | None:
    """The stages that are left; the last one's report, None where none was left."""
    run, report = loop.run, None
    try:
        with loop.saver, interruptible(loop.stop):
            first, step = recover(loop, resume, force)
            accept(loop, changed)
            open_trackers(loop)
            for index in range(first, len(loop.recipe.stages)):
                report = run_stage(loop, index, step)
                step = 0
    except InputError:
        nothing = fresh and not any("loss" in line for line in read_lines(run.log))
        if nothing and loop.accelerator.is_main_process:  # leave no run in the way
            shutil.rmtree(run.folder, ignore_errors=True)
        raise
    return report
