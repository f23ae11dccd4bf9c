"""A base for serving: from a run, adapter or MLLM folder, without the adapter that lies there.

Scope: which model that is, and which adapters come with the path. Not here: opening itself (tuned.py), the bank.
"""

from __future__ import annotations

from pathlib import Path

from normtune.adapter import remove_adapter
from normtune.tuned import Tuned, open_tuned


def open_base(
    path: str | Path, *, force: bool = False, dtype: str | None = None
) -> tuple[Tuned, list[tuple[str, Path]]]:
    """Opens the base of a run or adapter folder, or an MLLM folder (or hub id): the model, its processor, and where
    they come from (`record` is that of the adapter that lies there), and [(name, adapter folder)].

    The list has one entry for a run or an adapter, named after the run's folder, and none for a model.
    `force` and `dtype` as in `open_tuned`, whose InputError it raises, also where the adapter is of another base."""
    tuned, folder = open_tuned(path, force=force, dtype=dtype), Path(path)
    if tuned.record is None:
        return tuned, []
    remove_adapter(tuned.model)  # bit by bit the base again; opened whole, so that what does not fit is refused here
    adapter = folder / "adapter" if (folder / "recipe.yaml").is_file() else folder
    named = adapter.resolve()
    return tuned, [(named.parent.name if named.name == "adapter" else named.name, adapter)]
