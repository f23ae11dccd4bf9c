"""Exports: what leaves for other engines, beyond a plain transformers folder and PEFT's format (adapter/).

`card` the README of an exported model folder; `delta` the gains alone, as tuned - base; `gguf_files` GGUF files read,
and rewritten with other values for some tensors; `gguf_norms` a norm adapter on the GGUF file of its LLM; `mmproj`
vision encoder and connector as llama.cpp reads them. GGUF needs the extra `gguf`. Not here: what survives rounding
(adapter/merging.py), the command line.
"""

from normtune.exporting.card import model_card, read_evaluations
from normtune.exporting.delta import export_delta
from normtune.exporting.gguf_norms import Applied, apply_to_gguf
from normtune.exporting.mmproj import write_mmproj

__all__ = ["Applied", "apply_to_gguf", "export_delta", "model_card", "read_evaluations", "write_mmproj"]
