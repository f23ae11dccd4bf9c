"""normtune: a text LLM learns to see by tuning the gains of its norms (arXiv 2312.11420).

The public names below are imported when they are first used, so that `import normtune` needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "InputError": "errors",
    "JobError": "errors",
    "Anatomy": "structure",
    "anatomy": "structure",
    "Formula": "structure",
    "formula": "structure",
    "Report": "strategy",
    "apply": "strategy",
    "lean": "strategy",
    "restore": "strategy",
    "movement": "strategy",
    "parameter_groups": "strategy",
    "check_step_size": "strategy",
    "assemble": "model",
    "load": "model",
    "save": "model",
    "Adapter": "adapter",
    "save_adapter": "adapter",
    "load_adapter": "adapter",
    "set_adapter": "adapter",
    "export_peft": "adapter",
    "remove_adapter": "adapter",
    "merge": "adapter",
    "open_tuned": "tuned",
    "bank": "bank",
}

__all__ = [
    "Adapter",
    "Anatomy",
    "Formula",
    "InputError",
    "JobError",
    "Report",
    "analyze",
    "anatomy",
    "apply",
    "assemble",
    "bank",
    "check_step_size",
    "compare",
    "evaluate",
    "export_peft",
    "formula",
    "lean",
    "load",
    "load_adapter",
    "merge",
    "movement",
    "open_tuned",
    "parameter_groups",
    "plan",
    "remove_adapter",
    "restore",
    "save",
    "save_adapter",
    "set_adapter",
    "train",
]

if TYPE_CHECKING:
    from normtune.adapter import Adapter, export_peft, load_adapter, merge, remove_adapter, save_adapter, set_adapter
    from normtune.bank import bank
    from normtune.errors import InputError, JobError
    from normtune.model import assemble, load, save
    from normtune.strategy import Report, apply, check_step_size, lean, movement, parameter_groups, restore
    from normtune.structure import Anatomy, Formula, anatomy, formula
    from normtune.tuned import open_tuned


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'normtune' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"normtune.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


def train(recipe: Any, **options: Any) -> Any:
    """Runs a recipe (file, mapping or Recipe); options and errors as in `normtune.training.train`.

    Paths such as `world:train/align.json` name the files of the embedded world.
    """
    from normtune.evaluation.during import during_training
    from normtune.recipe import load_recipe, override_texts
    from normtune.training import train as run
    from normtune.world import resolve

    own = {key: options.pop(key) for key in ("out", "resume", "force", "quiet", "evaluate") if key in options}
    located = resolve(load_recipe(recipe, override_texts(options)))
    return run(located, **{"evaluate": during_training(located), **own})


def compare(recipe: Any, *, out: Any = None, engine: str = "local", **options: Any) -> Any:
    """Strategies, kinds of data or a sweep through one training and evaluation; as `normtune.comparison.compare`.

    Options are those of `normtune.comparison.Request` (strategies, kinds, equal, sweep, seeds, learning_rates, ...);
    other keys are recipe overrides. It starts processes: a script calls it under `if __name__ == "__main__":`.
    """
    import dataclasses
    from pathlib import Path

    from normtune.comparison import Request
    from normtune.comparison import compare as run
    from normtune.recipe import load_recipe, override_texts
    from normtune.world import resolve, resolve_path

    known = {field.name for field in dataclasses.fields(Request)}
    asked = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items() if key in known}
    source = load_recipe(recipe, override_texts({key: value for key, value in options.items() if key not in known}))
    asked["encoders"] = tuple(map(resolve_path, asked.get("encoders", ())))
    request = Request(**{"seeds": (source.seed,), **asked})  # type: ignore[arg-type]
    folder = Path(out) if out else None
    return run(resolve(source), request, folder, engine=engine, source=source)  # type: ignore[arg-type]


def analyze(run: Any, **options: Any) -> Any:
    """What changed inside a tuned model; options and result as in `normtune.analysis.analyze_run`."""
    from normtune.analysis import analyze_run
    from normtune.world import resolve_path

    paths = {key: resolve_path(str(options.pop(key))) for key in ("data", "images") if options.get(key) is not None}
    return analyze_run(run, **paths, **options)  # type: ignore[arg-type]


def plan(recipe: Any, **overrides: Any) -> Any:
    """The memory plan of a recipe's hungriest stage, as `normtune.memory.Plan`; from configs alone."""
    from normtune.memory import plan_recipe
    from normtune.recipe import load_recipe, override_texts
    from normtune.world import resolve

    plans = plan_recipe(resolve(load_recipe(recipe, override_texts(overrides))))
    return max(plans, key=lambda found: found.peak_bytes)


def evaluate(model: Any, *, benchmarks: list[str], data: Any, force: bool = False, **options: Any) -> Any:
    """Scores of a run, adapter or MLLM folder; options and result as in `normtune.evaluation.evaluate_model`."""
    from normtune.evaluation import evaluate_model
    from normtune.tuned import open_tuned
    from normtune.world import resolve_path

    tuned = open_tuned(model, force=force)
    return evaluate_model(tuned.model, tuned.processor, benchmarks, resolve_path(str(data)), **options)
