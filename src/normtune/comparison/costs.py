"""What a training cost: parameters, bytes on disk, bytes kept for backward, peak memory, time of a step.

Scope: figures of one finished training, from its log and its model. `saved_bytes` is a property of the code, the same
on every machine; peak memory and time are those of the process that trained. Not here: plans (memory/).
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from normtune.data import Collator, Mixture
from normtune.data.skipping import policy
from normtune.features import fill_store
from normtune.recipe import Recipe, Stage
from normtune.runlog import Run, read_lines
from normtune.step import on_device, supervised_loss
from normtune.strategy import apply, lean, restore, tuning
from normtune.training.batching import Batches, choose_packing

WARM = 3  # first steps of a process, which are slower
LAST = 10  # steps over which the loss at the end is averaged: one batch says little


def costs(recipe: Recipe, folder: Path, model: nn.Module, processor: Any) -> dict[str, Any]:
    """Figures of the last stage of the run `folder`, which has trained `model`.

    Returns:
        steps, trainable_parameters, total_parameters (as `Report` counts them), percent; adapter_bytes; saved_bytes
        (see there); peak_bytes and peak_of, as the training has logged them; step_seconds (median) and step_quartiles,
        seconds of the stage's steps, moved_percent (of the gains, None where none are trained), stream (SHA-256 of the
        batches, in order), first_loss, last_loss (the mean over the last LAST steps).
    """
    stage = recipe.stages[-1]
    report = apply(model, stage.strategy, seed=recipe.seed, **stage.lora.model_dump())
    lines = read_lines(Run(folder).log)
    log = steps_of_log(lines, stage.name)
    ends = [line for line in lines if line.get("event") == "end"]
    seconds = [line["tokens"] / line["tokens_per_second"] for line in log]
    moved = [line["moved"] for line in log if "moved" in line]
    files = (path for path in Run(folder).adapter.rglob("*") if path.is_file())
    return {
        "steps": len(log),
        "trainable_parameters": report.parameters,
        "total_parameters": report.total,
        "percent": report.percent,
        "adapter_bytes": sum(path.stat().st_size for path in files),
        "saved_bytes": saved_bytes(recipe, model, processor),
        "peak_bytes": max(line["peak_bytes"] for line in ends),
        "peak_of": ends[-1]["peak_of"],
        "step_seconds": statistics.median(seconds[WARM:] or seconds),
        "step_quartiles": [float(q) for q in np.percentile(seconds[WARM:] or seconds, [25, 75])],
        "seconds": sum(seconds),
        "moved_percent": moved[-1] if moved else None,
        "stream": stream(log),
        "first_loss": log[0]["loss"],
        "last_loss": statistics.fmean(line["loss"] for line in log[-LAST:]),
    }


def steps_of_log(log: Sequence[Mapping[str, Any]], stage: str) -> list[Mapping[str, Any]]:
    """The records of a stage's steps, in order; of a step that was done again after an interruption the last one."""
    found = {line["step"]: line for line in log if line.get("stage") == stage and "loss" in line}
    return [found[step] for step in sorted(found)]


def stream(steps: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 of what the steps were computed on: equal where two trainings have seen the same batches in the same
    order."""
    return hashlib.sha256(" ".join(f"{line['step']}:{line['batch']}" for line in steps).encode()).hexdigest()


def saved_bytes(recipe: Recipe, model: nn.Module, processor: Any) -> int:
    """Bytes that autograd keeps for backward of the last stage's first micro-batch, parameters and buffers aside.

    The strategy has been applied; the model is left as it was found.
    """
    stage, device = recipe.stages[-1], next(model.parameters()).device
    training = model.training
    lean(model, stage.activations)
    try:
        model.train()
        batch = first_batch(recipe, stage, model, processor)
        own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        kept: dict[int, torch.Tensor] = {}  # holding the tensors keeps their addresses from being used again

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            supervised_loss(model, on_device(batch, device, tuning(model).dtype))
        return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)
    finally:
        restore(model)
        model.train(training)


def first_batch(recipe: Recipe, stage: Stage, model: nn.Module, processor: Any) -> dict[str, torch.Tensor]:
    """As the training made it."""
    pack, _ = choose_packing(model, stage, next(model.parameters()).device)
    seed = recipe.seed * 1000 + recipe.stages.index(stage)
    on_bad = policy(recipe)
    mixture, store = Mixture(stage.data, on_bad), None
    if stage.cache_features:
        wanted = dict(mixture.images())
        store = fill_store(recipe.model, model, processor, wanted, skip=on_bad is not None)
    return Batches(mixture, Collator(processor, stage.max_length, store, on_bad), stage, seed, pack)(0)[0]
