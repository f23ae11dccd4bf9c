"""One adapter of a bank, ready to run: its gains end to end, and modules of its own where it has more than gains.

Not here: reading adapters (adapter/), forwards of a batch (rows.py).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import torch
from torch import nn

from normtune.adapter import Adapter
from normtune.errors import InputError
from normtune.kernels import promote
from normtune.kernels.replacing import HOOKED
from normtune.strategy import LLM_GAINS, parameters, tuning
from normtune.structure import Anatomy

Gate: TypeAlias = Literal["none", "image"]
ELSEWHERE = "merge it (normtune.merge) and serve it as a model of its own"


@dataclass(frozen=True, eq=False)
class Entry:
    """An adapter of a bank as it was when it was asked for; later changes of the bank do not touch it.

    Attributes:
        name: None is the base.
        gate: `image`: requests without an image run on the base.
        gains: [G] gains and biases of the LLM's norms end to end, the base's where the adapter has none.
        touched: names of the norms of which the adapter holds a tensor.
        modules: name of embedding, head or connector -> one that computes with the adapter's tensors.
        base: the base's entry; None: this is it.
        bytes: of the tensors.
    """

    name: str | None
    gate: Gate
    gains: torch.Tensor
    touched: frozenset[str] = frozenset()
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    base: Entry | None = None
    bytes: int = 0

    def for_request(self, has_image: bool) -> Entry:
        """This entry, or the base's where it is gated and the request has no image."""
        return self.base if self.gate == "image" and not has_image and self.base is not None else self


@dataclass(frozen=True)
class Place:
    """Where a norm's tensor lies in `Entry.gains`."""

    start: int
    shape: torch.Size

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """Which tensors of a model a row can have of its own.

    Attributes:
        places: name of a norm's parameter -> its place.
        norms: name of a norm -> its own parameters' short names -> their names in the model.
        others: name of an embedding, head or connector -> `embed`, `head` or `connector`.
        names: identity of a parameter -> its name in the model; tied ones have one.
        dtypes: name of a parameter -> its dtype in the base, where that is not fp32.
    """

    places: dict[str, Place]
    norms: dict[str, dict[str, str]]
    others: dict[str, str]
    names: dict[int, str]
    dtypes: dict[str, torch.dtype]

    @property
    def size(self) -> int:
        """G."""
        return max((place.stop for place in self.places.values()), default=0)


def layout_of(model: nn.Module, found: Anatomy) -> Layout:
    """The layout of a model whose anatomy is `found`; weights may be on the meta device."""
    present = parameters(model)
    names = {id(parameter): name for name, parameter in present.items()}
    places: dict[str, Place] = {}
    norms: dict[str, dict[str, str]] = {}
    start = 0
    for norm in (name for part in LLM_GAINS for name in found.modules(part)):
        own = dict(model.get_submodule(norm).named_parameters(recurse=False))
        norms[norm] = {short: names[id(parameter)] for short, parameter in own.items()}
        for short, name in norms[norm].items():
            if name not in places:
                places[name] = Place(start, own[short].shape)
                start = places[name].stop
    others = {name: part for part in ("embed", "head", "connector") for name in found.modules(part)}
    dtypes = {name: p.dtype for name, p in present.items() if p.dtype != torch.float32}
    return Layout(places, norms, others, names, dtypes | tuning(model).origin)


def base_entry(model: nn.Module, layout: Layout, dtype: torch.dtype) -> Entry:
    """The model's own gains, stored in `dtype`.

    Raises:
        InputError: they are on several devices.
    """
    present = parameters(model)
    values = [present[name].detach() for name in layout.places]
    devices = sorted({str(value.device) for value in values})
    if len(devices) > 1:
        raise InputError(f"a bank needs the LLM on one device; it is on {', '.join(devices)}")
    gains = torch.cat([value.reshape(-1).to(dtype) for value in values])
    return Entry(None, "none", gains, bytes=gains.nbytes)


def entry_of(model: nn.Module, layout: Layout, base: Entry, name: str, adapter: Adapter, gate: str | None) -> Entry:
    """An adapter as an entry; `gate` None: as the adapter's record says.

    Raises:
        InputError: an unknown gate.
    """
    gate = gate or adapter.record.get("gate") or "none"
    if gate not in get_args(Gate):
        raise InputError(f"adapter {name!r}: gate {gate!r} is neither none nor image")
    gains = base.gains.clone()
    for key, place in layout.places.items():
        if key in adapter.tensors:
            gains[place.start : place.stop] = adapter.tensors[key].reshape(-1).to(gains)
    touched = frozenset(n for n, own in layout.norms.items() if any(key in adapter.tensors for key in own.values()))
    present = parameters(model)
    rest = [key for key in adapter.tensors if key not in layout.places]
    values = {key: adapter.tensors[key].to(present[key].device, torch.float32, copy=True) for key in rest}
    modules = {}
    for root in layout.others:
        module = model.get_submodule(root)
        if any(layout.names.get(id(parameter)) in values for parameter in module.parameters()):
            modules[root] = twin_of(module, layout, values)
    size = gains.nbytes + sum(value.nbytes for value in values.values())
    return Entry(name, gate, gains, touched, modules, base, size)  # type: ignore[arg-type]


def twin_of(module: nn.Module, layout: Layout, values: Mapping[str, torch.Tensor]) -> nn.Module:
    """The module with those tensors in place of its own, as `load_adapter` would make it; shares everything else."""
    own = {n: values.get(layout.names.get(id(p), ""), p) for n, p in module.named_parameters(recurse=False)}
    made = bare_twin(module, own)
    made._modules = {
        name: None if child is None else twin_of(child, layout, values) for name, child in module._modules.items()
    }
    for short, parameter in module.named_parameters(recurse=False):
        name = layout.names.get(id(parameter), short)
        if name in layout.dtypes and (name in values or parameter.dtype == torch.float32):
            promote(made, layout.dtypes[name])
            break
    return shell(made)


def shell(twin: nn.Module) -> nn.Module:
    """The twin behind another one that holds its forward, which holds the twin: in a circle their tensors would stay
    until Python looks for circles, which a server of a large model seldom does."""
    made = copy.copy(twin)
    vars(twin).pop("forward", None)
    return made


def bare_twin(module: nn.Module, own: Mapping[str, torch.Tensor]) -> nn.Module:
    """A shallow copy that runs its class's forward, with `own` in place of the parameters of these names."""
    made = copy.copy(module)
    for place in ("forward", HOOKED):  # they are bound to the module
        vars(made).pop(place, None)
    made._parameters = {**module._parameters, **own}  # type: ignore[dict-item]
    return made


def refuse_parts(name: str, adapter: Adapter, model: nn.Module, layout: Layout, found: Anatomy) -> None:
    """Raises InputError, with the reason, where an adapter holds what rows of one batch cannot have of their own."""
    if adapter.lora is not None:
        raise InputError(f"adapter {name!r} holds LoRA, and a bank serves gains by row; {ELSEWHERE}")
    present = parameters(model)
    if foreign := [key for key in adapter.tensors if key not in present]:
        raise InputError(
            f"adapter {name!r} belongs to another base: this model has no {foreign[0]};\n"
            "give an adapter that was trained on this base, or serve that one on its own"
        )
    constants = found.constants(model)
    allowed = {*layout.places}
    for root in layout.others:
        own = model.get_submodule(root).parameters()
        allowed |= {layout.names[id(p)] for p in own if id(p) in layout.names and id(p) not in constants}
    wrong = [key for key in adapter.tensors if key not in allowed]
    if wrong:
        vision = any(wrong[0].startswith(f"{root}.") for root in found.vision)
        what = "trains the vision encoder" if vision else "trains weights beside norms, connector, embedding and head"
        raise InputError(f"adapter {name!r} {what} ({wrong[0]}),\nand rows of one batch share these; {ELSEWHERE}")
