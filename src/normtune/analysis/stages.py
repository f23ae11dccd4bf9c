"""Gradients at the checkpoints of a run's last stage: at its start, at those that were kept on the way, at its end.

Scope: which states of the model there are, putting each into the model, and what is measured there: the parts that the
run trains and, in every run alike, the norms of the blocks. Not here: the statistics (gradients.py).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from normtune.adapter import remove_adapter
from normtune.analysis.gradients import FORMULA, by_group, gradient_spread
from normtune.analysis.samples import training_batches
from normtune.checkpoint import finished_first_stage, list_checkpoints, load_parameters, read_tensors
from normtune.data import Collator, Mixture
from normtune.errors import InputError
from normtune.progress import Bar
from normtune.recipe import Recipe
from normtune.runlog import Run, read_lines
from normtune.step import batch_digest
from normtune.strategy import apply, check, lean, tuning


def stage_gradients(
    run: Run,
    recipe: Recipe,
    model: nn.Module,
    collator: Collator,
    mixture: Mixture,
    batches: int,
    *,
    quiet: bool = True,
    visit: Callable[[int], None] = lambda step: None,
) -> tuple[dict[str, Any], list[str]]:
    """The document's `gradients`, and notes on what is missing.

    Args:
        model: as the run left it, its adapter loaded; afterwards without it and with other tensors trainable.
        mixture: the data of the last stage.
        visit: called with the step of each state while the model is in it.
    """
    stage = recipe.stages[-1]
    trained = [part for part, members in check(model, stage.strategy, stage.lora.targets).items() if members]
    trained += ["lora"] if "lora" in stage.strategy and "lora" not in trained else []
    measured = [*trained, *(["norms"] if tuning(model).anatomy.norms and "norms" not in trained else [])]
    earlier, notes = checkpoints(run, recipe)
    points: dict[int, dict[str, Any]] = {}
    digest = 0

    def steps() -> Iterator[list[dict[str, Any]]]:
        nonlocal digest
        digest = 0
        for batch in training_batches(mixture, collator, stage, batches):
            for micro in batch:
                digest = zlib.crc32(batch_digest([micro]).encode(), digest)
            yield batch

    with Bar("gradients", 1 + len(earlier), quiet=quiet) as bar:
        for number, (step, path) in enumerate([(last_step(run, recipe), None), *earlier]):
            if number == 1:  # the end is the adapter, as it was evaluated; the others are reached from the base
                remove_adapter(model)
            report = apply(model, measured, seed=recipe.seed, **stage.lora.model_dump())
            if path is not None:
                load_parameters(model, read_tensors(path), path)
            lean(model)  # exact, whatever the stage kept for backward: the same measurement for every run
            spreads = gradient_spread(model, steps())
            parts: dict[str, list[str]] = {}
            for name, part in report.part_of.items():
                parts.setdefault(part, []).append(name)
            norms = by_group(spreads, of_norms(model))
            points[step] = {"step": step, "parts": by_group(spreads, parts), "norms": norms}
            visit(step)
            bar.update(number + 1)
    return {
        "checkpoints": [points[step] for step in sorted(points)],
        "trained": trained,
        "formula": FORMULA,
        "batches": batches,
        "batch_size": stage.batch_size,
        "stream": f"{digest:08x}",
    }, notes


def checkpoints(run: Run, recipe: Recipe) -> tuple[list[tuple[int, Path | None]], list[str]]:
    """(step of the last stage, checkpoint or None for the untuned model), in order, the end left out; and notes."""
    last = len(recipe.stages) - 1
    found = list_checkpoints(run.checkpoints)
    kept: list[tuple[int, Path | None]] = [(p.step, path) for p, path in found if p.stage == last and not p.finished]
    if last == 0:
        return [(0, None), *kept], []
    before = [path for position, path in found if position.stage == last - 1 and position.finished]
    if not before and last == 1 and recipe.start_from is not None:
        with suppress(InputError):  # that run is gone
            before = [finished_first_stage(recipe, Path(recipe.start_from))]
    if before:
        return [(0, before[0]), *kept], []
    return kept, ["no gradients at the start of the last stage: the checkpoint before it is gone"]


def last_step(run: Run, recipe: Recipe) -> int:
    """Steps of the last stage, by its finished checkpoint or by the log."""
    name, last = recipe.stages[-1].name, len(recipe.stages) - 1
    done = [p.step for p, _ in list_checkpoints(run.checkpoints) if p.stage == last and p.finished]
    logged = [int(line["step"]) for line in read_lines(run.log) if line.get("stage") == name and "step" in line]
    return max([*done, *logged], default=recipe.stages[-1].max_steps or 0)


def of_norms(model: nn.Module) -> dict[str, list[str]]:
    """Norms of the LLM and of the vision encoder -> names of their parameters."""
    found = tuning(model).anatomy
    names = {id(p): name for name, p in model.named_parameters()}
    norms = [*found.norms, *found.qk_norms, *found.final_norm, *found.vision_norms]
    return {norm: [names[id(p)] for p in model.get_submodule(norm).parameters()] for norm in norms}
