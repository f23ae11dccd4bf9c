"""What goes wrong within a step, in words that help: the samples of a loss that is not finite, a way out of memory.

Scope: the recipe's `on_nonfinite`; which change of a stage would fit into the device's memory, by the planner.
Not here: the step itself (step.py), gains that do not move (step.Guard).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import nn

from normtune.errors import JobError
from normtune.memory.planning import largest_batch
from normtune.memory.recipes import USABLE, job_of, shape_of
from normtune.recipe import Recipe, Stage
from normtune.runlog import resident
from normtune.skeletons import assembled_skeleton
from normtune.step import NotFinite, NothingToLearn, take_step
from normtune.training.batching import Batches

if TYPE_CHECKING:
    from normtune.training.loop import Loop

IN_A_ROW = 10  # steps that may be skipped one after another: more is no accident
SHOWN = 5  # samples in a message; the log has all


def guarded_step(
    loop: Loop,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ready: Sequence[dict[str, torch.Tensor]],
    batches: Batches,
    step: int,
    total: int,
) -> dict[str, Any] | None:
    """`take_step` on `ready`; None where the step is skipped: nothing to learn, or as `on_nonfinite` says.

    Raises:
        JobError: loss or gradient not finite, with the samples; too many steps skipped; out of memory.
        Abandoned: told to stop between two micro-batches.
    """
    stage = batches.stage
    try:
        record = take_step(loop.accelerator, model, optimizer, ready, stage, step, total, loop.stop.is_set)
    except NothingToLearn as error:
        loop.log({"event": "nothing to learn", "stage": stage.name, "step": step + 1})
        leave_out(loop, str(error), total)
        return None
    except NotFinite as error:
        samples = samples_of(loop, batches, step, error.micro_batches)
        loop.log({"event": "not finite", "stage": stage.name, "step": step + 1, **error.facts, "samples": samples})
        more = f" and {len(samples) - SHOWN} more, see log.jsonl" if len(samples) > SHOWN else ""
        message = f"{error}\nsamples: {'; '.join(samples[:SHOWN])}{more}"
        if loop.recipe.on_nonfinite == "stop":
            raise JobError(message) from None
        leave_out(loop, message, total)
        return None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        optimizer.zero_grad()
        advice = remedy(loop.recipe, stage, loop.accelerator.device)
    else:
        loop.bad_steps = 0
        return record
    raise JobError(f"{stage.name}, step {step + 1}: out of memory on {loop.accelerator.device}\n{advice}")


def leave_out(loop: Loop, message: str, total: int) -> None:
    """Says that a step is skipped, and why. JobError where that has become the rule, or a stage has no other steps."""
    loop.bad_steps += 1
    if loop.bad_steps >= min(IN_A_ROW, total):
        raise JobError(f"{loop.bad_steps} steps in a row skipped; the last: {message}") from None
    loop.say(f"skipped {message}")


def samples_of(loop: Loop, batches: Batches, step: int, micro_batches: Sequence[int]) -> list[str]:
    """Where the samples of some micro-batches of a step stand, over all processes; of all where none is named."""
    unseen = copy.copy(batches.collator)
    unseen.counts = Counter()  # they are counted already
    groups = replace(batches, collator=unseen).groups(step)
    chosen = [groups[n] for n in micro_batches if n < len(groups)] or groups
    names = [row.where for group in chosen for row in group]
    if loop.accelerator.num_processes > 1:
        names = list(gather_object(names))
    return names


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has a class of its own; the CPU's allocator and cuBLAS raise a RuntimeError."""
    words = ("not enough memory", "can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)


def remedy(recipe: Recipe, stage: Stage, device: torch.device) -> str:
    """The first change of a stage, least harm first, of which the planner says that it fits into the device."""
    memory, size = usable_memory(device), shape_of(stage, device.type).batch
    lighter: list[dict[str, Any]] = [{}]
    if stage.activations == "exact":
        lighter.append({"activations": "8bit"})
    if not stage.checkpoint_activations:
        lighter.append({"checkpoint_activations": True})
    for changes in lighter:
        most = size if changes else size // 2  # as it is it did not fit, whatever the plan says
        changed = stage.model_copy(update=changes)
        try:
            job = job_of(lambda: assembled_skeleton(recipe.model), changed, recipe.model.dtype, device.type)
            fits = largest_batch(job.plan, int(USABLE * memory), most) if most else 0
        except Exception:  # a plan that fails must not hide what happened
            break
        if fits:
            told = {**({"micro_batch_size": fits} if fits < size or not changes else {}), **changes}
            said = ", ".join(f"{key}: {str(value).lower()}" for key, value in told.items())
            return f"by plan this fits into {memory / 1e9:.1f} GB: {said}; it changes no result" + (
                " by more than rounding" if "activations" in changes else ""
            )
    return "set micro_batch_size: 1, checkpoint_activations: true or a smaller max_length; see `normtune plan`"


def usable_memory(device: torch.device) -> int:
    """Bytes that this process can have on a device: what it has, and what is free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        return free + resident("VmRSS")
    except (OSError, StopIteration):
        return 0
