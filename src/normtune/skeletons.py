"""Models of the right shapes on the meta device, from configs alone: no weights are read and none are allocated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from normtune.errors import InputError
from normtune.model import CONNECTORS
from normtune.pretrained import locate, read_config, trusted, trusting

if TYPE_CHECKING:
    from normtune.recipe import ModelRecipe


def skeleton(reference: str) -> nn.Module:
    """An MLLM or a causal LLM.

    Raises:
        InputError: no such folder or hub id, or a config of neither kind.
    """
    source = locate(reference, "model", weights=False)
    config = read_config(source, "model")
    kinds = (AutoModelForImageTextToText, AutoModelForCausalLM)
    kind = next((k for k in kinds if type(config) in k._model_mapping), None)
    if kind is None:
        raise InputError(f"model {reference} ({config.model_type}) is neither a causal LLM nor takes images and text")
    with torch.device("meta"):
        return kind.from_config(config, **trusted(source))  # type: ignore[no-any-return]


def assembled_skeleton(recipe: ModelRecipe) -> nn.Module:
    """What `normtune.assemble` would build (or the MLLM at `path`), before its vocabulary grows by an image token.

    Raises:
        InputError: as `skeleton`; a vision encoder without a vision config.
    """
    with trusting(recipe.trust_remote_code):
        return skeleton(recipe.path) if recipe.path is not None else _joined(recipe)


def _joined(recipe: ModelRecipe) -> nn.Module:
    assert recipe.llm is not None and recipe.vision is not None  # the schema sees to it
    text = read_config(locate(recipe.llm, "LLM", weights=False), "LLM")
    vision = read_config(locate(recipe.vision, "vision encoder", weights=False), "vision encoder")
    vision = getattr(vision, "vision_config", None) or vision
    if not all(hasattr(vision, key) for key in ("patch_size", "hidden_size")):
        raise InputError(
            f"vision encoder {recipe.vision} ({vision.model_type}) takes no images; give CLIP, SigLIP, DINOv2"
        )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        projector_hidden_act=CONNECTORS[recipe.connector],
        tie_word_embeddings=text.tie_word_embeddings,
    )
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)
