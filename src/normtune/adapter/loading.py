"""Adapters in a model: saved from it, loaded into it by name, switched, removed.

While an adapter is active, model = base + that adapter: its tensors hold the adapter's values (fp32, frozen), gains
that it leaves alone the base's. Where no adapter is active the model is as it was before the first one was loaded.
Switching writes the tensors of the adapters concerned, in place, and no other. Not here: what values mean
(arithmetic.py), plain models (merging.py).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normtune.adapter.arithmetic import Adapter, Tensors, other_base, shown
from normtune.adapter.files import FORMAT, Lora
from normtune.adapter.interchange import is_peft, read_peft
from normtune.adapter.lora import check_lora, lora_of, lora_parameters, put_lora
from normtune.errors import InputError, did_you_mean
from normtune.kernels import is_quantized
from normtune.layers import unwrapped
from normtune.runlog import provenance
from normtune.strategy import (
    Tuning,
    base_gains,
    changed,
    hold_base,
    is_offloaded,
    is_trained,
    mark_tuned,
    match_precision,
    parameters,
    refuse_banked,
    refuse_cast,
    settle,
    to_float32,
    tuning,
    witnesses,
)

KEY = "_normtune_adapters"


@dataclass
class Loaded:
    """The adapters of a model; kept on the model as `_normtune_adapters`.

    Attributes:
        active: name of the adapter in use, or None.
        placed, lora: what the active adapter has put into the model.
        own, own_lora: what was trained on the model itself, where an adapter took its place; LoRA with its options.
        whole: whether the last change came to its end; else `placed` names whatever it may have written.
    """

    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: str | None = None
    placed: Tensors = field(default_factory=dict)
    lora: Lora | None = None
    own: Tensors = field(default_factory=dict)
    own_lora: tuple[dict[str, Any], Lora] | None = None
    whole: bool = True


def save_adapter(model: nn.Module, folder: str | Path, *, replace: bool = False, **facts: Any) -> Path:
    """Writes the trained tensors of `model` (whole or not at all); `facts` (base, recipe hash, ...) go into the JSON.

    Args:
        replace: an adapter that is in the folder already.

    Raises:
        InputError: nothing was tuned, or the folder exists (unless `replace`).
        JobError: the disk is full, or the model was cast as a whole since it was tuned.
    """
    return capture(model, **facts).write(folder, replace=replace)


def capture(model: nn.Module, **facts: Any) -> Adapter:
    """The adapter that `save_adapter` writes; fp32 tensors of a model on the CPU are the model's own, not copies.

    Raises:
        InputError: nothing was tuned.
        JobError: the model was cast as a whole since it was tuned.
    """
    model = unwrapped(model)
    state, present = tuning(model), parameters(model)
    refuse_cast(model)
    names = [name for name in state.tuned if name in present]
    if not names and state.lora is None:
        raise InputError("the model has no tuned tensors; call normtune.apply and train before saving an adapter")
    tensors = {name: present[name].detach().to("cpu", torch.float32) for name in names}
    record = {
        "format": FORMAT,
        **trained_as(model, state),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "lora": state.lora,
        "dtype": str(state.dtype).removeprefix("torch."),
        **facts,
        "provenance": provenance(),
    }
    base = {**base_gains(model), **witnesses(model)}
    return Adapter(tensors, base, record, None if state.lora is None else lora_of(model))


def trained_as(model: nn.Module, state: Tuning) -> dict[str, Any]:
    """Strategy and parts: those of the active adapter, unless another strategy was applied since it was loaded."""
    loaded, report = vars(model).get(KEY), state.report
    if loaded and loaded.active is not None and not any(p.requires_grad for p in model.parameters()):
        record = loaded.adapters[loaded.active].record
        return {"strategy": record.get("strategy"), "parts": list(record.get("parts") or [])}
    return {"strategy": report.strategy if report else None, "parts": list(report.parts) if report else []}


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default", *, force: bool = False) -> dict[str, Any]:
    """Reads an adapter folder, keeps it under `name` and makes it the active one; returns its record.

    Its tensors become fp32 and frozen, in place of the base's. An adapter of that name is replaced. What was trained
    on the model itself comes back with `remove_adapter`. A folder that PEFT's LNTuning wrote is read, too; it does
    not say which base it belongs to, so that only names and shapes are checked. Where a change of adapters breaks off
    half way (Ctrl-C, no memory left), none is active afterwards.

    Raises:
        InputError: no adapter, a model whose own gains are not those that the adapter was trained on (unless
            `force`), tensors that do not fit, an active adapter that was trained on, or a model in a bank. The model
            is as it was then.
    """
    folder, model = Path(folder), unwrapped(model)
    refuse_banked(model)
    if is_offloaded(model):
        raise InputError("the model is offloaded to the CPU or the disk by accelerate; load it without offloading")
    adapter = read_peft(folder, model) if is_peft(folder) else Adapter.read(folder)
    if adapter.base and not force:
        verify_base(model, adapter, folder)
    check_fit(model, adapter, folder)
    loaded = vars(model).get(KEY) or Loaded()
    refuse_trained(model, loaded)
    loaded.adapters[name] = adapter
    vars(model)[KEY] = loaded
    activate(model, loaded, name)
    return adapter.record


def set_adapter(model: nn.Module, name: str | None) -> None:
    """Makes a loaded adapter the active one; None: the model as it was before the first was loaded, bit by bit.

    Raises:
        InputError: an unknown name, an active adapter that was trained on, or a model in a bank.
    """
    model = unwrapped(model)
    loaded = vars(model).get(KEY) or Loaded()
    if name is not None:
        check_name(loaded, name)
    if name != loaded.active or not loaded.whole:
        refuse_banked(model)
        refuse_trained(model, loaded)
        activate(model, loaded, name)


def remove_adapter(model: nn.Module, name: str | None = None) -> None:
    """Forgets an adapter (None: all); where it was active, the model is as before the first one was loaded.

    What was trained into an adapter since it was loaded is lost. Nothing happens where none was loaded.

    Raises:
        InputError: an unknown name, or something else was trained while the adapter was active.
    """
    model = unwrapped(model)
    loaded = vars(model).get(KEY) or Loaded()
    if name is not None:
        check_name(loaded, name)
    if not loaded.whole or (loaded.active is not None and name in (None, loaded.active)):
        refuse_trained_beside(model, loaded)
        activate(model, loaded, None)
    gone = list(loaded.adapters) if name is None else [name]
    for key in gone:
        del loaded.adapters[key]
    if not loaded.adapters:
        vars(model).pop(KEY, None)


def put_tensors(model: nn.Module, state: Tuning, values: Mapping[str, torch.Tensor]) -> None:
    """Copies fp32 values into parameters, which become fp32 and count as tuned; fp32 ones are written in place.

    Args:
        values: by plain name; names that the model lacks are left out.
    """
    hold_base(model, values)
    for name, parameter in parameters(model).items():
        if name in values:
            to_float32(state, name, parameter)
            with torch.no_grad():
                parameter.copy_(values[name])
    mark_tuned(model, values)
    match_precision(model, state)


def activate(model: nn.Module, loaded: Loaded, name: str | None) -> None:
    """Puts an adapter's tensors (None: the model's own) in place of those of the active one; broken off, the own."""
    try:
        switch(model, loaded, name)
    except BaseException:
        if not loaded.whole:
            switch(model, loaded, None)
        raise


def switch(model: nn.Module, loaded: Loaded, name: str | None) -> None:
    """Says what it is going to write before it writes, so that it can be done again from wherever it broke off."""
    if name is not None and loaded.whole and exchange(model, loaded, name):
        return
    settle(model)
    state, present = tuning(model), parameters(model)
    adapter = Adapter({}) if name is None else loaded.adapters[name]
    gains = base_gains(model).keys()
    note_own(model, loaded, {*gains, *adapter.tensors})
    if name is None:
        values, lora = loaded.own, loaded.own_lora
    else:
        values = {**{key: t for key, t in loaded.own.items() if key not in gains}, **adapter.tensors}
        lora = None if adapter.lora is None else (adapter.record["lora"], adapter.lora)
    hold_rest(state, present, adapter.tensors)
    hold_base(model, values)
    if not loaded.whole and state.lora is None:
        state.lora = {}  # some layers may have it
    loaded.placed, loaded.whole = {**loaded.placed, **values}, False
    mark_tuned(model, values)  # `settle` takes back what does not count as tuned
    put_lora(model, state, lora)
    put_tensors(model, state, values)
    release(state, present, {*loaded.placed, *loaded.own} - values.keys())
    settle(model)
    mark_tuned(model, state.tuned)  # whatever has a fingerprint from now on became trainable after this
    loaded.active = name
    loaded.placed, loaded.lora = ({}, None) if name is None else (dict(values), adapter.lora)
    loaded.whole = True


def exchange(model: nn.Module, loaded: Loaded, name: str) -> bool:
    """Where the adapter holds what the active one holds, and all is frozen, writes the values alone; whether it did."""
    state, adapter, present = tuning(model), loaded.adapters[name], parameters(model)
    alike = loaded.active is not None and adapter.tensors.keys() == loaded.placed.keys()
    if not alike or state.lora is not None or adapter.lora is not None:
        return False
    if any(p.requires_grad for p in present.values()):
        return False
    if any(present[key].dtype != torch.float32 or key not in state.tuned for key in adapter.tensors):
        return False
    loaded.whole = False
    with torch.no_grad():
        for key, value in adapter.tensors.items():
            present[key].copy_(value)
    loaded.active, loaded.placed, loaded.whole = name, dict(adapter.tensors), True
    return True


def note_own(model: nn.Module, loaded: Loaded, names: Container[str]) -> None:
    """Keeps those of `names` that were trained on the model itself, and its LoRA, before an adapter replaces them."""
    state, present = tuning(model), parameters(model)
    if loaded.active is None and loaded.whole:
        loaded.own, loaded.own_lora = {}, None if state.lora is None else (state.lora, lora_of(model))
    for name in state.tuned:
        if name in names and name not in loaded.placed:
            loaded.own.setdefault(name, present[name].detach().to("cpu", copy=True))


def hold_rest(state: Tuning, present: Mapping[str, nn.Parameter], names: Iterable[str]) -> None:
    """Keeps the base's tensors that are about to be replaced, as `hold_base` does for gains.

    The tensor itself where an fp32 one will take its place, a copy where it is fp32 already.
    """
    for name in names:
        if name not in state.tuned and name not in state.base:
            value = present[name].detach()
            state.base[name] = value.to("cpu", copy=True) if value.dtype == torch.float32 else value


def release(state: Tuning, present: Mapping[str, nn.Parameter], names: set[str]) -> None:
    """The base's values again; `settle` gives back dtype and forward."""
    for name in names & state.base.keys():  # the others have been released, in a change that broke off
        with torch.no_grad():
            present[name].copy_(state.base[name])
    state.tuned = [name for name in state.tuned if name not in names]


def check_name(loaded: Loaded, name: str) -> None:
    if name not in loaded.adapters:
        known = f"loaded are {', '.join(loaded.adapters)}" if loaded.adapters else "none is loaded"
        raise InputError(f"no adapter {name!r} in the model{did_you_mean(name, loaded.adapters)}; {known}")


def refuse_trained(model: nn.Module, loaded: Loaded) -> None:
    """Raises InputError where training has gone on in the active adapter: switching would lose that."""
    if not loaded.whole:
        return
    present = {**parameters(model), **lora_parameters(model)}
    for name, value in {**loaded.placed, **(loaded.lora.tensors if loaded.lora else {})}.items():
        if name not in present or not torch.equal(present[name].detach().cpu(), value):
            raise InputError(
                f"adapter {loaded.active!r} was trained since it was loaded (first {name}), and switching would lose "
                "that;\nsave it (save_adapter), then remove_adapter and load both"
            )
    refuse_trained_beside(model, loaded)


def refuse_trained_beside(model: nn.Module, loaded: Loaded) -> None:
    """Raises InputError where something else was trained while an adapter was active: no base and no adapter has it."""
    state = tuning(model)
    if loaded.active is None or not loaded.whole:
        return
    # everything was frozen when the adapter was loaded: what is trainable came later
    trained = [name for name in changed(model, state) if name in state.prints]
    if state.lora is not None and loaded.lora is None and is_trained(model):
        trained.append("LoRA")
    if trained:
        raise InputError(
            f"{trained[0]} was trained while adapter {loaded.active!r} was active, and would be lost or left over;\n"
            "save both in one (save_adapter), and load that onto a fresh base"
        )


def verify_base(model: nn.Module, adapter: Adapter, folder: Path) -> None:
    """Refuses a base whose gains are not those of the adapter's; a bf16 or fp16 copy of a base is the same base."""
    state, own = tuning(model), {**base_gains(model), **witnesses(model)}
    present = parameters(model)
    own.update({n: present[n].detach().cpu().float() for n in adapter.base if n not in own and n in present})
    vision = {name for name in own if name.rpartition(".")[0] in state.anatomy.vision_norms}
    wrong = other_base(adapter.base, own, vision)
    if wrong is not None:
        how = "differs" if wrong in own and wrong in adapter.base else "is not in both"
        raise InputError(
            f"{folder} belongs to another base: {shown(wrong)} {how};\n"
            "give the base that it was trained on (load_adapter, export and merge can be forced)"
        )


def check_fit(model: nn.Module, adapter: Adapter, folder: Path) -> None:
    """Raises InputError, naming the first tensor of the adapter that the model has no place for."""
    present = parameters(model)
    for name, value in adapter.tensors.items():
        there = present.get(name)
        if there is not None and is_quantized(there):
            raise InputError(f"{folder}: {name} is quantized in this model; load the adapter onto the bfloat16 base")
        if there is None or there.shape != value.shape:
            found = "nothing" if there is None else tuple(there.shape)
            raise InputError(
                f"{folder}: tensor {name} {tuple(value.shape)} does not fit this model ({found} there); "
                "load the adapter onto the base that it was trained on"
            )
    if adapter.lora is not None:
        check_lora(model, adapter.record["lora"], adapter.lora, folder)
