"""A base for serving: from a run, adapter or MLLM folder, without the adapter that lies there.

Scope: which model that is, and which adapters come with the path; a model whose adapter no bank takes, as a bank of
nothing. Not here: opening itself (tuned.py), the bank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from normtune.adapter import adapter_folder, load_adapter, remove_adapter
from normtune.bank import Bank, Entry
from normtune.bank.entries import Layout
from normtune.errors import InputError
from normtune.layers import unwrapped
from normtune.tuned import Tuned, open_tuned


def open_base(
    path: str | Path, *, force: bool = False, dtype: str | None = None
) -> tuple[Tuned, list[tuple[str, Path]]]:
    """Opens the base of a run or adapter folder, or an MLLM folder (or hub id): the model, its processor, and where
    they come from (`record` is that of the adapter that lies there), and [(name, adapter folder)].

    The list has one entry for a run or an adapter, named after the run's folder, and none for a model.
    `force` and `dtype` as in `open_tuned`, whose InputError it raises, also where the adapter is of another base."""
    tuned = open_tuned(path, force=force, dtype=dtype)
    if tuned.record is None:
        return tuned, []
    remove_adapter(tuned.model)  # bit by bit the base again; opened whole, so that what does not fit is refused here
    adapter = adapter_folder(path)
    named = adapter.resolve()
    return tuned, [(named.parent.name if named.name == "adapter" else named.name, adapter)]


def open_alone(tuned: Tuned, adapter: Path) -> Bank:
    """A bank for an opened base with an adapter that no bank takes (LoRA, weights of the LLM): the model with that
    adapter loaded is its base, and it has no other."""
    load_adapter(tuned.model, adapter)
    return Alone(tuned.model)


class Alone(Bank):
    """A model as it is, whatever was loaded into it: no module of it is taken hold of."""

    def __init__(self, model: nn.Module) -> None:
        gains = torch.empty(0, device=unwrapped(model).get_input_embeddings().weight.device)  # type: ignore[operator]
        self._begin(model, Layout({}, {}, {}, {}, {}), Entry(None, "none", gains))

    def add(self, name: str, *args: Any, **options: Any) -> None:
        """Raises InputError: there is no base without an adapter here."""
        raise InputError(f"adapter {name!r} needs the base alone; merge what the model holds (normtune.merge)")
