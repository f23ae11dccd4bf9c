"""A request as the engine takes it: the adapter, token ids or the conversation itself, images half prepared.

Scope: what can be done before it is a request's turn, in any thread. Not here: what a client may send (the server),
the model.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from PIL import Image

from normtune.bank import Bank, Entry
from normtune.chat import Chat, Turn
from normtune.errors import InputError
from normtune.evaluation.engines import Request, Stock
from normtune.images import to_rgb
from normtune.serving.vision import Picture, find_vision

THIN = 100  # where an image's short side is scaled to n pixels, one so many times as long takes THIN n n of them


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for the assistant's turn.

    `adapter` is the bank's entry as it was when the prompt was made, whatever becomes of its name; `ids` are the
    tokens, those of images included, `tokens` their number. A model that is asked through its own processor gets the
    `request` instead, its images in mode RGB.
    """

    adapter: Entry
    request: Request | None
    ids: list[int]
    pictures: tuple[Picture, ...]
    tokens: int

    @property
    def bytes(self) -> int:
        """Of pixels that wait for the model; features are shared, and counted by their cache."""
        images = self.request.images if self.request is not None else ()
        whole = sum(3 * image.width * image.height for image in images if isinstance(image, Image.Image))
        return whole + sum(picture.pixels.nbytes for picture in self.pictures if picture.pixels is not None)


class Prompts:
    """Makes prompts for the models of a bank; all of it may be called from any thread.

    `stock` is the engine of models that are asked through their own processor, None where features are used."""

    def __init__(self, bank: Bank, processor: Any, max_context: int | None, cache_bytes: int) -> None:
        self.bank, self.processor, self.max_context = bank, processor, max_context
        self.tokenizer, self.chat = processor.tokenizer, Chat.from_processor(processor)
        self.vision = find_vision(bank, processor, cache_bytes)
        self.stock = None if self.vision is not None else Stock(bank.model, processor)
        self.lock = threading.Lock()  # tokenizers are not made for several threads at a time
        size = getattr(getattr(processor, "image_processor", None), "size", None) or {}
        self._short = bool(size.get("shortest_edge") and not size.get("longest_edge"))  # CLIP: then cuts the middle out

    def prepare(self, turns: Sequence[Turn], images: Sequence[Image.Image], adapter: str | None) -> Prompt:
        """InputError: an unknown adapter, "<image>" and images that do not match, more tokens than the context has,
        a text that is none, an image that is a line."""
        entry = self.bank.entry(adapter).for_request(bool(images))
        if any(re.search("[\ud800-\udfff]", turn.text) for turn in turns):  # half a pair, or a byte that is no UTF-8
            raise InputError("the text has half of a surrogate pair, which no tokenizer takes; write it as UTF-8")
        for width, height in (image.size for image in images):
            if self._short and max(width, height) > THIN * min(width, height):
                raise InputError(
                    f"an image of {width} x {height} pixels is too thin for this model's processor;\n"
                    f"cut it to at most {THIN} times as long as wide"
                )
        request = Request(tuple(turns), tuple(to_rgb(image) for image in images), "the request")
        if self.vision is None:
            assert self.stock is not None
            try:
                with self.lock:
                    tokens = self.stock.inputs([request])["input_ids"].shape[1]
            except (TemplateError, ValueError) as error:  # an image's token in the text, a picture that is a line
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise InputError(f"the model's processor does not take this conversation: {reason}") from None
            return self._checked(Prompt(entry, request, [], (), tokens))
        pictures = tuple(self.vision.look(image) for image in request.images if isinstance(image, Image.Image))
        lengths = [self.vision.tokens] * len(pictures)
        with self.lock:
            ids = self.chat.prompt(request.turns, lengths)
        if ids.count(self.processor.image_token_id) != sum(lengths):
            raise InputError(f"the text contains {self.processor.image_token}, which stands for an image")
        return self._checked(Prompt(entry, None, ids, pictures, len(ids)))

    def _checked(self, prompt: Prompt) -> Prompt:
        if self.max_context is not None and prompt.tokens >= self.max_context:
            raise InputError(
                f"the prompt has {prompt.tokens} tokens, and the context of the model {self.max_context}; shorten it"
            )
        return prompt
