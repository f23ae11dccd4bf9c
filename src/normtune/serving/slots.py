"""Keys and values of rows that come and go: a row's tokens lie in the first columns of its slot, whatever others have.

transformers' continuous batching would do this for text; its requests are token ids and nothing else (`add_request` of
5.23 has no place for pixels or embeddings), so this is a cache of our own under the model's own forward. Each decoding
step writes one column per row, at that row's length, so that nobody is moved when a row joins or leaves, and a step
that fails can be made again. Not here: who the rows are (joining.py), what their tokens become.

Shapes: R slots, B rows in use, n rows that join, h heads, d values of a head, W columns, V vocabulary, T tokens of an
image, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from normtune.bank import Bank, Entry
from normtune.evaluation.engines import left_padded
from normtune.evaluation.prefixes import check_plain

ROOM = 64  # columns are added and given back by so many at least


@dataclass
class Row:
    """What a row begins with: token ids, and embeddings [T, H] of its images."""

    entry: Entry
    ids: Sequence[int]
    images: Sequence[torch.Tensor]


class Where:
    """Which rows a step is about: shared by all layers."""

    rows = slice(0, 0)
    index: torch.Tensor  # of the rows, int64 [B]
    columns: torch.Tensor  # where each one's next token goes, int64 [B]
    width = 0  # W, the new column included


class Layer(DynamicLayer):
    """One layer's keys and values [R, h, W, d], of which a step sees its rows and columns."""

    def __init__(self, where: Where) -> None:
        super().__init__()
        self.where, self.is_initialized = where, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        where = self.where
        seen = []
        for kept, new in ((self.keys, key_states), (self.values, value_states)):
            assert kept is not None
            kept[where.index, :, where.columns] = new[:, :, 0]
            seen.append(kept[where.rows, :, : where.width])
        return seen[0], seen[1]

    def get_seq_length(self) -> int:
        return self.where.width - 1


class Slots:
    """Rows of a model that decode together, `most` at a time. `entries` and `lengths` say what is in each row."""

    def __init__(self, bank: Bank, pad: int, most: int) -> None:
        self.bank, self.pad, self.most = bank, pad, most
        self.model: Any = bank.model
        self.device = device_of(bank)
        self.entries: list[Entry] = []
        self.lengths: list[int] = []
        self._where, self._cache = Where(), DynamicCache()
        self._chosen: Any = None  # gains of the rows as they are, while nobody joins or leaves

    def __len__(self) -> int:
        return len(self.lengths)

    def prefill(self, rows: Sequence[Row]) -> tuple[torch.Tensor, Any]:
        """Logits [n, V] of the token after each prompt, and the cache that `join` takes. TypeError: not a plain cache
        of keys and values."""
        images = [image for row in rows for image in row.images]
        inputs = left_padded([row.ids for row in rows], images, self.pad, self.device)
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with self.bank.rows([row.entry for row in rows]):
            out = self.model(**inputs, position_ids=positions, use_cache=True, logits_to_keep=1)
        check_plain(out.past_key_values)
        return out.logits[:, -1], out.past_key_values

    def join(self, rows: Sequence[Row], cache: Any) -> None:
        """Adds rows, with the keys and values that `prefill` computed of them."""
        start, total = len(self), len(self) + len(rows)
        lengths = [len(row.ids) for row in rows]
        self._fit(total, max([*self.lengths, *lengths]) + 1, cache)
        for mine, layer in zip(self._cache.layers, cache.layers, strict=True):
            for kept, new in ((mine.keys, layer.keys), (mine.values, layer.values)):
                kept[start:total] = 0  # what another row left may not be finite, and 0 times that would count
                for number, length in enumerate(lengths):
                    kept[start + number, :, :length] = new[number, :, new.shape[2] - length :]
        self.entries += [row.entry for row in rows]
        self.lengths += lengths
        self._chosen = None

    def step(self, tokens: Sequence[int], rows: slice | None = None) -> torch.Tensor:
        """Logits [B, V] after the newest token of each row; of `rows` alone where they are given.

        Raises what the model raises; the rows are then as they were before."""
        rows = slice(0, len(self)) if rows is None else rows
        columns = self.lengths[rows]
        self._fit(len(self), max(*self.lengths, max(columns) + 1), self._cache)  # not for those who are not asked
        where = self._where
        where.rows, where.width = rows, max(columns) + 1
        where.index = torch.arange(rows.start, rows.stop, device=self.device)
        where.columns = torch.tensor(columns, device=self.device)
        if self._chosen is None or len(columns) < len(self):
            chosen = self.bank.select(self.entries[rows])
            self._chosen = chosen if len(columns) == len(self) else None
        else:
            chosen = self._chosen
        last = where.columns[:, None]
        with self.bank.rows(chosen):
            logits = self.model(
                input_ids=torch.tensor([[token] for token in tokens], device=self.device),
                attention_mask=(torch.arange(where.width, device=self.device) <= last).long(),
                position_ids=last,
                past_key_values=self._cache,
                use_cache=True,
            ).logits[:, -1]
        self.lengths[rows] = [length + 1 for length in columns]
        return logits  # type: ignore[no-any-return]

    def leave(self, gone: Sequence[int]) -> list[int]:
        """Takes rows out; returns which of the old rows each remaining one is. The last rows fill the gaps."""
        order = list(range(len(self)))
        for row in sorted(gone, reverse=True):
            last = len(order) - 1
            if row < last:
                for layer in self._cache.layers:
                    for kept in (layer.keys, layer.values):
                        kept[row] = kept[last]  # type: ignore[index]  # with the zeros after it, as in `join`
                order[row] = order[last]
                self.lengths[row], self.entries[row] = self.lengths[last], self.entries[last]
            order.pop()
            self.lengths.pop()
            self.entries.pop()
        if gone:
            self._chosen = None
        if not order:
            self._cache.layers = []
        return order

    def _fit(self, rows: int, width: int, like: Any) -> None:
        """Room for so many rows and columns, and not for many more than that."""
        layers = self._cache.layers
        have = layers[0].keys.shape if layers else (0, 0, 0, 0)
        wide = width > have[2] or have[2] > 4 * width + ROOM
        if rows <= have[0] and not wide:
            return
        columns = width + max(ROOM, width // 4) if wide else have[2]
        slots = max(rows, min(2 * have[0], 2 * rows, self.most)) if rows > have[0] else have[0]
        made: list[Any] = []
        for number, layer in enumerate(like.layers):
            mine = Layer(self._where)
            for name in ("keys", "values"):
                new = getattr(layer, name)
                room = new.new_zeros(slots, new.shape[1], columns, new.shape[3])
                if layers:
                    old = getattr(layers[number], name)[: len(self)]
                    both = min(columns, old.shape[2])
                    room[: len(self), :, :both] = old[:, :, :both]
                setattr(mine, name, room)
            made.append(mine)
        self._cache.layers = made


def device_of(bank: Bank) -> torch.device:
    """Where token ids go."""
    model: Any = bank.model
    return model.get_input_embeddings().weight.device  # type: ignore[no-any-return]


def can_join(bank: Bank, pad: int, tokens: int) -> bool:
    """Whether the model computes the same for rows that join and leave: tried once, with ids below `tokens`; logits
    are compared with those of each row alone, computed whole. A model that fails on the way does not.

    Learned positions that follow the columns, sliding windows and recurrent states do not."""
    try:
        with torch.inference_mode():
            return _joins(bank, pad, tokens)
    except Exception:  # whatever a model stumbles over, its batches wait for one another
        return False


def _joins(bank: Bank, pad: int, tokens: int) -> bool:
    base, model, slots = bank.entry(None), bank.model, Slots(bank, pad, 3)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, tokens, (n,), generator=generator).tolist() for n in (7, 23, 12)]
    starts = [len(text) - 4 for text in texts]
    found: list[tuple[int, int, torch.Tensor]] = []  # which text, how many of its tokens, the logits after them
    rows: list[int] = []
    at = list(starts)

    def join(some: list[int]) -> None:
        begun = [Row(base, texts[number][: starts[number]], []) for number in some]
        logits, cache = slots.prefill(begun)
        found.extend((number, starts[number], logits[place]) for place, number in enumerate(some))
        slots.join(begun, cache)
        rows.extend(some)

    def step() -> None:
        logits = slots.step([texts[number][at[number]] for number in rows])
        for place, number in enumerate(rows):
            at[number] += 1
            found.append((number, at[number], logits[place]))

    join([0, 1])
    step()
    join([2])
    step()
    left = slots.leave([0])
    rows[:] = [rows[place] for place in left]
    step()
    limit = 1e-4 if model.dtype == torch.float32 else 5e-2
    for number, length, logits in found:
        whole = torch.tensor([texts[number][:length]], device=slots.device)
        with bank.rows([base]):
            alone = model(input_ids=whole, attention_mask=torch.ones_like(whole), use_cache=False).logits[0, -1]
        scale = alone.float().abs().max().clamp(min=1.0)
        if not float((alone - logits).float().abs().max() / scale) <= limit:  # NaN is no agreement
            return False
    return True
