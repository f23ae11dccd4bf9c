"""`Bank`: adapters of one base by name, added, replaced and removed while other threads decode; generation by row.

A change of the bank is one assignment of a new table; a batch that runs keeps the entries that it began with. The
model's modules get a forward that does nothing unless a thread is inside `rows`. Not here: the forwards (rows.py).
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from normtune.adapter import Adapter
from normtune.adapter.interchange import is_peft, read_peft
from normtune.adapter.loading import KEY, check_fit, verify_base
from normtune.bank.entries import Entry, Layout, base_entry, entry_of, layout_of, refuse_parts
from normtune.bank.rows import Banked, Current, Selection, banked
from normtune.bank.ways import Way, way_of
from normtune.errors import InputError, did_you_mean
from normtune.kernels.replacing import Replaced, is_held, is_plain, put_back, replace
from normtune.layers import unwrapped
from normtune.strategy import LLM_GAINS, is_offloaded, tuning
from normtune.structure.norms import key_of

KEPT = 8  # compositions of a batch whose gathered gains are kept


def bank(
    model: nn.Module, adapters: Mapping[str, str | Path | Adapter] | None = None, *, dtype: torch.dtype = torch.float32
) -> Bank:
    """One base with many adapters, each row of a batch on its own; the model is the bank's until `close`.

    Args:
        adapters: name -> adapter folder (ours or of PEFT's LNTuning), or an adapter in memory.
        dtype: that gains are stored in; bfloat16 halves the memory and rounds them.

    Raises:
        InputError: as `Bank.add`; another dtype, or a model with LoRA, an active adapter, tuned gains or another bank.
    """
    made = Bank(model, dtype=dtype)
    try:
        for name, adapter in (adapters or {}).items():
            made.add(name, adapter)
    except BaseException:
        made.close()
        raise
    return made


class Bank:
    """Adapters of one base by name. A context manager: leaving it is `close`."""

    def __init__(self, model: nn.Module, *, dtype: torch.dtype = torch.float32) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise InputError(f"a bank stores gains in float32 or bfloat16, not in {dtype}")
        inner = unwrapped(model)
        if not is_held(inner):  # a deep copy of a bank's model brought idle forwards along
            for module in inner.modules():
                put_back(module, Banked)
        refuse_model(inner)
        layout = layout_of(inner, tuning(inner).anatomy)
        self._begin(model, layout, base_entry(inner, layout, dtype))

    def _begin(self, model: nn.Module, layout: Layout, base: Entry) -> None:
        """Takes hold of the modules that the layout names."""
        self.model, self._inner = model, unwrapped(model)
        self._anatomy = tuning(self._inner).anatomy
        self._layout, self._base = layout, base
        self._ways = self._find_ways()
        self._entries: dict[str, Entry] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._current = Current(held=True)
        self._selections: OrderedDict[tuple[int, ...], Selection] = OrderedDict()
        for name, kind in {**dict.fromkeys(layout.norms, "norm"), **layout.others}.items():
            replace(self._inner.get_submodule(name), Banked, banked, self._current, name, kind)

    def _find_ways(self) -> dict[str, Way]:
        known: dict[tuple[object, ...], Way] = {}
        found = {}
        for name in self._layout.norms:
            module = self._inner.get_submodule(name)
            key = key_of(module)
            if key not in known:
                known[key] = way_of(module)
            found[name] = known[key]
        return found

    @property
    def names(self) -> list[str]:
        """Of the adapters, in the order in which they came."""
        return list(self._entries)

    @property
    def bytes(self) -> int:
        """Of the tensors of all entries, the base's gains included."""
        return self._base.bytes + sum(entry.bytes for entry in self._entries.values())

    @property
    def never_sampled(self) -> list[int]:
        """Token ids that stand for an image or a video, in this model's configuration."""
        keys = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
        ids = (getattr(getattr(self._inner, "config", None), key, None) for key in keys)
        return sorted({number for number in ids if isinstance(number, int) and number >= 0})

    def add(
        self,
        name: str,
        adapter: str | Path | Adapter,
        *,
        gate: Literal["none", "image"] | None = None,
        replace: bool = False,
    ) -> None:
        """Reads and checks an adapter, then puts it in at once; batches that run already do not see it.

        Args:
            gate: in place of what the adapter's record says; `image`: requests without an image run on the base.
            replace: an adapter of that name.

        Raises:
            InputError: a name that is empty or taken, no adapter, another base, tensors that do not fit, or an adapter
                with LoRA, weights of the LLM's layers or of the vision encoder. The bank is as it was then.
        """
        if not name or not isinstance(name, str):
            raise InputError("an adapter in a bank needs a name")
        if isinstance(adapter, Adapter):
            where = Path(name)
        else:
            where = Path(adapter)
            adapter = read_peft(where, self._inner) if is_peft(where) else Adapter.read(where)
        refuse_parts(name, adapter, self._inner, self._layout, self._anatomy)
        if adapter.base:
            verify_base(self._inner, adapter, where)
        check_fit(self._inner, adapter, where)
        entry = entry_of(self._inner, self._layout, self._base, name, adapter, gate)
        with self._lock:
            self._check_open()
            if name in self._entries and not replace:
                raise InputError(
                    f"adapter {name!r} is in the bank already; replace it (replace=True) or choose another"
                )
            self._entries = {**self._entries, name: entry}
            self._selections.clear()  # of an adapter that was replaced

    def remove(self, name: str) -> None:
        """Takes an adapter out; batches that run on it finish on it.

        Raises:
            InputError: an unknown name.
        """
        with self._lock:
            self.entry(name)
            self._entries = {key: entry for key, entry in self._entries.items() if key != name}
            self._selections.clear()

    def entry(self, name: str | None) -> Entry:
        """An adapter as it is now; None: the base.

        Raises:
            InputError: an unknown name.
        """
        entries = self._entries
        if name is None:
            return self._base
        if name not in entries:
            known = f"there are {', '.join(list(entries)[:20])}" if entries else "it is empty"
            raise InputError(f"no adapter {name!r} in the bank{did_you_mean(name, entries)}; {known}")
        return entries[name]

    def select(self, entries: Sequence[Entry]) -> Selection:
        """What the rows of a batch need, for many steps; that of the last compositions is kept, but not of adapters
        that the bank does not have any more.

        Raises:
            InputError: no rows, or the bank is closed.
        """
        key = tuple(map(id, entries))
        with self._lock:
            self._check_open()
            found = self._selections.get(key)
            if found is None:
                with torch.inference_mode(False):  # the next to use it may not be in it
                    found = Selection(self._layout, self._ways, entries)
                if not all(e is self._base or self._entries.get(e.name or "") is e for e in entries):
                    return found
                self._selections[key] = found
                if len(self._selections) > KEPT:
                    self._selections.popitem(last=False)
            self._selections.move_to_end(key)
            return found

    @contextmanager
    def rows(self, entries: Sequence[Entry] | Selection, images: Sequence[int] = ()) -> Iterator[None]:
        """Within, and in this thread, row i of a batch [B, S, ...] runs on `entries[i]`.

        Args:
            images: row of the k-th image that the connector sees; needed where connectors differ.

        Raises:
            InputError: the bank is closed, or was closed within: what was computed then is the base's in part.
        """
        self._check_open()
        current = self._current
        before = current.selection, current.images
        current.selection = entries if isinstance(entries, Selection) else self.select(entries)
        current.images = tuple(images)
        try:
            yield
        finally:
            current.selection, current.images = before
        self._check_open()

    def connect(self, entry: Entry, features: torch.Tensor) -> torch.Tensor:
        """[N, P, D] of the vision encoder -> [N, T, H] by this entry's connector, each image on its own.

        Raises:
            InputError: the model has no single connector.
        """
        names = self._anatomy.connector
        if len(names) != 1:
            raise InputError(f"the model has {len(names)} connectors, not one; connect images in its own forward")
        module = entry.modules.get(names[0])
        with self.rows([self._base]):
            run = module.forward if module is not None else self._inner.get_submodule(names[0])
            return torch.cat([run(image[None]) for image in features])

    def generate(self, *, adapters: Sequence[str | None], **inputs: Any) -> torch.Tensor:
        """`model.generate(**inputs)`, row i on adapter `adapters[i]` (None: the base); returns token ids [B, S].

        Tokens that stand for an image are never sampled. Images find their rows by the image tokens in `input_ids`.

        Raises:
            InputError: an unknown name, not one per row, beams, or images that the rows' tokens do not account for.
        """
        ids = inputs.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or len(ids) != len(adapters):
            raise InputError(f"give input_ids [B, S] and one adapter per row; there are {len(adapters)} adapters")
        settings = inputs.get("generation_config") or getattr(self._inner, "generation_config", None)
        keys = ("num_beams", "num_return_sequences")
        if any((inputs.get(key) or getattr(settings, key, None) or 1) != 1 for key in keys):
            raise InputError("a bank generates one sequence per row; leave out num_beams and num_return_sequences")
        silent = self.never_sampled
        counts = [int(n) for n in torch.isin(ids, ids.new_tensor(silent)).sum(1)] if silent else [0] * len(ids)
        pixels = inputs.get("pixel_values")
        shown = [count > 0 or (not silent and pixels is not None) for count in counts]
        entries = [self.entry(name).for_request(has_image) for name, has_image in zip(adapters, shown, strict=True)]
        images = rows_of_images(counts, len(pixels)) if isinstance(pixels, torch.Tensor) else []
        own = inputs.pop("suppress_tokens", None) or getattr(settings, "suppress_tokens", None) or []
        suppressed = {*silent, *own}
        if (given := inputs.get("generation_config")) is not None:
            inputs["generation_config"] = given = copy.deepcopy(given)
            given.suppress_tokens = sorted(suppressed) or None
        elif suppressed:
            inputs["suppress_tokens"] = sorted(suppressed)
        selection = self.select(entries)
        with self.rows(selection, images):
            found: torch.Tensor = self.model.generate(**inputs)  # type: ignore[operator]
        selection.check()
        return found

    def _check_open(self) -> None:
        if self._closed:
            raise InputError("the bank is closed; make another one on the model")

    def close(self) -> None:
        """The model's own forwards again; the bank is empty and cannot be used any more."""
        with self._lock:
            self._closed = True
            for name in (*self._layout.norms, *self._layout.others):
                put_back(self._inner.get_submodule(name), Banked)
            self._entries = {}
            self._selections.clear()

    def __enter__(self) -> Bank:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def refuse_model(model: nn.Module) -> None:
    """Raises InputError for a model that is no untouched base."""
    state = tuning(model)
    if is_offloaded(model):
        raise InputError("the model is offloaded to the CPU or the disk by accelerate; load it without offloading")
    loaded = vars(model).get(KEY)
    if loaded is not None and loaded.active is not None:
        raise InputError(f"adapter {loaded.active!r} is active in the model; remove_adapter it before making a bank")
    if state.lora is not None:
        raise InputError("the model holds LoRA; a bank needs the base alone")
    gains = {f"{name}.{n}" for part in LLM_GAINS for name in state.anatomy.modules(part)
             for n, _ in model.get_submodule(name).named_parameters(recurse=False)}  # fmt: skip
    tuned = [name for name in state.tuned if name in gains]
    if tuned:
        raise InputError(f"{tuned[0]} was tuned in the model; save its adapter, and make the bank on the base")
    for name in gains:
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(vars(module).get("forward"), Banked):
            raise InputError("the model has a bank already; add to that one, or close it")
        if not is_plain(module) and not isinstance(vars(module).get("forward"), Replaced):
            raise InputError(f"{name} belongs to a norm whose forward was replaced; a bank needs the class's own")


def rows_of_images(counts: Sequence[int], images: int) -> list[int]:
    """Rows of the images, in their order, from how many image tokens each row has; empty where these do not tell."""
    total = sum(counts)
    if not images or not total or total % images or any(count % (total // images) for count in counts):
        return []
    return [row for row, count in enumerate(counts) for _ in range(count // (total // images))]
