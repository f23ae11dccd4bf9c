"""A model with what was tuned on it: from a recipe, a run folder, an adapter folder or a plain MLLM folder.

Scope: opening; which kind of folder it is. Not here: the parts of that (model.py, adapter.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from normtune.adapter import load_adapter, read_adapter
from normtune.errors import InputError
from normtune.model import assemble, load
from normtune.recipe import ModelRecipe, Recipe, load_recipe


@dataclass
class Tuned:
    """A model, its processor, and where they come from (`recipe` and `record` where there are such)."""

    model: Any
    processor: Any
    recipe: Recipe | None = None
    record: dict[str, Any] | None = None


def build(recipe: ModelRecipe, seed: int = 0) -> tuple[nn.Module, Any]:
    """The untuned model of a recipe and its processor.

    Raises:
        InputError: a folder that is missing, damaged or of the wrong kind.
    """
    if recipe.path is not None:
        return load(recipe.path, dtype=recipe.dtype)
    assert recipe.llm is not None and recipe.vision is not None  # the schema sees to it
    return assemble(recipe.llm, recipe.vision, connector=recipe.connector, dtype=recipe.dtype, seed=seed)


def floating(recipe: ModelRecipe) -> ModelRecipe:
    """The same model with a bfloat16 base where it is quantized."""
    return recipe.model_copy(update={"dtype": "bfloat16"}) if recipe.dtype in ("nf4", "int8") else recipe


def open_tuned(path: str | Path, *, force: bool = False, unquantized: bool = False) -> Tuned:
    """Opens a run folder, its adapter folder, or an MLLM folder (or hub id).

    Args:
        force: also where the base's gains are not those that the adapter was trained on.
        unquantized: open the base of a run on nf4 or int8 in bfloat16, to merge into.

    Raises:
        InputError: neither of these, a run that has no adapter yet, or an adapter of another base.
    """
    folder = Path(path)
    if (folder / "recipe.yaml").is_file():
        if not (folder / "adapter" / "adapter.json").is_file():
            raise InputError(
                f"{folder} has no adapter yet: the run is not finished; go on with `normtune train --resume`"
            )
        recipe = load_recipe(folder / "recipe.yaml")
        model, processor = build(floating(recipe.model) if unquantized else recipe.model, recipe.seed)
        return Tuned(model, processor, recipe, load_adapter(model, folder / "adapter", force=force))
    if (folder / "adapter.json").is_file():
        _, record = read_adapter(folder)
        base = record.get("base")
        if not (isinstance(base, dict) and isinstance(base.get("model"), dict)):
            raise InputError(
                f"{folder}: the adapter does not say which model it belongs to; load it with normtune.load_adapter"
            )
        base_recipe = ModelRecipe.model_validate(base["model"])
        model, processor = build(floating(base_recipe) if unquantized else base_recipe, base.get("seed", 0))
        return Tuned(model, processor, None, load_adapter(model, folder, force=force))
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} is no run, adapter or model folder (no recipe.yaml, adapter.json or config.json in it)"
        )
    model, processor = load(str(path), dtype="float32")
    return Tuned(model, processor)
