"""`python -m benchmarks.step`: the training step of norm tuning beside PEFT's norm tuning and LoRA, in one process.

The same LLaVA-shaped model (random weights, bf16) and the same samples (144 image tokens and 20 to 300 of text, the
answer supervised) for every method; methods take turns, so that a slower minute of the machine hits all of them.
Printed: samples/s (median over rounds, and the quartiles), ratios, and the bytes that autograd keeps at most. Figures
go to benchmarks/results/step.json (or --json FILE). On a GPU, if there is one; else on the CPU with --threads.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import normtune as nt
from normtune.runlog import provenance
from normtune.step import supervised_loss

RESULTS = Path(__file__).parent / "results" / "step.json"
IMAGE, PATCHES, PIXELS = 999, 144, 96
Batch = dict[str, torch.Tensor]


@dataclass
class Method:
    """A way to train: `step(samples)` is one optimizer step."""

    name: str
    model: nn.Module
    step: Callable[[Sequence[Batch]], None]


def base(hidden: int, layers: int, vocabulary: int) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    text = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 43 // 16, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, vocab_size=vocabulary,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=PIXELS,
        patch_size=8,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=PATCHES)
    return LlavaForConditionalGeneration(config).to(torch.bfloat16)


def samples(count: int, device: torch.device) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        length = int(torch.randint(20, 301, (), generator=generator))
        ids = torch.randint(3, 900, (1, PATCHES + length), generator=generator)
        ids[:, :PATCHES] = IMAGE
        labels = ids.clone()
        labels[:, : PATCHES + length // 2] = -100
        pixels = torch.randn(1, 3, PIXELS, PIXELS, generator=generator).bfloat16()
        one = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}
        found.append({key: value.to(device) for key, value in one.items()})
    return found


def padded(batch: Sequence[Batch]) -> Batch:
    width = max(one["input_ids"].shape[1] for one in batch)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    joined = {
        key: torch.cat([nn.functional.pad(one[key], (0, width - one[key].shape[1]), value=value) for one in batch])
        for key, value in fill.items()
    }
    return {**joined, "pixel_values": torch.cat([one["pixel_values"] for one in batch])}


def trainable(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)


def theirs(name: str, model: nn.Module, dtype: torch.dtype | None = None) -> Method:
    """transformers' own loss on padded batches, as its Trainer runs it; with autocast where gains are fp32."""
    optimizer = trainable(model)

    def step(batch: Sequence[Batch]) -> None:
        together = padded(batch)
        device = together["input_ids"].device.type
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            loss = model(**together, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Method(name, model, step)


def ours(name: str, model: nn.Module, micro: int) -> Method:
    """normtune's step: micro-batches of `micro` samples, the sum of their losses over the step's supervised tokens."""
    nt.apply(model, "layernorm-simple")
    nt.lean(model)
    optimizer = trainable(model)

    def step(batch: Sequence[Batch]) -> None:
        supervised = sum(int((one["labels"][:, 1:] != -100).sum()) for one in batch)
        for start in range(0, len(batch), micro):
            part = batch[start : start + micro]
            together = dict(part[0]) if len(part) == 1 else padded(part)
            (supervised_loss(model, together) / supervised).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Method(name, model, step)


def methods(hidden: int, layers: int, vocabulary: int, device: torch.device) -> list[Method]:
    start = base(hidden, layers, vocabulary).to(device)  # type: ignore[arg-type]
    names = nt.anatomy(start).norms
    linears = nt.anatomy(start).linears
    shipped = get_peft_model(copy.deepcopy(start), LNTuningConfig(target_modules=names))
    fp32 = get_peft_model(copy.deepcopy(start), LNTuningConfig(target_modules=names))
    for parameter in fp32.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    lora = get_peft_model(
        copy.deepcopy(start), LoraConfig(r=64, lora_alpha=128, lora_dropout=0.05, target_modules=linears)
    )
    return [
        theirs("PEFT LNTuning as shipped (bf16 gains)", shipped),
        theirs("PEFT LNTuning, fp32 gains, autocast", fp32, torch.bfloat16),
        theirs("PEFT LoRA r 64, dropout .05", lora),
        ours("normtune layernorm-simple, padded", copy.deepcopy(start), micro=8),
        ours("normtune layernorm-simple, one by one", copy.deepcopy(start), micro=1),
    ]


def kept_bytes(method: Method, batch: Sequence[Batch]) -> int:
    """Bytes that autograd keeps at most at a time in a step, parameters and buffers aside."""
    own = {t.untyped_storage().data_ptr() for t in [*method.model.parameters(), *method.model.buffers()]}
    live: dict[int, int] = {}
    most = 0

    def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
        nonlocal most
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            live[storage.data_ptr()] = storage.nbytes()
            most = max(most, sum(live.values()))
        return tensor, storage.data_ptr()

    def unpack(packed: tuple[torch.Tensor, int]) -> torch.Tensor:
        live.pop(packed[1], None)
        return packed[0]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        method.step(batch)
    return most


def measure(found: list[Method], batches: list[list[Batch]], device: torch.device) -> dict[str, list[float]]:
    """Samples/s of each method in each round; the first round warms up and is dropped."""
    rates: dict[str, list[float]] = {method.name: [] for method in found}
    for number, batch in enumerate(batches):
        for method in found if number % 2 else found[::-1]:
            began = time.perf_counter()
            method.step(batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                rates[method.name].append(len(batch) / (time.perf_counter() - began))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    every = samples(8 * (options.rounds + 1), device)
    batches = [every[start : start + 8] for start in range(0, len(every), 8)]
    found = methods(options.hidden, options.layers, options.vocabulary, device)
    for method in found:
        method.model.train()
    kept = {method.name: kept_bytes(method, batches[0]) for method in found}
    rates = measure(found, batches, device)
    rows: list[dict[str, Any]] = []
    for name, values in rates.items():
        low, middle, high = statistics.quantiles(values, n=4)
        rows.append({"method": name, "samples_per_second": middle, "quartiles": [low, high], "kept_bytes": kept[name]})
    ours_rate, first, lora = (rows[i]["samples_per_second"] for i in (-1, 0, 2))
    ratios = {"to LNTuning as shipped": ours_rate / first, "to LoRA": ours_rate / lora}
    shape = {key: getattr(options, key) for key in ("hidden", "layers", "vocabulary", "threads")}
    shape["device"] = str(device)
    options.json.parent.mkdir(exist_ok=True, parents=True)
    record = {"shape": shape, "rows": rows, "ratios": ratios, "provenance": provenance()}
    options.json.write_text(json.dumps(record, indent=1) + "\n")
    for row in rows:
        low, high = row["quartiles"]
        print(
            f"{row['method']:42s} {row['samples_per_second']:7.2f} samples/s ({low:.2f} to {high:.2f})  "
            f"{row['kept_bytes'] / 1e6:8.1f} MB kept"
        )
    print(", ".join(f"{value:.2f} {name}" for name, value in ratios.items()))


if __name__ == "__main__":
    main()
