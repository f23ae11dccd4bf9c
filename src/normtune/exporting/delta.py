"""The change alone: tuned - base of each gain and bias of a norm, for programs that add it to the base themselves.

`delta.safetensors` holds the differences in fp32 under the names of the model's parameters, `delta.json` the base they
belong to, the formula of each norm, and what is left out because an adapter does not hold its base (connector,
embedding, ...). base (fp32) + delta is the tuned gain up to one rounding of that sum. Not here: adapters
(adapter/), which hold the tuned values and everything else that was trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from normtune.adapter.loading import capture
from normtune.errors import InputError
from normtune.layers import unwrapped
from normtune.runlog import atomic_folder, file_hash, provenance, write_json
from normtune.structure import formulas

TENSORS, RECORD = "delta.safetensors", "delta.json"


def export_delta(model: nn.Module, folder: str | Path, **facts: Any) -> dict[str, Any]:
    """Writes both files, whole or not at all; `facts` (base, recipe, ...) go into the JSON, which is returned.

    Raises:
        InputError: no gain was tuned, the adapter holds LoRA (whose change is a product), or the folder exists.
        JobError: the disk is full, or the model was cast as a whole since it was tuned.
    """
    model = unwrapped(model)
    adapter = capture(model)
    if adapter.lora is not None:
        raise InputError("a delta holds gains, and the adapter holds LoRA; export --format peft or transformers")
    change = {
        n: (t.double() - adapter.base[n].double()).float() for n, t in adapter.tensors.items() if n in adapter.base
    }
    if not change:
        raise InputError("nothing with a known base was tuned; export --format peft or transformers holds everything")
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in change))
    record = {
        "format": 1,
        "rule": "tuned = base + delta, in float32",
        **facts,
        "strategy": adapter.record["strategy"],
        "parameters": sum(tensor.numel() for tensor in change.values()),
        "formulas": {module: formula.kind for module, formula in formulas(model, modules).items()},
        "left_out": sorted(adapter.tensors.keys() - change.keys()),
        "provenance": provenance(),
    }
    with atomic_folder(Path(folder)) as temporary:
        save_file({n: t.contiguous() for n, t in change.items()}, temporary / TENSORS, {"format": "pt"})
        record["files"] = {TENSORS: file_hash(temporary / TENSORS)}
        write_json(temporary / RECORD, record)
    return record
