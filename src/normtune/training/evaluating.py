"""Scores on the way: the evaluation that train's caller gives, when it is due; the best adapter by a named score.

`best/` is an adapter folder like the one at the end; its record says of which stage and step it is. Not here: what is
asked (evaluation/), which training does not know.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from normtune.adapter import read_adapter, save_adapter
from normtune.errors import InputError
from normtune.recipe import Recipe, Stage, recipe_hash

if TYPE_CHECKING:
    from normtune.training.loop import Loop

Evaluate = Callable[[Any, Any], dict[str, float]]
"""(model, processor) -> scores by name; leaves the model as it was."""


def base_facts(recipe: Recipe) -> dict[str, Any]:
    """What an adapter's record says of the base and the recipe."""
    base = {"model": recipe.model.model_dump(), "seed": recipe.seed}
    return {"base": base, "recipe": recipe_hash(recipe), "gate": recipe.gate}


def evaluate_if_due(loop: Loop, stage: Stage, step: int, total: int, overall: int) -> None:
    """Evaluates every `evaluate_every` steps and after the last one; logs the scores, keeps the best adapter.

    All processes evaluate, each its share; the first one writes.

    Raises:
        InputError: a score that `keep_best` names and the evaluation does not give.
    """
    every = stage.evaluate_every
    if loop.evaluate is None or not every or (step % every and step != total):
        return
    began = time.perf_counter()
    scores = loop.evaluate(loop.model, loop.processor)
    if loop.accelerator.is_main_process:
        best = keep_best(loop, stage, step, scores)
        seconds = round(time.perf_counter() - began, 2)
        loop.log({"event": "evaluation", "stage": stage.name, "step": step, **scores, "seconds": seconds}, step=overall)
        plain = ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if "." not in name)
        loop.say(f"{stage.name}, step {step}: {plain}{', the best so far' if best else ''}")
    loop.accelerator.wait_for_everyone()


def keep_best(loop: Loop, stage: Stage, step: int, scores: dict[str, float]) -> bool:
    """Writes `best/` if the score that the recipe names is higher than that of the one there; whether it was."""
    name = loop.recipe.evaluate.keep_best if loop.recipe.evaluate else None
    if name is None:
        return False
    if name not in scores:
        raise InputError(f"evaluate.keep_best: no score {name!r}; there are {', '.join(scores)}")
    folder = loop.run.folder / "best"
    if (folder / "adapter.json").is_file():
        before = read_adapter(folder)[1].get("best", {})
        if before.get("name") == name and before["value"] >= scores[name]:
            return False
    best = {"stage": stage.name, "step": step, "name": name, "value": scores[name]}
    save_adapter(loop.model, folder, replace=True, **base_facts(loop.recipe), best=best, scores=scores)
    return True
