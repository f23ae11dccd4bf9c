"""Samples to batches: token ids, labels, and each distinct image once; padded to rows, or packed end to end in one row.

Scope: which samples share a micro-batch, and its tensors. Non-scope: how a conversation becomes tokens (`chat.py`),
how an image file becomes RGB (`images.py`), moving batches to a device.

Legend: B rows, S tokens of the longest, T tokens of all samples in a row, N images in the order of the prompt, U
distinct ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from transformers import LlavaProcessor

from normtune.chat import PLACEHOLDER, Chat, Encoded, Turn
from normtune.data.samples import Sample
from normtune.data.skipping import OnBad
from normtune.errors import InputError
from normtune.images import open_image

IGNORED = -100  # the label of a token that the loss leaves out
DECODED = 16  # images that are open at a time


class Features(Protocol):
    """What stands in for the vision encoder: features of images by path, computed earlier."""

    @property
    def tokens(self) -> int:
        """Of an image in the prompt."""
        ...

    def holds(self, path: Path) -> bool:
        """Whether there are any of this image."""
        ...

    def lookup(self, paths: Sequence[Path]) -> torch.Tensor:
        """(U, P, D): P patches of width D."""
        ...


@dataclass(frozen=True)
class Row:
    """A sample as tokens, with the images that its image tokens stand for.

    Attributes:
        input_ids, supervised: token ids, and for each whether the loss counts it.
        images: as many as the prompt shows.
        pixels: of each image (3, h, w) float32; one tensor for all rows that show it. None where features are stored.
        where: the sample's name for messages.
    """

    input_ids: list[int]
    supervised: list[bool]
    images: tuple[Path, ...] = ()
    pixels: tuple[torch.Tensor, ...] | None = None
    where: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)


def micro_batches(rows: Sequence[Row], size: int, packed: bool, pack_length: int) -> list[list[Row]]:
    """The rows of an optimizer step in groups, each row in one of them; the same for the same rows.

    Packed: at most `size` rows of `pack_length` tokens in all (a longer one is alone), by first fit, the longest first,
    which needs about 11/9 of the fewest groups at most (Johnson, 1973). Else `size` rows of about one length.
    """
    ordered = sorted(rows, key=len, reverse=True)
    if not packed:
        return [ordered[i : i + size] for i in range(0, len(ordered), size)]
    groups: list[list[Row]] = []
    room: list[int] = []
    for row in ordered:
        fits = (n for n, left in enumerate(room) if left >= len(row) and len(groups[n]) < size)
        place = next(fits, None)
        if place is None:
            place = len(groups)
            groups.append([])
            room.append(pack_length)
        groups[place].append(row)
        room[place] -= len(row)
    return groups


class Collator:
    """Samples to a batch for the model: `collator(samples)`, or `encode` and then `padded` or `packed`.

    `processor` is a `LlavaProcessor`, or another whose images become one run of image tokens and `pixel_values` alone;
    `max_length` the most tokens of a sample, image tokens included (`Chat.encode` says what is cut). With a `store`
    images are not opened: batches hold its features. `counts` adds up samples, images, tokens and supervised tokens,
    and what was left out: cut_turns, cut_tokens, cut_images, and dropped samples, of which nothing to learn remained.
    (Each worker process of a `DataLoader` counts for itself.) A sample that cannot be used, because an image of it is
    broken or because the chat template fails on it, is an error; or, with `on_bad`, told to it and left out: its row
    is one token without label, so that the batch keeps its place in the data.

    Raises:
        InputError: no chat template, or a processor that lays images out in another way.
    """

    def __init__(
        self, processor: Any, max_length: int | None, store: Features | None = None, on_bad: OnBad | None = None
    ) -> None:
        self.processor, self.max_length, self.store, self.on_bad = processor, max_length, store, on_bad
        self.chat = Chat.from_processor(processor)
        self.counts: Counter[str] = Counter()
        pad = self.chat.tokenizer.pad_token_id
        self._pad = self.chat.stop_ids[0] if pad is None else pad
        if getattr(processor, "image_processor", None) is not None:
            self._check_processor()

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """One row per sample, as `padded`. Raises as `encode`."""
        return self.padded(self.encode(samples))

    def encode(self, samples: Sequence[Sample]) -> list[Row]:
        """Samples as tokens. One of which nothing remains is one token without label; an image is opened once.

        Raises:
            InputError: naming the sample, for an image that cannot be opened and as in `Chat.encode`.
        """
        wanted: dict[Path, str] = {}
        for sample in samples:
            for path in sample.images:
                wanted.setdefault(path, sample.where)
        pixels, tokens, broken = self._look(wanted)
        encoded: list[Encoded] = []
        rows: list[Row] = []
        for sample in samples:
            reason = next((broken[path] for path in sample.images if path in broken), None)
            try:
                if reason is not None:
                    raise InputError(reason)
                found = self.chat.encode(sample.turns, [tokens[path] for path in sample.images], self.max_length)
            except InputError as error:
                if self.on_bad is None:
                    raise InputError(f"{sample.where}: {error}") from error
                self.on_bad(sample.where, str(error))
                self.counts["bad"] += 1
                found = Encoded([self.chat.stop_ids[0]], [False], 0)
            shown = sample.images[: found.images]
            own = None if self.store is not None else tuple(pixels[path] for path in shown)
            encoded.append(found)
            rows.append(Row(found.input_ids, found.supervised, shown, own, sample.where))
        self._count(encoded, sum(len(sample.images) for sample in samples))
        return rows

    def padded(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """One row per sample, padded on the right.

        Returns:
            input_ids, attention_mask (0 on padding), labels (-100 where unsupervised): [B, S] int64. If there are
            images pixel_values [U, 3, h, w] float32, each distinct image once (or `features` [U, P, D] of the store),
            and where one is shown more than once image_index [N] int64, for each image of the prompts its row.
        """
        ids = torch.full((len(rows), max(map(len, rows))), self._pad)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for number, row in enumerate(rows):
            ids[number, : len(row)], mask[number, : len(row)] = torch.tensor(row.input_ids), 1
            labels[number, : len(row)] = labels_of(row)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, **self._images(rows)}

    def packed(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """The samples end to end in one row, for `kernels.segments` and a model without a cache.

        Returns:
            input_ids, position_ids (from 0 in each sample), labels (-100 also on the first token of a sample, which
            nothing predicts): [1, T] int64; lengths [samples] int64; images as in `padded`. No attention_mask.
        """
        labels = [labels_of(row) for row in rows]
        for own in labels:
            own[0] = IGNORED
        return {
            "input_ids": torch.cat([torch.tensor(row.input_ids) for row in rows])[None],
            "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
            "labels": torch.cat(labels)[None],
            "lengths": torch.tensor([len(row) for row in rows]),
            **self._images(rows),
        }

    def image_tokens(self, size: tuple[int, int]) -> int:
        """How many tokens of the prompt stand for an image of (width, height) pixels."""
        return self._process([Image.new("RGB", size)])[1][0]

    def _images(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        places: dict[Path, int] = {}
        index = [places.setdefault(path, len(places)) for row in rows for path in row.images]
        if not index:
            return {}
        if self.store is not None:
            batch = {"features": self.store.lookup(list(places))}
        else:
            pixels = {path: own for row in rows for path, own in zip(row.images, row.pixels or (), strict=True)}
            batch = {"pixel_values": torch.stack([pixels[path] for path in places])}
        return batch if len(index) == len(places) else {**batch, "image_index": torch.tensor(index)}

    def _look(self, wanted: dict[Path, str]) -> tuple[dict[Path, torch.Tensor], dict[Path, int], dict[Path, str]]:
        """Pixels (3, h, w) float32 and the number of image tokens of each path, and why it has none where it is broken;
        `wanted` says which sample names it. InputError for a broken one where there is no `on_bad`."""
        if wanted and getattr(self.processor, "image_processor", None) is None:
            raise InputError("the data has images, but the model's processor takes none: train an MLLM")
        if self.store is not None:
            return {}, *self._stored(self.store, wanted)
        pixels: dict[Path, torch.Tensor] = {}
        tokens: dict[Path, int] = {}
        broken: dict[Path, str] = {}
        paths = list(wanted)
        for some in (paths[i : i + DECODED] for i in range(0, len(paths), DECODED)):
            opened = {}
            for path in some:
                try:
                    opened[path] = open_image(path, wanted[path])
                except InputError as error:
                    if self.on_bad is None:
                        raise
                    broken[path] = str(error).removeprefix(f"{wanted[path]}: ")
            if opened:
                values, counts = self._process(list(opened.values()))
                pixels.update(zip(opened, values, strict=True))
                tokens.update(zip(opened, counts, strict=True))
        return pixels, tokens, broken

    def _stored(self, store: Features, wanted: dict[Path, str]) -> tuple[dict[Path, int], dict[Path, str]]:
        """As `_look`: what was broken when features were computed is not among them."""
        broken: dict[Path, str] = {}
        for path in [] if self.on_bad is None else [path for path in wanted if not store.holds(path)]:
            try:
                open_image(path, wanted[path])
            except InputError as error:
                broken[path] = str(error).removeprefix(f"{wanted[path]}: ")
        whole = [path for path in wanted if path not in broken]
        return (dict.fromkeys(whole, store.tokens) if whole else {}), broken

    def _count(self, rows: Sequence[Encoded], images: int) -> None:
        used = sum(row.images for row in rows)
        self.counts.update(
            samples=len(rows),
            images=used,
            tokens=sum(len(row.input_ids) for row in rows),
            supervised=sum(sum(row.supervised) for row in rows),
            cut_turns=sum(row.cut_turns for row in rows),
            cut_tokens=sum(row.cut_tokens for row in rows),
            cut_images=images - used,
            dropped=sum(not any(row.supervised) for row in rows),
        )

    def _process(self, images: list[Image.Image]) -> tuple[torch.Tensor, list[int]]:
        """pixel_values [N, 3, h, w] float32 and the number of image tokens of each image."""
        pixels = self.processor.image_processor(images=images, return_tensors="pt")["pixel_values"].float()
        if not isinstance(self.processor, LlavaProcessor):
            sizes = [[image.height, image.width] for image in images]
            return pixels, list(self.processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"])
        # What LlavaProcessor does when it gets the text and the images together.
        height, width = pixels.shape[-2:]
        tokens = (height // self.processor.patch_size) * (width // self.processor.patch_size)
        tokens += self.processor.num_additional_image_tokens
        tokens -= self.processor.vision_feature_select_strategy == "default"
        return pixels, [tokens] * len(images)

    def _check_processor(self) -> None:
        """Compares a small batch with the processor's own: a processor with another layout would train on nonsense."""
        turns = [Turn("user", f"{PLACEHOLDER}\n{PLACEHOLDER}\nWhat?")]
        images = [Image.new("RGB", size, "gray") for size in ((48, 32), (32, 64))]
        text = self.chat.text(turns, prompt=True)
        bos = self.chat.tokenizer.bos_token
        try:
            own = self.processor(text=text, images=images, add_special_tokens=not (bos and text.startswith(bos)))
            pixels, lengths = self._process(images)
            usual = set(own) <= {"input_ids", "attention_mask", "token_type_ids", "pixel_values"}
            usual = usual and own["input_ids"][0] == self.chat.prompt(turns, lengths)
            problem = "" if usual and pixels.ndim == 4 else "it lays images out its own way"
        except Exception as error:  # whatever a foreign processor raises means the same
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        if problem:
            raise InputError(
                f"{type(self.processor).__name__} is not supported for training yet ({problem}).\n"
                "Use a LLaVA, with patch_size and vision_feature_select_strategy in its processor_config.json."
            )


def labels_of(row: Row) -> torch.Tensor:
    """(S) int64. By the mask and not by the id: the pad token may be the very token that ends a turn."""
    return torch.tensor(row.input_ids).where(torch.tensor(row.supervised), IGNORED)
