"""Scores while a model trains: what a recipe's `evaluate` section asks, as a function of the model.

Scope: the benchmarks of the section on `dev` (or `data`), `limit` items of each, read once. Not here: when to evaluate
and what to keep, which is training's, and gets this as a callback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from normtune.errors import InputError, did_you_mean
from normtune.evaluation import BATCH, collect
from normtune.evaluation.journal import Given
from normtune.evaluation.questions import Asked, Settings, ask
from normtune.recipe import Recipe


def during_training(recipe: Recipe) -> Callable[[Any, Any], dict[str, float]] | None:
    """`evaluate(model, processor)` -> {"pope": headline, "pope.mean_f1": figure, ...}; None where no stage of the
    recipe has `evaluate_every`. Where several processes train, all of them call it and get the scores.

    InputError, before anything is trained, for wrong files and a `keep_best` that is no figure."""
    section = recipe.evaluate
    if section is None or not any(stage.evaluate_every for stage in recipe.stages):
        return None
    settings = Settings(tuple(dict.fromkeys(section.benchmarks)), section.limit)
    asked = ask(settings, section.dev or section.data)
    if section.keep_best is not None:
        name = section.keep_best.partition(".")[0]
        known = [key for one in asked if one.name == name for key in figures(one, ["no"] * len(one))]
        if section.keep_best not in known:
            hint = did_you_mean(section.keep_best, known)
            raise InputError(
                f"evaluate.keep_best: no figure '{section.keep_best}'{hint}.\nThere are {', '.join(known) or 'none'}."
            )

    def evaluate(model: Any, processor: Any) -> dict[str, float]:
        found: dict[str, float] = {}
        for one in asked:
            given = Given(len(one))
            collect(model, processor, settings, one, given, BATCH, together=True)
            found |= figures(one, given.complete())
        return found

    return evaluate


def figures(asked: Asked, answers: list[str]) -> dict[str, float]:
    """The headline under the benchmark's name, the other plain numbers as NAME.FIGURE."""
    scores = asked.task.score(asked.items, answers)
    numbers = {f"{asked.name}.{key}": value for key, value in scores.items() if isinstance(value, float)}
    return {asked.name: numbers.pop(f"{asked.name}.score"), **numbers} if numbers else {}
