"""What the frozen vision encoder makes of an image, kept between requests and shared by all adapters.

Scope: pixels, features as the connector reads them, an LRU cache of these by content. Not here: the connector, which
is an adapter's own (bank/), features on disk (features/), which bytes are an image (the server).

Shapes: N images, h and w pixels, P tokens and D values of a feature, T tokens of an image in the LLM's sequence.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image

from normtune.bank import Bank, Entry
from normtune.errors import InputError
from normtune.evaluation.engines import takes_features
from normtune.features.filling import has_connector
from normtune.features.once import attribute, frozen, image_reader
from normtune.strategy import tuning

BATCH = 16  # images that go through the encoder together


@dataclass(frozen=True)
class Picture:
    """An image of a request: what is in it, as SHA-256, and its pixels [3, h, w] (None: its features are known)."""

    key: bytes
    pixels: torch.Tensor | None
    features: torch.Tensor | None


class Seeing(Protocol):
    """A `Prompt`."""

    @property
    def adapter(self) -> Entry: ...
    @property
    def pictures(self) -> Sequence[Picture]: ...


class Vision:
    """The encoder of a model whose forward takes features in place of pixels, with a cache of `limit` bytes.

    `tokens` is T. `look` may be called from any thread, `features` from the one that owns the model.

    Raises:
        InputError: no such model (see `find_vision`).
    """

    def __init__(self, bank: Bank, processor: Any, limit: int) -> None:
        model = bank.model
        found = tuning(model).anatomy
        if not (takes_features(model, processor) and has_connector(model)):
            raise InputError("this model's images do not go through one connector")
        self.processor, self.limit = processor.image_processor, limit
        self.reader: Any = image_reader(model, found)
        self.tower, self.connector = model.get_submodule(found.vision[0]), model.get_submodule(found.connector[0])
        self.weight = next(self.tower.parameters())
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self._bytes = 0
        self.encoded = self.hits = 0
        blank = self._pixels(Image.new("RGB", (64, 64)))
        self.shape = blank.shape
        with torch.inference_mode():
            features = self._encode(blank[None])
            mine = bank.connect(bank.entry(None), features)[0]  # [T, H]
            theirs = self._read(blank[None])[0]
        self.tokens = len(mine)
        tolerance = 1e-4 if theirs.dtype == torch.float32 else 5e-2
        alike = mine.shape == theirs.shape and (mine - theirs).abs().max() <= tolerance * theirs.abs().max()
        if not alike:
            raise InputError("between encoder and LLM this model has more than a connector")

    def look(self, image: Image.Image) -> Picture:
        """An image in mode RGB, as a request holds it until its turn."""
        digest = hashlib.sha256(f"{image.size}".encode())
        digest.update(image.tobytes())
        key = digest.digest()
        with self._lock:
            known = self._kept.get(key)
        if known is not None:
            return Picture(key, None, known)
        pixels = self._pixels(image)
        if pixels.shape != self.shape:
            raise InputError(f"an image of {image.width} x {image.height} pixels does not fit the vision encoder")
        return Picture(key, pixels, None)

    def features(self, pictures: Sequence[Picture]) -> list[torch.Tensor]:
        """The features [P, D] of each, in their order; the encoder runs on those that nobody asked about before."""
        found: dict[bytes, torch.Tensor] = {p.key: p.features for p in pictures if p.features is not None}
        self.hits += sum(p.features is not None for p in pictures)
        new: dict[bytes, torch.Tensor] = {}
        for picture in pictures:
            if picture.key in found or picture.key in new:
                continue
            with self._lock:
                known = self._kept.get(picture.key)  # encoded since its request came
            if known is not None:
                found[picture.key] = known
                self.hits += 1
            else:
                assert picture.pixels is not None
                new[picture.key] = picture.pixels
        keys = list(new)
        for start in range(0, len(keys), BATCH):
            some = keys[start : start + BATCH]
            for key, feature in zip(some, self._encode(torch.stack([new[key] for key in some])), strict=True):
                found[key] = feature.clone()  # its own memory: one image of a batch may be kept longer than the others
        self.encoded += len(new)
        self._keep(found)
        return [found[picture.key] for picture in pictures]

    def connected(self, bank: Bank, prompts: Sequence[Seeing]) -> list[list[torch.Tensor]]:
        """For each prompt its images [T, H] as its adapter's connector makes them."""
        features = iter(self.features([picture for prompt in prompts for picture in prompt.pictures]))
        made = []
        for prompt in prompts:
            own = [next(features) for _ in prompt.pictures]
            made.append(list(bank.connect(prompt.adapter, torch.stack(own))) if own else [])
        return made

    def _keep(self, found: dict[bytes, torch.Tensor]) -> None:
        with self._lock:
            for key, feature in found.items():
                if key not in self._kept:
                    self._kept[key] = feature
                    self._bytes += feature.nbytes
                self._kept.move_to_end(key)
            while self._bytes > self.limit and self._kept:
                _, old = self._kept.popitem(last=False)
                self._bytes -= old.nbytes

    def _pixels(self, image: Image.Image) -> torch.Tensor:
        return self.processor(images=[image], return_tensors="pt")["pixel_values"][0]  # type: ignore[no-any-return]

    def _encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[N, 3, h, w] to [N, P, D]: what the connector is given."""
        with attribute(self.connector, "forward", _as_it_is):
            return torch.stack(list(self._read(pixels)))

    def _read(self, pixels: torch.Tensor) -> Sequence[torch.Tensor]:
        with frozen(self.tower):
            out = self.reader.get_image_features(pixel_values=pixels.to(self.weight.device, self.weight.dtype))
        return out.pooler_output  # type: ignore[no-any-return]


def _as_it_is(features: torch.Tensor) -> torch.Tensor:
    return features.contiguous()


def find_vision(bank: Bank, processor: Any, limit: int) -> Vision | None:
    """The encoder whose features can be kept; None where the model has to be asked through its own processor."""
    try:
        return Vision(bank, processor, limit)
    except Exception:  # whatever a model stumbles over, it is asked as usual
        return None
