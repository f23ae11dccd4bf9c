"""Whether an encoder and an LLM fit stock LLaVA, found by running each once rather than by its name.

Scope: the features of an encoder (how many tokens, which of them are not patches, their width) at the size that
its own image processor produces; whether an LLM is an embedding, a body and a linear head. Non-scope: loading
them (`model.py`). Source: what transformers' `LlavaModel`, `LlavaForConditionalGeneration` and `LlavaProcessor`
do (Liu et al., 2023); registers: Darcet et al., 2024.

Shapes: B images, T tokens of the encoder, S of the LLM, H a hidden size, h and w pixels of a preprocessed image.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from normtune.errors import InputError

_USABLE = "Use an encoder with a fixed patch grid, such as CLIP, SigLIP (fixed resolution) or DINOv2."


@dataclass(frozen=True)
class Features:
    """The features that LLaVA reads from an encoder, for one image."""

    height: int  # h, pixels
    width: int  # w, pixels
    patch_size: int  # pixels; (h // patch_size) * (w // patch_size) patches
    tokens: int  # T, all tokens of the encoder
    special: int  # leading tokens that are not patches: CLS, registers
    layer: int  # index into the encoder's hidden states

    @property
    def strategy(self) -> str:
        """LLaVA's `vision_feature_select_strategy`: `default` drops the first token (CLS), `full` none."""
        return "default" if self.special else "full"

    @property
    def length(self) -> int:
        """Tokens per image in the LLM's sequence. Registers behind a CLS token stay among them."""
        return self.tokens - (1 if self.special else 0)


def probe_encoder(encoder: Any, image_processor: Any, name: str) -> Features:
    """Run `encoder` once on two images of noise, preprocessed by `image_processor`, and describe its features.

    Tokens that come out of the embedding alike for both images do not depend on the image: they are CLS and
    register tokens, and LLaVA needs them in front of the patches. The first of them is taken for CLS. The
    feature layer is the last but one for every encoder, with CLS or without, as in LLaVA and Prismatic: the last
    layer serves the encoder's own pre-training loss. An encoder of a single layer gives that layer.

    Raises InputError, naming `name`, if the encoder does not fit LLaVA: variable shapes (NaFlex), features not
    of shape [B, T, H], special tokens elsewhere, a patch grid that does not match the image.
    """
    weight = next(encoder.parameters())
    pixels = _pixels(image_processor, name).to(weight.device, weight.dtype)
    with _running(f"vision encoder {name} does not run on preprocessed images", _USABLE):
        states = encoder(pixels, output_hidden_states=True, return_dict=True).hidden_states
    if not states or any(not isinstance(s, torch.Tensor) or s.ndim != 3 or len(s) != 2 for s in states):
        raise InputError(f"vision encoder {name} gives no hidden states of shape [B, T, H].\n{_USABLE}")
    layer = -2 if len(states) > 2 else -1
    first, chosen = states[0], states[layer]
    hidden_size = getattr(encoder.config, "hidden_size", None)
    if first.shape != chosen.shape or chosen.shape[-1] != hidden_size:
        raise InputError(
            f"vision encoder {name}: hidden states {tuple(first.shape)} at first, {tuple(chosen.shape)} at layer "
            f"{layer}, hidden_size {hidden_size} in its config; LLaVA needs one shape throughout.\n{_USABLE}"
        )
    same = (first[0] - first[1]).float().abs().amax(-1) <= 1e-6 * first.float().abs().amax()  # [T]
    special, tokens = int(same.sum()), chosen.shape[1]
    if not bool(same[:special].all()):
        raise InputError(f"vision encoder {name} has special tokens behind its patch tokens.\n{_USABLE}")
    height, width = pixels.shape[-2:]
    patch_size = _patch_size(encoder.config, height, width, tokens - special)
    if patch_size is None:
        raise InputError(
            f"vision encoder {name} makes {tokens} tokens ({special} of them special) of {height} x {width} pixels, "
            f"which is no grid of its patches (patch_size {getattr(encoder.config, 'patch_size', None)}).\n{_USABLE}"
        )
    return Features(height, width, patch_size, tokens, special, layer)


def _pixels(image_processor: Any, name: str) -> torch.Tensor:
    """Two images of noise, wide and tall, as the processor gives them: [2, 3, h, w] float32."""
    noise = np.random.default_rng(0)
    images = [Image.fromarray(noise.integers(0, 256, shape, dtype=np.uint8)) for shape in ((48, 64, 3), (64, 48, 3))]
    with _running(f"image processor of {name} does not preprocess an RGB image", _USABLE):
        outputs = [image_processor(images=[image], return_tensors="pt") for image in images]
        pixels = [output["pixel_values"] for output in outputs]
    extra = sorted(set(outputs[0]) - {"pixel_values"})
    if extra or pixels[0].ndim != 4:
        raise InputError(
            f"vision encoder {name} takes variable shapes (NaFlex or tiles: its image processor gives "
            f"{', '.join(extra) or 'pixel_values of shape ' + str(tuple(pixels[0].shape))}).\n{_USABLE}"
        )
    if pixels[0].shape != pixels[1].shape:
        raise InputError(
            f"image processor of {name} gives images of different sizes ({tuple(pixels[0].shape[-2:])} and "
            f"{tuple(pixels[1].shape[-2:])} pixels).\nSet a fixed size or a crop in its preprocessor_config.json."
        )
    return torch.cat(pixels)


def _patch_size(config: Any, height: int, width: int, patches: int) -> int | None:
    """The patch size in pixels by which `LlavaProcessor` counts `patches`: the declared one, or one that fits if none
    is declared; None if it does not fit (an encoder that merges or masks patches)."""
    declared = getattr(config, "patch_size", None)
    if isinstance(declared, list | tuple) and len(set(declared)) == 1:
        declared = declared[0]
    candidates = range(1, min(height, width) + 1) if declared is None else [declared]
    return next((p for p in candidates if isinstance(p, int) and (height // p) * (width // p) == patches), None)


def probe_llm(language: Any, image_length: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Make sure that stock LLaVA can express a causal LM: embedding, base model, one linear head without bias.

    Returns token ids [1, S] and what the head reads for them [1, S, H], for `check_text`. A scale or a soft cap on the
    logits shows because the hidden states are enlarged in front of the head. Raises InputError, naming `name`, also
    if its context has no room for an image of `image_length` tokens.
    """
    kind = language.config.model_type
    room = getattr(language.config, "max_position_embeddings", None)
    if isinstance(room, int) and image_length >= room:
        raise InputError(
            f"LLM {name} reads at most {room} tokens, and one image takes {image_length}.\n"
            "Choose an encoder with fewer tokens per image, or an LLM with a longer context."
        )
    base, head, embed = language.base_model, language.get_output_embeddings(), language.get_input_embeddings()
    size = language.config.hidden_size
    fits = base is not language and type(head) is nn.Linear and head.bias is None
    if not fits or head.weight.shape != embed.weight.shape or embed.weight.shape[1] != size:
        raise InputError(
            f"LLM {name} ({kind}): stock LLaVA needs an LLM with an embedding and a head without bias, both of the "
            "hidden size.\nChoose another LLM."
        )
    ids = torch.linspace(0, embed.weight.shape[0] - 1, 9).long()[None]  # [1, S]
    seen: list[torch.Tensor] = []  # what the head reads, and what it writes for 1024 times as much

    def enlarge(_head: nn.Module, inputs: Any) -> Any:
        seen.append(inputs[0])
        return (inputs[0] * 1024,)  # a power of two: exact

    hooks = [
        head.register_forward_pre_hook(enlarge),
        head.register_forward_hook(lambda _head, _inputs, output: seen.append(output)),
    ]
    try:
        with _running(f"LLM {name} ({kind}) does not run", "Choose another LLM."):
            logits = language(input_ids=ids, use_cache=False, return_dict=True).logits
    finally:
        for hook in hooks:
            hook.remove()
    if len(seen) != 2 or not _close(logits, seen[1]):
        raise InputError(
            f"LLM {name} ({kind}) scales or caps its logits behind the head, which stock LLaVA cannot "
            "express.\nChoose another LLM."
        )
    return ids, seen[0]


def check_text(model: Any, ids: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """The assembled model must still be the LLM on text: the same hidden states for the same ids."""
    kind = model.config.text_config.model_type
    with _running(f"LLM {name} ({kind}) does not run inside LLaVA", "Choose another LLM."):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    if not _close(hidden, expected):
        raise InputError(
            f"LLM {name} ({kind}) reads more than token embeddings, which stock LLaVA does not pass "
            "on.\nChoose another LLM."
        )


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to the rounding of their dtype, relative to the largest value."""
    a, b = a.float(), b.float()
    return bool((a - b).abs().max() <= 2e-2 * b.abs().max()) and bool(a.isfinite().all())


@contextmanager
def _running(failure: str, advice: str) -> Iterator[None]:
    """Without gradients; whatever a model of another kind raises becomes an InputError."""
    try:
        with torch.no_grad():
            yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise InputError(f"{failure}: {reason}\n{advice}") from error
