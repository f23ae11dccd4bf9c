"""What each process of tests/test_distributed.py runs under torchrun: `ranks.py OUT CASES`.

Each case trains a tiny LLaVA for a few steps on batches that differ between the processes as far as they can (no image,
nothing supervised, another number of micro-batches); process 0 writes what trained and what was sent.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from benchmarks.processes import Collectives
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from normtune.recipe import Stage
from normtune.sharding import level, replicated, shard
from normtune.step import make_optimizer, take_step
from normtune.strategy import apply, check, checkpoint, lean
from stubs import IMAGE, inputs, llava

STEPS = 3
Batch = dict[str, torch.Tensor]


def stage_of(strategy: str | list[str]) -> Stage:
    data: Any = [{"path": "none.json"}]
    return Stage(name="stage", strategy=strategy, data=data, learning_rate=1e-2, warmup_ratio=0.0, clip=1.0)


def micro_batches(step: int) -> list[list[Batch]]:
    """Those of both processes: the first has two with images, the second one without."""
    model = llava()
    shown = [inputs(model, seed=10 * step + n) for n in range(2)]
    text = inputs(model, seed=10 * step + 5)
    text = {name: text[name][:, 16:] for name in ("input_ids", "labels")}
    for batch in (*shown, text):
        batch["labels"] = batch["labels"].masked_fill(batch["input_ids"] == IMAGE, -100)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if step == 1:  # nothing to learn from on the second process
        text["labels"] = torch.full_like(text["labels"], -100)
    return [shown, [text]]


def run(strategy: str | list[str], sharded: bool, checkpointed: bool = False) -> tuple[dict[str, Any], Batch]:
    """(figures, trained tensors) after STEPS steps of this process."""
    accelerator, model, stage = Accelerator(cpu=True), llava(), stage_of(strategy)
    at, of = accelerator.process_index, accelerator.num_processes
    if sharded and of > 1:
        parts = check(model, strategy)
        shard(model, accelerator.device, [parameter for part in parts.values() for parameter in part])
    report = apply(model, strategy, dropout=0.0)
    lean(model)
    if checkpointed:
        checkpoint(model, on=True)
    optimizer = make_optimizer(model, stage)
    wrapped = replicated(accelerator, model)
    model.train()
    losses, counts = [], Collectives()
    for step in range(STEPS):
        shares = micro_batches(step)
        mine = shares[at] if of > 1 else [batch for share in shares for batch in share]
        with counts if step == STEPS - 1 else Collectives():
            ready = level(model, mine, accelerator.device)
            losses.append(take_step(accelerator, wrapped, optimizer, ready, stage, step, STEPS)["loss"])
    parameters = dict(model.named_parameters())
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters.values())
    figures = {
        "losses": losses,
        "trainable_bytes": report.bytes,
        "held": held,
        "whole": sum(p.numel() for p in parameters.values()),
        "calls": counts.calls,
        "bytes": counts.bytes,
    }
    return figures, {name: parameters[name].detach().clone() for name in report.trainable}


def main() -> None:
    out, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    for name, case in cases.items():
        figures, tensors = run(**case)
        if Accelerator(cpu=True).is_main_process:
            save_file(tensors, out / f"{name}.safetensors")
            (out / f"{name}.json").write_text(json.dumps(figures))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
