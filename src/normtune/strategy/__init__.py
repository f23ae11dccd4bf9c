"""Strategies: which parts train. `apply(model, strategy)` freezes everything else and says what it did.

Scope: the table of strategies (PAPER: Zhao et al., arXiv 2312.11420), lists of parts, fp32 trainable tensors on any
base dtype, LoRA through PEFT. The only room with an opinion on strategies. Not here: where parts are (structure),
how fp32 parameters run in a bf16 model (kernels), optimizers (step).

`table` names of strategies and parts -> parameters; `state` what is known of a tuned model; `lora` LoRA through PEFT;
`applying` the public verbs; `moving` what share of the trainable tensors an optimizer has moved.
"""

from normtune.strategy.applying import Report, apply, check, is_offloaded, parameter_groups
from normtune.strategy.leaning import checkpoint, compile_blocks, lean, restore
from normtune.strategy.lora import LORA_NAME, add_lora, is_trained, remove_lora
from normtune.strategy.moving import Movement, check_step_size, movement
from normtune.strategy.packing import can_pack, pack_length, prefers_packing
from normtune.strategy.state import (
    CHUNK,
    GAIN_PARTS,
    LLM_GAINS,
    Tuning,
    base_gains,
    changed,
    count,
    hold_base,
    is_lora,
    mark_tuned,
    match_precision,
    parameters,
    plain,
    refuse_banked,
    refuse_cast,
    sample,
    settle,
    to_float32,
    tuning,
    witnesses,
)
from normtune.strategy.table import STRATEGIES, resolve

__all__ = [
    "CHUNK",
    "GAIN_PARTS",
    "LLM_GAINS",
    "LORA_NAME",
    "STRATEGIES",
    "Movement",
    "Report",
    "Tuning",
    "add_lora",
    "apply",
    "base_gains",
    "can_pack",
    "changed",
    "check",
    "check_step_size",
    "checkpoint",
    "compile_blocks",
    "count",
    "hold_base",
    "is_lora",
    "is_offloaded",
    "is_trained",
    "lean",
    "mark_tuned",
    "match_precision",
    "movement",
    "pack_length",
    "parameter_groups",
    "parameters",
    "plain",
    "prefers_packing",
    "refuse_banked",
    "refuse_cast",
    "remove_lora",
    "resolve",
    "restore",
    "sample",
    "settle",
    "to_float32",
    "tuning",
    "witnesses",
]
