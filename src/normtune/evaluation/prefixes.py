"""The beginning of a prompt, image included, run once for all questions of a batch about that image.

POPE asks 6 questions about an image in each split, VQAv2 five, MME two, and an image takes up most of a prompt (576
tokens in LLaVA-1.5). Keys and values of the beginning are computed for the distinct images and handed to each question;
padding then stands between the beginning and the question. Whether a model computes the same so is tried on the first
batch: learned positions that do not follow the mask, sliding windows and recurrent states do not. Not here: which
questions share a batch (`engines`).

Shapes: B questions, U distinct images, P tokens of the beginning, S of the longest rest, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

Prompt = tuple[list[int], list[torch.Tensor]]
"""Token ids, and the features [T, H] of each image."""

_shares: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def shared_inputs(
    model: PreTrainedModel, batch: Sequence[Prompt], plain: dict[str, Any], image_id: int, pad: int
) -> dict[str, Any]:
    """`generate`'s arguments for the prompts with their beginnings computed; `plain` where nothing is shared or the
    model does not take them so."""
    length = common_length(batch, image_id)
    if not length or _shares.get(model) is False:
        return plain
    if model not in _shares:
        _shares[model] = _agrees(model, batch, plain, length, pad)
        if not _shares[model]:
            return plain
    return _inputs(model, batch, length, pad, plain["input_ids"].device)


def common_length(batch: Sequence[Prompt], image_id: int) -> int:
    """P: how many tokens all prompts begin with alike, up to the end of their one image; 0 unless images are shared."""
    if any(len(features) != 1 for _, features in batch):
        return 0
    if len({id(features[0]) for _, features in batch}) == len(batch):
        return 0
    first = batch[0][0]
    length = len(first) - first[::-1].index(image_id)
    alike = all(ids[:length] == first[:length] and image_id not in ids[length:] for ids, _ in batch)
    return length if alike and all(len(ids) > length for ids, _ in batch) else 0


def _inputs(
    model: PreTrainedModel, batch: Sequence[Prompt], length: int, pad: int, device: torch.device
) -> dict[str, Any]:
    """input_ids and attention_mask [B, P + S], and the cache of the first P tokens."""
    distinct: dict[int, torch.Tensor] = {}
    for _, (feature,) in batch:
        distinct.setdefault(id(feature), feature)
    beginning = torch.tensor([batch[0][0][:length]] * len(distinct), device=device)  # [U, P]
    cache = model(
        input_ids=beginning,
        attention_mask=torch.ones_like(beginning),
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=list(distinct.values()))},
        use_cache=True,
        logits_to_keep=1,
    ).past_key_values
    check_plain(cache)
    places = list(distinct)
    rows = torch.tensor([places.index(id(feature)) for _, (feature,) in batch], device=device)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.index_select(0, rows), layer.values.index_select(0, rows)
    width = max(len(ids) for ids, _ in batch)
    padded = [ids[:length] + [pad] * (width - len(ids)) + ids[length:] for ids, _ in batch]
    mask = [[1] * length + [0] * (width - len(ids)) + [1] * (len(ids) - length) for ids, _ in batch]
    return {
        "input_ids": torch.tensor(padded, device=device),
        "attention_mask": torch.tensor(mask, device=device),
        "past_key_values": cache,
    }


def check_plain(cache: Any) -> None:
    """TypeError for what is no cache of every token's keys and values."""
    if not isinstance(cache, DynamicCache) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise TypeError("not a plain cache of keys and values")


class _First(LogitsProcessor):
    """Keeps the logits of the first token [B, V]."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.logits = scores.float()
        return scores


def _agrees(model: PreTrainedModel, batch: Sequence[Prompt], plain: dict[str, Any], length: int, pad: int) -> bool:
    """Whether both ways give the same logits, to rounding; a model that fails on the shared way does not."""
    found = []
    try:
        for inputs in (plain, _inputs(model, batch, length, pad, plain["input_ids"].device)):
            first = _First()
            model.generate(**inputs, logits_processor=LogitsProcessorList([first]), max_new_tokens=1)
            found.append(first.logits)
    except Exception:  # whatever a model stumbles over, it is asked as usual
        return False
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    return bool((found[0] - found[1]).abs().max() <= tolerance * found[0].abs().max().clamp(min=1.0))
