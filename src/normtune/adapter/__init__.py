"""Adapters: the trained tensors of a model, with the identity of the base that they belong to.

`files` what is on disk; `arithmetic` an adapter in memory, scaled, added, interpolated, compared; `loading` into and
out of models, by name; `lora` the LoRA of an adapter; `merging` plain models, and what rounding leaves; `interchange`
PEFT's format. Not here: the state of a training (checkpoint.py).
"""

from normtune.adapter.arithmetic import Adapter, Difference, weighted_sum
from normtune.adapter.files import adapter_folder, find_adapter, read_adapter
from normtune.adapter.interchange import export_peft
from normtune.adapter.loading import load_adapter, put_tensors, remove_adapter, save_adapter, set_adapter
from normtune.adapter.merging import Survival, merge, survival

__all__ = [
    "Adapter",
    "Difference",
    "Survival",
    "adapter_folder",
    "export_peft",
    "find_adapter",
    "load_adapter",
    "merge",
    "put_tensors",
    "read_adapter",
    "remove_adapter",
    "save_adapter",
    "set_adapter",
    "survival",
    "weighted_sum",
]
