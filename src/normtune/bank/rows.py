"""The forwards of a mixed batch: each row on the gains, the connector, the embedding and the head of its own entry.

The gains of a batch are gathered once per composition; then a norm runs once for all rows. On a base that is not fp32
rows with gains of their own run as under `load_adapter`, the others on the base's own forward. A head and a connector
run on all rows once per distinct one, and rows are picked from the results, so that no bit of a row depends on which
others are in the batch. Nothing of the model is exchanged: twins hold the gathered tensors, so threads do not meet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from normtune.bank.entries import Entry, Layout, bare_twin, shell
from normtune.bank.ways import Way
from normtune.errors import InputError
from normtune.kernels import promote
from normtune.kernels.replacing import Forward, Replaced, call

Groups = list[tuple[nn.Module | None, torch.Tensor]]
"""A module of its own (None: the base's) and the rows, int64, that run on it."""


class Current(threading.local):
    """What the present thread's forwards run on; a thread of its own has a selection of its own."""

    selection: Selection | None = None
    images: tuple[int, ...] = ()

    def __init__(self, held: bool = False) -> None:
        self.held = held  # by a bank that is open

    def __reduce__(self) -> tuple[type[Current], tuple[()]]:  # copies of the model start without
        return Current, ()


class Banked(Replaced):
    """The forward of a module in a bank: `banked(module, before, current, name, kind, ...)`."""

    @property
    def held(self) -> bool:
        return bool(self.args[2].held)


def banked(
    module: nn.Module, before: Forward | None, current: Current, name: str, kind: str, *args: Any, **kwargs: Any
) -> Any:
    """The module's forward under the selection of this thread, if there is one."""
    selection = current.selection
    if selection is None:
        return call(module, before, *args, **kwargs)
    given = args[0] if args else next(iter(kwargs.values()))
    key = (name, given.dim())
    forward = selection.forwards.get(key)
    if forward is None:
        with torch.inference_mode(False):  # what is kept for later may meet autograd there
            forward = selection.forwards[key] = selection.forward(name, module, before, kind, given.dim())
    if kind == "connector":
        return forward(current.images, *args, **kwargs)
    if given.shape[0] != selection.size:
        flat = kind == "norm" and given.dim() == 2  # some mixers give a norm of heads [B S heads, H]
        if flat and given.shape[0] % selection.size == 0:
            return by_batch(selection, name, module, before, args, kwargs)
        raise InputError(
            f"{name} is given {given.shape[0]} rows where {selection.size} have an adapter; "
            "give one per row of the batch"
        )
    return forward(*args, **kwargs)


def by_batch(
    selection: Selection, name: str, module: nn.Module, before: Forward | None, args: Any, kwargs: Any
) -> torch.Tensor:
    """A norm on [B N, H], the rows of a sample one after another: run on [B, N, H]."""
    given = args[0] if args else next(iter(kwargs.values()))

    def apart(value: Any) -> Any:
        same = isinstance(value, torch.Tensor) and value.shape[:1] == given.shape[:1]
        return value.unflatten(0, (selection.size, -1)) if same else value

    key = (name, given.dim() + 1)
    forward = selection.forwards.get(key)
    if forward is None:
        with torch.inference_mode(False):
            forward = selection.forwards[key] = selection.forward(name, module, before, "norm", given.dim() + 1)
    result = forward(*map(apart, args), **{key: apart(value) for key, value in kwargs.items()})
    return result.flatten(0, 1)  # type: ignore[no-any-return]


class Selection:
    """Entries of the rows of a batch, with what their forwards need; to be used for many steps."""

    def __init__(self, layout: Layout, ways: dict[str, Way], entries: Sequence[Entry]) -> None:
        if not entries:
            raise InputError("a batch needs at least one row")
        self.layout, self.ways, self.entries, self.size = layout, ways, tuple(entries), len(entries)
        self.device = entries[0].gains.device
        same = all(entry is entries[0] for entry in entries)
        gains = [entry.gains for entry in (entries[:1] if same else entries)]
        self.gains = torch.stack(gains).float()  # [B, G], or [1, G] where all rows are one adapter's
        self.forwards: dict[tuple[str, int], Forward] = {}

    def forward(self, name: str, module: nn.Module, before: Forward | None, kind: str, dims: int) -> Forward:
        """How the module runs on input of so many dimensions; connectors take the rows of the images first."""
        base = partial(call, module, before)
        if kind == "norm":
            return self.norm(name, module, base, dims)
        if kind == "connector":
            return partial(by_image, [entry.modules.get(name) for entry in self.entries], self.device, base)
        groups = grouped([entry.modules.get(name) for entry in self.entries], self.device)
        return partial(group_by_group if kind == "embed" else picked, groups, base)

    def norm(self, name: str, module: nn.Module, base: Forward, dims: int) -> Forward:
        """One forward for all rows, or the base's for those that the adapters leave alone."""
        touched = [name in entry.touched for entry in self.entries]
        if not any(touched):
            return base
        dtypes = [self.layout.dtypes[key] for key in self.layout.norms[name].values() if key in self.layout.dtypes]
        mine = self.by_row(name, module, dims, dtypes[0] if dtypes else None)
        exact = not dtypes and self.entries[0].gains.dtype == torch.float32  # gains that nobody tuned are the base's
        if exact or all(touched):
            return mine
        mask = torch.tensor(touched, device=self.device).view(-1, *[1] * (dims - 1))
        return lambda *args, **kwargs: torch.where(mask, mine(*args, **kwargs), base(*args, **kwargs))

    def by_row(self, name: str, module: nn.Module, dims: int, dtype: torch.dtype | None) -> Forward:
        """The norm with each row's own gains."""
        way = self.ways[name]
        if len(self.gains) == 1:
            return self.finished(bare_twin(module, self.own(name, 0)), dtype)
        if way.groups:
            twins: dict[int, nn.Module] = {}
            for row, entry in enumerate(self.entries):
                if id(entry) not in twins:
                    twins[id(entry)] = twin = bare_twin(module, self.own(name, row))
                    twin.forward = self.finished(twin, dtype)
                    twins[id(entry)] = shell(twin)
            groups = grouped([twins[id(entry)] for entry in self.entries], self.device)
            return partial(group_by_group, groups, partial(call, module, None))
        shapes = {short: self.layout.places[key].shape for short, key in self.layout.norms[name].items()}
        gathered = {
            short: gains.reshape(self.size, *[1] * (dims - 1 - len(shapes[short])), *shapes[short])
            for short, gains in self.own(name, None).items()
        }
        return self.finished(way.twin(module, gathered), dtype)

    def own(self, name: str, row: int | None) -> dict[str, torch.Tensor]:
        """The norm's tensors of a row, in their shapes, or of all rows [B, values]."""
        found = {}
        for short, key in self.layout.norms[name].items():
            place = self.layout.places[key]
            values = self.gains[:, place.start : place.stop]
            found[short] = values if row is None else values[row].view(place.shape)
        return found

    def finished(self, twin: nn.Module, dtype: torch.dtype | None) -> Forward:
        """The twin's forward, on fp32 input where the base is of another dtype."""
        if dtype is None:
            return twin.forward
        own = twin.forward
        promote(twin, dtype, is_norm=True)
        promoted = shell(twin).forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if len(args) != 1 or kwargs or args[0].dtype != dtype:
                return promoted(*args, **kwargs)
            return own(args[0].float()).to(dtype)  # the same, without a look for parameters to cast: 19 us, not 25

        return forward

    def check(self) -> None:
        """After a forward of the model: raises InputError where it did not call a norm of which rows have gains."""
        called = {name for name, _ in self.forwards}
        missing = [name for name in self.layout.norms if any(name in e.touched for e in self.entries)]
        missing = [name for name in missing if name not in called]
        if missing:
            raise InputError(
                f"{missing[0]} is no module that the model calls, so rows have no gains of their own there"
            )


def by_image(
    modules: Sequence[nn.Module | None],
    device: torch.device,
    base: Forward,
    images: tuple[int, ...],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Images [N, P, D] through the connectors of their rows; `modules` are those of the rows."""
    if all(module is modules[0] for module in modules):
        return runs(modules[0], base)(*args, **kwargs)
    features = args[0] if args else next(iter(kwargs.values()))
    if features.shape[0] != len(images):
        raise InputError(
            f"the connector is given {tuple(features.shape)} where the rows of {len(images)} images are known;\n"
            "rows with connectors of their own need `images`, and a model that keeps its images apart"
        )
    return picked(grouped([modules[row] for row in images], device), base, *args, **kwargs)


def grouped(modules: Sequence[nn.Module | None], device: torch.device) -> Groups:
    """Distinct modules and their places, in order of first use."""
    rows: dict[int, list[int]] = {}
    for row, module in enumerate(modules):
        rows.setdefault(id(module), []).append(row)
    return [(modules[found[0]], torch.tensor(found, device=device)) for found in rows.values()]


def runs(module: nn.Module | None, base: Forward) -> Callable[..., torch.Tensor]:
    return base if module is None else module.forward


def picked(groups: Groups, base: Forward, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Each distinct module on all rows, and of its result the rows that are its own."""
    results = ((rows, runs(module, base)(*args, **kwargs)) for module, rows in groups)
    return joined(groups, ((rows, result if len(groups) == 1 else result[rows]) for rows, result in results))


def group_by_group(groups: Groups, base: Forward, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Each distinct module on its own rows alone: lookups and norms, whose rows know nothing of one another."""
    size = sum(len(rows) for _, rows in groups)

    def some(value: Any, rows: torch.Tensor) -> Any:
        batched = isinstance(value, torch.Tensor) and value.shape[:1] == (size,) and len(groups) > 1
        return value[rows] if batched else value

    parts = (
        (rows, runs(module, base)(*(some(v, rows) for v in args), **{k: some(v, rows) for k, v in kwargs.items()}))
        for module, rows in groups
    )
    return joined(groups, parts)


def joined(groups: Groups, parts: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Rows and what was computed for them, as one batch."""
    size, result = sum(len(rows) for _, rows in groups), None
    for rows, part in parts:
        if len(groups) == 1:
            return part
        result = part.new_empty(size, *part.shape[1:]) if result is None else result
        result[rows] = part
    assert result is not None
    return result
