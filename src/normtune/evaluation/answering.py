"""Greedy answers in batches: conversations and images in, the assistant's texts out, in the order given.

Scope: left padding, KV cache, stop tokens of the model's own chat template; images are opened when their turn
comes. Decoding is transformers' `generate`. A LLaVA gets the features of an image once for all questions about it,
through `mm_encoder_outputs`; any other model goes the whole way through its own processor. Not here: sampling.

Shapes: B batch, S tokens of the longest prompt, N images, T tokens of an image, H hidden size of the LLM.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig, LlavaProcessor, PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from normtune.chat import PLACEHOLDER, Chat, Turn
from normtune.errors import InputError
from normtune.images import open_image, to_rgb

# Prompts are sorted by length within this many batches, and the image features of as many are held at once:
# enough to save padding, few enough for the features of 7B models (576 x 4096 values an image).
WINDOW = 4
_THOUGHT = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)


@dataclass(frozen=True)
class Request:
    """A conversation that waits for the assistant's turn, its images, and its name for error messages."""

    turns: tuple[Turn, ...]
    images: tuple[Image.Image | Path, ...]
    where: str

    def __post_init__(self) -> None:
        places = sum(turn.text.count(PLACEHOLDER) for turn in self.turns)
        if places != len(self.images):
            raise InputError(
                f"{self.where}: {places} '{PLACEHOLDER}' in the text for {len(self.images)} image(s).\n"
                f"Write '{PLACEHOLDER}' once per image."
            )

    @property
    def keys(self) -> tuple[Hashable, ...]:
        """What makes two images the same one: the path, or the object."""
        return tuple(image if isinstance(image, Path) else id(image) for image in self.images)


def answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    items: Sequence[tuple[Sequence[Turn], Sequence[Image.Image | Path]]],
    max_new_tokens: int = 128,
    batch_size: int = 32,
) -> list[str]:
    """The model's greedy answers to conversations that end with a user's turn, in the order given, stripped.

    An item is its turns, with "<image>" in the text where each image goes, and its images, as objects or as
    paths that are opened in their turn. Modes and generation settings of the model are left as they were.
    InputError when images and "<image>" do not match, or for a file that is no image."""
    requests = [Request(tuple(turns), tuple(images), f"item {n}") for n, (turns, images) in enumerate(items)]
    return generate(model, processor, requests, max_new_tokens, batch_size)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    requests: Sequence[Request],
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """As `answer`; `progress` gets the number of requests answered after each batch. Inside, questions about one
    image are asked near one another and prompts of like length together."""
    chat = Chat.from_processor(processor)
    shared = isinstance(processor, LlavaProcessor) and _takes_features(model)
    engine: _Shared | _Stock = _Shared(model, processor, chat) if shared else _Stock(model, processor)
    first_seen: dict[tuple[Hashable, ...], int] = {}
    ranks = [first_seen.setdefault(request.keys, len(first_seen)) for request in requests]
    order = sorted(range(len(requests)), key=ranks.__getitem__)
    texts = [""] * len(requests)
    done = 0
    stops = _stops(model, chat)
    with _plain_greedy(model, processor.tokenizer, stops, max_new_tokens):
        for window in _chunks(order, WINDOW * batch_size):
            prepared = dict(zip(window, engine.prepare([requests[i] for i in window], batch_size), strict=True))
            for batch in _chunks(sorted(window, key=lambda i: prepared[i][0]), batch_size):
                inputs = engine.inputs([prepared[i][1] for i in batch])
                width = inputs["input_ids"].shape[1]
                ids = model.generate(**inputs)[:, width:].tolist()  # [B, up to max_new_tokens]
                for place, row in zip(batch, ids, strict=True):
                    texts[place] = _decode(processor.tokenizer, row, stops)
                done += len(batch)
                progress(done)
    return texts


def _takes_features(model: PreTrainedModel) -> bool:
    return "mm_encoder_outputs" in inspect.signature(model.forward).parameters


def _stops(model: PreTrainedModel, chat: Chat) -> list[int]:
    """The template's stop tokens, and those that the model's own settings name (an LLM may have several)."""
    own = getattr(model.generation_config, "eos_token_id", None)
    return sorted({*chat.stop_ids, *([own] if isinstance(own, int) else own or [])})


def _decode(tokenizer: Any, ids: list[int], stop_ids: Sequence[int]) -> str:
    """The text before the first stop token, without a think block in front of it: thoughts are no answer."""
    end = next((place for place, token in enumerate(ids) if token in stop_ids), len(ids))
    return _THOUGHT.sub("", tokenizer.decode(ids[:end], skip_special_tokens=True)).strip()


def _chunks(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (values[start : start + size] for start in range(0, len(values), size))


@contextmanager
def _plain_greedy(
    model: PreTrainedModel, tokenizer: Any, stop_ids: Sequence[int], max_new_tokens: int
) -> Iterator[None]:
    """Evaluation mode and plain greedy search for a while, then everything as before.

    The model's own generation settings are exchanged, not overridden: `generate` fills what a caller leaves
    open from them, and a repetition penalty (Qwen2.5 ships one) would change greedy answers."""
    modes = [(module, module.training) for module in model.modules()]
    settings = model.generation_config
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = stop_ids[0] if stop_ids else 0
    model.eval()
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=pad,
    )
    try:
        yield
    finally:
        model.generation_config = settings
        for module, training in modes:
            module.training = training


class _Shared:
    """A LLaVA with its processor, which turns each image into one run of image tokens and nothing else:
    features are computed once per image of a window, prompts come from `Chat`."""

    def __init__(self, model: PreTrainedModel, processor: Any, chat: Chat) -> None:
        self.model, self.processor, self.chat = model, processor, chat
        self.device = model.get_input_embeddings().weight.device
        self.pad = processor.tokenizer.pad_token_id or 0

    def prepare(self, requests: Sequence[Request], batch_size: int) -> list[tuple[int, Any]]:
        """For each request its length in tokens, and (token ids, features [T, H] of its images)."""
        sources = {
            key: (image, request.where)
            for request in reversed(requests)
            for key, image in zip(request.keys, request.images, strict=True)
        }
        features: dict[Hashable, torch.Tensor] = {}
        for keys in _chunks(list(sources), batch_size):
            pictures = [_open(*sources[key]) for key in keys]
            pixels = self.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
            output = self.model.get_image_features(pixel_values=pixels.to(self.device), return_dict=True)
            features |= zip(keys, output.pooler_output, strict=True)
        prepared: list[tuple[int, Any]] = []
        for request in requests:
            own = [features[key] for key in request.keys]
            ids = self.chat.prompt(request.turns, [len(feature) for feature in own])
            prepared.append((len(ids), (ids, own)))
        return prepared

    def inputs(self, batch: Sequence[tuple[list[int], list[torch.Tensor]]]) -> dict[str, Any]:
        """`generate`'s arguments: input_ids and attention_mask [B, S] int64, padded on the left, and features."""
        width = max(len(ids) for ids, _ in batch)
        rows = [[self.pad] * (width - len(ids)) + ids for ids, _ in batch]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in batch]
        features = [feature for _, own in batch for feature in own]
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor(rows, device=self.device),
            "attention_mask": torch.tensor(mask, device=self.device),
        }
        if features:
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features)}
        return inputs


class _Stock:
    """Any other model: its processor renders, tokenizes and pads each batch."""

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        self.processor = processor
        self.device = model.get_input_embeddings().weight.device

    def prepare(self, requests: Sequence[Request], batch_size: int) -> list[tuple[int, Any]]:
        """For each request the length of its text, which stands for its number of tokens, and itself."""
        return [(sum(len(turn.text) for turn in request.turns), request) for request in requests]

    def inputs(self, batch: Sequence[Request]) -> dict[str, Any]:
        """`generate`'s arguments as the processor makes them, padded on the left."""
        encoded = self.processor.apply_chat_template(
            [_messages(request) for request in batch],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        return dict(encoded.to(self.device))


def _open(image: Image.Image | Path, where: str) -> Image.Image:
    return open_image(image, where) if isinstance(image, Path) else to_rgb(image)


def _messages(request: Request) -> list[dict[str, Any]]:
    """The conversation as transformers' list of parts."""
    pictures = iter(request.images)
    messages = []
    for turn in request.turns:
        content: list[dict[str, Any]] = []
        for place, text in enumerate(turn.text.split(PLACEHOLDER)):
            if place:
                content.append({"type": "image", "image": _open(next(pictures), request.where)})
            if text.strip("\n"):
                content.append({"type": "text", "text": text.strip("\n")})
        messages.append({"role": turn.role, "content": content})
    return messages
