"""How questions become a model's inputs: prompts, images, left padding; and in which batches.

Scope: images are opened when their turn comes. A LLaVA gets the features of an image once for all questions about it,
through `mm_encoder_outputs`, or from a store, so that its encoder does not run; any other model goes the whole way
through its own processor. Which questions share a batch follows from the questions and the batch size alone, so that
an evaluation that was interrupted forms the same batches again. Not here: what is done with the inputs (`answering`).

Shapes: B batch, S tokens of the longest prompt, N images, T tokens of an image, H hidden size of the LLM, P tokens and
D values of a stored feature.
"""

from __future__ import annotations

import inspect
from collections.abc import Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LlavaProcessor, PreTrainedModel, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from normtune.chat import PLACEHOLDER, Chat, Turn
from normtune.errors import InputError
from normtune.evaluation.prefixes import shared_inputs
from normtune.features import Store, can_store
from normtune.images import open_image, to_rgb
from normtune.strategy import tuning

# Prompts are sorted by length within this many batches, and the image features of as many are held at once:
# enough to save padding, few enough for the features of 7B models (576 x 4096 values an image).
WINDOW = 4


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


def engine_for(
    model: PreTrainedModel, processor: ProcessorMixin, chat: Chat, store: Store | None = None
) -> Shared | Stock:
    """The engine that fits the model; with a `store` of image features if both can use it (see `can_store`)."""
    if not takes_features(model, processor):
        return Stock(model, processor)
    return Shared(model, processor, chat, store if store is not None and can_store(model) else None)


def takes_features(model: PreTrainedModel, processor: ProcessorMixin) -> bool:
    """Whether the model's forward can be given the features of images in place of pixels."""
    return isinstance(processor, LlavaProcessor) and "mm_encoder_outputs" in inspect.signature(model.forward).parameters


def batches(
    engine: Shared | Stock, requests: Sequence[Request], batch_size: int, known: Container[int] = ()
) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Places of requests and the model's inputs for them, [B, S] each, without those `known` already. Questions about
    one image are near one another, and prompts of like length together where most images have one question;
    `requests` may make its elements when asked."""
    first_seen: dict[tuple[Hashable, ...], int] = {}
    ranks = [first_seen.setdefault(request.keys, len(first_seen)) for request in requests]
    order = sorted(range(len(requests)), key=ranks.__getitem__)
    for window in chunks(order, WINDOW * batch_size):
        if all(place in known for place in window):
            continue
        # the whole window, though a part of it may be known: the same lengths, sorted alike, give the same batches
        prepared = dict(zip(window, engine.prepare([requests[i] for i in window], batch_size), strict=True))
        images = [key for place in window if (key := requests[place].keys)]
        if 2 * len(set(images)) > len(images) or isinstance(engine, Stock):  # else their beginnings are shared
            window = sorted(window, key=lambda place: prepared[place][0])
        for batch in chunks(window, batch_size):
            left = [place for place in batch if place not in known]
            if left:
                yield left, engine.inputs([prepared[place][1] for place in left])


def chunks(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (values[start : start + size] for start in range(0, len(values), size))


class Shared:
    """A LLaVA with its processor, which turns each image into one run of image tokens and nothing else:
    features are computed once per image of a window, prompts come from `Chat`. What questions about one image share
    is run once per batch. An image that is in `store` goes through the connector alone."""

    def __init__(self, model: PreTrainedModel, processor: Any, chat: Chat, store: Store | None = None) -> None:
        self.model, self.processor, self.chat, self.store = model, processor, chat, store
        self.device = model.get_input_embeddings().weight.device
        self.pad = processor.tokenizer.pad_token_id or 0

    def text(self, request: Request) -> str:
        """The prompt as it is written, one image token per image."""
        return self.chat.text(request.turns, prompt=True)

    def prepare(self, requests: Sequence[Request], batch_size: int) -> list[tuple[int, Any]]:
        """For each request its length in tokens, and (token ids, features [T, H] of its images)."""
        sources = {
            key: (image, request.where)
            for request in reversed(requests)
            for key, image in zip(request.keys, request.images, strict=True)
        }
        features = self.stored(sources, batch_size)
        for keys in chunks([key for key in sources if key not in features], batch_size):
            pictures = [opened(*sources[key]) for key in keys]
            pixels = self.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
            output = self.model.get_image_features(pixel_values=pixels.to(self.device), return_dict=True)
            features |= zip(keys, output.pooler_output, strict=True)
        prepared: list[tuple[int, Any]] = []
        for request in requests:
            own = [features[key] for key in request.keys]
            ids = self.chat.prompt(request.turns, [len(feature) for feature in own])
            prepared.append((len(ids), (ids, own)))
        return prepared

    def stored(
        self, sources: Mapping[Hashable, tuple[Image.Image | Path, str]], batch_size: int
    ) -> dict[Hashable, torch.Tensor]:
        """Features [T, H] of those images that the store has, from what it keeps of them [P, D] each."""
        found: dict[Hashable, torch.Tensor] = {}
        if self.store is None:
            return found
        (connector,) = map(self.model.get_submodule, tuning(self.model).anatomy.connector)
        paths = self.store.stored({key: where for key, (_, where) in sources.items() if isinstance(key, Path)})
        for some in chunks(paths, batch_size):
            found |= zip(some, connector(self.store.lookup(some).to(self.device)), strict=True)
        return found

    def inputs(self, batch: Sequence[tuple[list[int], list[torch.Tensor]]]) -> dict[str, Any]:
        """`generate`'s arguments: input_ids and attention_mask [B, S] int64, padded on the left, and features; or with
        the beginnings of the prompts computed already (see `prefixes`)."""
        features = [feature for _, own in batch for feature in own]
        inputs = left_padded([ids for ids, _ in batch], features, self.pad, self.device)
        if not features:
            return inputs
        return shared_inputs(self.model, batch, inputs, self.processor.image_token_id, self.pad)


def left_padded(
    prompts: Sequence[Sequence[int]], features: Sequence[torch.Tensor], pad: int, device: torch.device
) -> dict[str, Any]:
    """input_ids and attention_mask [B, S] int64, and where there are any the features [T, H] of the images, in the
    order of their prompts."""
    width = max(map(len, prompts))
    rows = [[pad] * (width - len(ids)) + list(ids) for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor(rows, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }
    if features:
        inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=list(features))}
    return inputs


class Stock:
    """Any other model: its processor renders, tokenizes and pads each batch."""

    store = None  # its encoder always runs

    def __init__(self, model: PreTrainedModel, processor: Any) -> None:
        self.processor = processor
        self.device = model.get_input_embeddings().weight.device
        own = getattr(processor, "chat_template", None)
        self.template = {} if own else {"chat_template": processor.tokenizer.chat_template}

    def text(self, request: Request) -> str:
        """The prompt as the template writes it, before the processor puts in the tokens of an image."""
        options = {**self.template, "add_generation_prompt": True, "tokenize": False}
        return str(self.processor.apply_chat_template(_messages(request), **options))

    def prepare(self, requests: Sequence[Request], batch_size: int) -> list[tuple[int, Any]]:
        """For each request the length of its text, which stands for its number of tokens, and itself."""
        return [(sum(len(turn.text) for turn in request.turns), request) for request in requests]

    def inputs(self, batch: Sequence[Request]) -> dict[str, Any]:
        """`generate`'s arguments as the processor makes them, padded on the left."""
        encoded = self.processor.apply_chat_template(
            [_messages(request) for request in batch],
            **self.template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        return dict(encoded.to(self.device))


def opened(image: Image.Image | Path, where: str) -> Image.Image:
    """The image in mode RGB. InputError that names the question and the file for one that cannot be read."""
    if not isinstance(image, Path):
        return to_rgb(image)
    try:
        return open_image(image, where)
    except InputError as error:
        raise InputError(f"{error}\nReplace the file; an evaluation into files goes on where it was.") from None


def _messages(request: Request) -> list[dict[str, Any]]:
    """The conversation as transformers' list of parts."""
    pictures = iter(request.images)
    messages = []
    for turn in request.turns:
        content: list[dict[str, Any]] = []
        for place, text in enumerate(turn.text.split(PLACEHOLDER)):
            if place:
                content.append({"type": "image", "image": opened(next(pictures), request.where)})
            if text.strip("\n"):
                content.append({"type": "text", "text": text.strip("\n")})
        messages.append({"role": turn.role, "content": content})
    return messages
