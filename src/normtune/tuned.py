"""A model with what was tuned on it: from a recipe, a run folder, an adapter folder or a plain MLLM folder.

Scope: opening; which kind of folder it is. Not here: the parts of that (model.py, adapter/).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normtune.adapter import load_adapter, read_adapter
from normtune.encoders import encoder_of, load_encoder, put_encoder
from normtune.errors import InputError
from normtune.model import assemble, assembled_processor, load
from normtune.pretrained import locate, read_config, torch_dtype, trusting
from normtune.probes import Features
from normtune.processors import load_processor
from normtune.recipe import ModelRecipe, Recipe, load_recipe
from normtune.strategy import tuning


@dataclass
class Tuned:
    """A model, its processor, and where they come from (`recipe` and `record` where there are such)."""

    model: Any
    processor: Any
    recipe: Recipe | None = None
    record: dict[str, Any] | None = None


def build(recipe: ModelRecipe, seed: int = 0, known: Features | None = None) -> tuple[nn.Module, Any]:
    """The untuned model of a recipe and its processor.

    Args:
        known: features of the vision encoder as found earlier (`features.Prepared.known`): its weights are not read,
            it stays on the meta device until `attach_encoder`.

    Raises:
        InputError: a folder that is missing, damaged or of the wrong kind.
    """
    with trusting(recipe.trust_remote_code):
        if recipe.path is not None:
            return load(recipe.path, dtype=recipe.dtype, known=known)
        assert recipe.llm is not None and recipe.vision is not None  # the schema sees to it
        options: dict[str, Any] = {"connector": recipe.connector, "dtype": recipe.dtype, "seed": seed, "known": known}
        return assemble(recipe.llm, recipe.vision, **options)


def encoders_without_weights(model: nn.Module) -> dict[str, nn.Module]:
    """The vision encoders of a model that are on the meta device, by name."""
    encoders = {name: model.get_submodule(name) for name in tuning(model).anatomy.vision}
    return {name: e for name, e in encoders.items() if any(p.is_meta for p in e.parameters())}


def attach_encoder(model: nn.Module, recipe: ModelRecipe) -> None:
    """Loads the vision encoder that `build(..., known=...)` left out, to the model's device; else does nothing.

    Raises:
        InputError: its folder is missing or damaged by now.
    """
    empty = encoders_without_weights(model)
    if not empty:
        return
    (name,) = empty
    dtype = torch_dtype(recipe.dtype)
    with trusting(recipe.trust_remote_code):
        if recipe.path is not None:
            encoder = encoder_of(recipe.path, name, dtype)
        else:
            encoder, _ = load_encoder(recipe.vision or "", dtype)
    put_encoder(model, name, encoder.to(next(p.device for p in model.parameters() if not p.is_meta)))


def processor_of(model: ModelRecipe) -> Any:
    """The processor that `build` gives, without the LLM's weights. Raises as `build`."""
    with trusting(model.trust_remote_code):
        if model.path is None:
            return assembled_processor(model.llm or "", model.vision or "")
        source = locate(model.path, "model", weights=False)
        return load_processor(source, read_config(source, "model"))


def move(model: nn.Module, device: torch.device) -> None:
    """`model.to(device)`, also where the vision encoder is on the meta device: it stays there."""
    empty = encoders_without_weights(model)
    for name in empty:
        model.set_submodule(name, nn.Identity())
    try:
        model.to(device)
    finally:
        for name, encoder in empty.items():
            model.set_submodule(name, encoder)


def place(model: nn.Module, device: str = "auto") -> torch.device:
    """Moves the model to `auto` (a CUDA device where there is one), `cpu`, `cuda`, `cuda:N` or `mps`, as `move` does.

    Of several processes that torchrun started each takes the CUDA device of its number, unless one is named.

    Raises:
        InputError: no such device here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.partition(":")[0]
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(kind, False):
        raise InputError(f"device {device}: {'not found here' if kind in there else 'unknown'}; use auto or cpu")
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    move(model, torch.device(device))
    return torch.device(device)


def floating(recipe: ModelRecipe) -> ModelRecipe:
    """The same model with a bfloat16 base where it is quantized."""
    return recipe.model_copy(update={"dtype": "bfloat16"}) if recipe.dtype in ("nf4", "int8") else recipe


def open_tuned(path: str | Path, *, force: bool = False, unquantized: bool = False, dtype: str | None = None) -> Tuned:
    """Opens a run folder, its adapter folder, or an MLLM folder (or hub id).

    Args:
        force: also where the base's gains are not those that the adapter was trained on.
        unquantized: open the base of a run on nf4 or int8 in bfloat16, to merge into.
        dtype: of the weights of an MLLM folder (default: float32); a run or an adapter has its recipe's.

    Raises:
        InputError: neither of these, a run that has no adapter yet, or an adapter of another base.
    """
    folder = Path(path)
    if dtype is not None and any((folder / name).is_file() for name in ("recipe.yaml", "adapter.json")):
        raise InputError(f"{folder} is computed in its recipe's dtype; leave dtype out, or merge it into a model first")
    if (folder / "recipe.yaml").is_file():
        if not (folder / "adapter" / "adapter.json").is_file():
            raise InputError(
                f"{folder} has no adapter yet: the run is not finished; go on with\n"
                f"normtune train {folder / 'recipe.yaml'} --out {folder} --resume"
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
        base_recipe = ModelRecipe.model_validate(
            {**base["model"], "trust_remote_code": []}
        )  # no recipe: grants nothing
        model, processor = build(floating(base_recipe) if unquantized else base_recipe, base.get("seed", 0))
        return Tuned(model, processor, None, load_adapter(model, folder, force=force))
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} is no run, adapter or model folder (no recipe.yaml, adapter.json or config.json in it)"
        )
    model, processor = load(str(path), dtype=dtype or "float32")
    return Tuned(model, processor)
