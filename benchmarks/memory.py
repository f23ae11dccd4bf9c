"""`python -m benchmarks.memory`: planned peaks beside measured ones, on a CPU: growth of resident memory over a step.

Each strategy runs in a process of its own, on random weights: two steps of the project's own training step on a
LLaVA-shaped model of about 100 M parameters.
Figures go to benchmarks/results/memory.json (or --json FILE).
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.resident import in_a_process
from normtune.runlog import forget_peak, resident

RESULTS = Path(__file__).parent / "results" / "memory.json"
STRATEGIES = ("full", "lora", "layernorm", "layernorm-simple")
PATCHES = 144


def random_model(device: str, hidden: int = 768, blocks: int = 12) -> Any:
    """A LLaVA shape in bf16: Llama of `hidden` size and so many blocks under a small encoder."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        vocab_size=16_000,
    )
    vision = CLIPVisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=2, image_size=96, patch_size=8
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=15_999, image_seq_length=PATCHES)
    with torch.device(device):
        return LlavaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)


def stage_of(strategy: str) -> Any:
    from normtune.recipe import Stage

    return Stage.model_validate(
        {"name": "plan", "strategy": strategy, "data": [{"path": "none"}], "learning_rate": 1e-3}
    )


def samples(batch: int, length: int, supervised: int) -> dict[str, Any]:
    import torch

    ids = torch.randint(0, 15_000, (batch, length))
    ids[:, :PATCHES] = 15_999
    labels = ids.clone()
    labels[:, : length - supervised] = -100
    return {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(batch, 3, 96, 96).bfloat16()}


def measured(strategy: str, batch: int, length: int, supervised: int) -> int:
    """Growth of this process's resident memory from before the model to its peak over two steps."""
    ready(random_model("cpu", hidden=64, blocks=1), strategy)(samples(1, PATCHES + 32, 16))  # loads what is loaded once
    gc.collect()
    before = resident("VmRSS")
    step = ready(random_model("cpu"), strategy)
    forget_peak()  # what apply took in passing is not the step's
    for _ in range(2):  # the optimizer's state is there from the second on
        step(samples(batch, length, supervised))
    return resident("VmHWM") - before


def ready(model: Any, strategy: str) -> Callable[[dict[str, Any]], None]:
    """What takes a step on a batch."""
    import torch

    from normtune.step import make_optimizer, supervised_loss
    from normtune.strategy import apply, lean

    stage = stage_of(strategy)
    apply(model, strategy, **stage.lora.model_dump())
    lean(model)
    model.train()
    optimizer = make_optimizer(model, stage)

    def step(batch: dict[str, Any]) -> None:
        (supervised_loss(model, batch) / 100).backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measured_apart(strategy: str, batch: int, length: int, supervised: int) -> int:
    """`measured` in a child process."""
    arguments = [f"--batch={batch}", f"--length={length}", f"--supervised={supervised}"]
    return in_a_process("benchmarks.memory", ["--measure", strategy, *arguments])


def planned(strategy: str, batch: int, length: int, supervised: int) -> Any:
    from normtune.memory import Shape, plan_step

    return plan_step(random_model("meta"), stage_of(strategy), Shape(batch, length, supervised), block=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--supervised", type=int, default=100)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = options.batch, options.length, options.supervised
    if options.measure:
        print(measured(options.measure, *shape))
        return
    from normtune.runlog import provenance

    rows = []
    for strategy in options.strategies:
        plan, real = planned(strategy, *shape), measured_apart(strategy, *shape)
        ratio = real / plan.peak_bytes
        rows.append({"strategy": strategy, "planned": plan.peak_bytes, "measured": real, "by_cause": plan.by_cause})
        print(
            f"{strategy:18s} planned {plan.peak_bytes / 1e6:8.1f} MB, measured {real / 1e6:8.1f} MB, ratio {ratio:.3f}"
        )
    options.json.parent.mkdir(exist_ok=True, parents=True)
    record = {"shape": dict(zip(("batch", "length", "supervised"), shape, strict=True)), "rows": rows}
    options.json.write_text(json.dumps({**record, "provenance": provenance()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
