"""Which encoder, seen through which image processor, makes a feature: the key of a store.

Scope: from a recipe's model to a JSON document, without loading a weight into a model. Non-scope: the store itself.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers import AutoImageProcessor, AutoProcessor
from transformers.utils.hub import cached_file

from normtune.pretrained import locate, read_config, reading, torch_dtype, trusted, trusting
from normtune.skeletons import skeleton
from normtune.structure import dissect

if TYPE_CHECKING:
    from normtune.recipe import ModelRecipe

FORMAT = 1  # of what is stored and how it is computed: a new one leaves older stores alone
_VOLATILE = ("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")


def identity(recipe: ModelRecipe) -> dict[str, Any]:
    """Encoder (SHA-256 of its weights, config), image processor, feature layer and strategy, dtype.

    Raises:
        InputError: a folder that is missing or damaged, or a processor that cannot be read.
    """
    what = "vision encoder" if recipe.path is None else "model"
    source = locate(recipe.path or recipe.vision or "", what)
    with trusting(recipe.trust_remote_code):
        config = read_config(source, what)
        with reading(f"image processor of {what}", source):
            if recipe.path is None:
                processor = AutoImageProcessor.from_pretrained(source, backend="pil", **trusted(source))
            else:
                processor = AutoProcessor.from_pretrained(source, **trusted(source)).image_processor
        vision = getattr(config, "vision_config", None) or config
        tower = None
        if recipe.path is not None:  # its name in the model is a part of its tensors' names in the files
            found = dissect(skeleton(recipe.path)).vision
            tower = found[0].rpartition(".")[2] if len(found) == 1 else None
    facts = {
        "format": FORMAT,
        "weights": weights_key(source, what, tower),
        "config": {key: value for key, value in vision.to_dict().items() if key not in _VOLATILE},
        "image_processor": processor.to_dict(),
        # of an encoder on its own, both follow from the encoder
        "layer": getattr(config, "vision_feature_layer", None),
        "select": getattr(config, "vision_feature_select_strategy", None),
        "dtype": str(torch_dtype(recipe.dtype)),
    }
    return json.loads(json.dumps(facts, sort_keys=True, default=str))  # type: ignore[no-any-return]


def identity_key(facts: dict[str, Any]) -> str:
    """A folder's name for an identity."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def weights_key(source: str, what: str, tower: str | None) -> str:
    """SHA-256 of names, shapes and values of the weights at `source`, of those of `tower` alone where there are any."""
    digest = hashlib.sha256()
    with reading(what, source):
        files = weight_files(source)
        chosen: list[tuple[str, Path]] = []
        for path in files:
            with safe_open(path, framework="pt") as file:
                chosen += [(key, path) for key in file.keys()]  # noqa: SIM118
        own = [(key, path) for key, path in chosen if tower is not None and tower in key.split(".")]
        for key, path in sorted(own or chosen):
            with safe_open(path, framework="pt") as file:
                value = file.get_tensor(key)
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def weight_files(source: str) -> list[Path]:
    """The weight files of a folder or hub id, fetched where they are not here yet: they are loaded next."""

    def find(name: str) -> Path | None:
        path = cached_file(
            source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        return None if path is None else Path(path)

    if (index := find("model.safetensors.index.json")) is not None:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [path for path in map(find, names) if path is not None]
    if (path := find("model.safetensors")) is not None:
        return [path]
    raise OSError("it has no weight files")
