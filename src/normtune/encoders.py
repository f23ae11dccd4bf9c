"""The vision encoder on its own: with its weights, or without them on the meta device.

Scope: reading it from its folder or out of an MLLM's, models whose encoder has no weights (training from stored
features never runs it). Non-scope: what its features are like (probes.py), joining it to an LLM (model.py).
"""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import nn
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from normtune.errors import InputError
from normtune.pretrained import check_complete, checked, locate, read_config, reading, trusted


def load_encoder(reference: str | os.PathLike[str], dtype: torch.dtype, weights: bool = True) -> tuple[Any, Any]:
    """The vision encoder (of a two-tower model, that one alone), its weights in `dtype`, and its image processor.

    Without `weights` the encoder is on the meta device and no weight is read.

    Raises:
        InputError: a folder that cannot be read, or a model that takes no images.
    """
    what = "vision encoder"
    source = locate(reference, what)
    config = read_config(source, what)
    config = getattr(config, "vision_config", None) or config
    encoder_class = MODEL_MAPPING.get(type(config), None)
    if encoder_class is None or getattr(encoder_class, "main_input_name", None) != "pixel_values":
        raise InputError(
            f"{what} {reference} ({config.model_type}) takes no images.\nGive a CLIP, SigLIP or DINOv2 model."
        )
    with reading(f"image processor of {what}", source):
        image_processor = AutoImageProcessor.from_pretrained(source, backend="pil", **trusted(source))
    with reading(what, source):
        if not weights:
            config.name_or_path = source
            return empty_encoder(config, dtype), image_processor
        encoder, info = AutoModel.from_pretrained(source, config=config, dtype=dtype, **checked(source))
    check_complete(info, what, source)
    return encoder.eval(), image_processor


def empty_encoder(config: Any, dtype: torch.dtype) -> Any:
    """The encoder of a config on the meta device: its structure, without values."""
    with torch.device("meta"):
        return AutoModel.from_config(config, dtype=dtype).eval()


def read_without(source: str, config: Any, part: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """An MLLM without the layers of `part` (vision_config, text_config), whose weights are not read; loading info.

    Whole where its config does not allow that.
    """
    small = copy.deepcopy(config)
    inner = getattr(small, part)
    inner.num_hidden_layers = 0
    if getattr(inner, "layer_types", None):
        inner.layer_types = []
    options |= checked(source)
    try:
        return AutoModelForImageTextToText.from_pretrained(source, config=small, **options)  # type: ignore[no-any-return]
    except Exception:  # a class that checks its config, or has another name for its layers
        return AutoModelForImageTextToText.from_pretrained(source, config=config, **options)  # type: ignore[no-any-return]


def put_encoder(model: nn.Module, name: str, encoder: Any) -> None:
    """Makes `encoder` the model's, in the place of the one of this name."""
    encoder.train(model.get_submodule(name).training)
    model.set_submodule(name, encoder.requires_grad_(False))
    model.config.vision_config = encoder.config  # type: ignore[union-attr]


def encoder_of(path: str, name: str, dtype: torch.dtype) -> Any:
    """The vision encoder `name` of an MLLM (folder or hub id), its weights in `dtype`; the LLM's layers are not read.

    Raises:
        InputError: broken or incomplete files.
    """
    source = locate(path, "model")
    config = read_config(source, "model")
    with reading("model", source):
        model, info = read_without(source, config, "text_config", dtype=dtype)
    check_complete(info, "model", source)
    return model.get_submodule(name).eval()
