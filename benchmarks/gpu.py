"""`python -m benchmarks.gpu`: the training step at the shapes of LLaMA-2-7B and 13B on a GPU, in nine minutes.

Random weights in bf16; images are 576 given features of 1,024 values that go through a real connector. Workloads:
A 8,192 tokens of samples of 600 to 1,100 (an image and text, 100 supervised), packed by normtune and padded by tools
that cannot pack; C 2 x 4,096 tokens, all supervised. Rows come in the order of importance, two passes (the second in
reverse order) where time allows; the JSON is written after every row, and no row starts after --stop seconds.

Rates: FLOPs by `normtune.flops` (no weight gradients for frozen weights), as a share of the bf16 rate of the step's own
matrix products measured in the same run, and of the datasheet's. Guard: gradients of the gains against transformers'
eager model with fp32 gains, all gains moved, nothing infinite. `--tiny` runs everything on a small model, on a CPU too.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from benchmarks.ceilings import ceilings, synchronize
from benchmarks.workload import (
    IGNORED,
    GivenFeatures,
    Method,
    Sample,
    Shape,
    base,
    kept,
    ours,
    packed,
    padded,
    peft_lora,
    peft_norms,
    sample,
    theirs,
)
from normtune.flops import Flops, causal_pairs, count_flops, peak_rate
from normtune.runlog import provenance
from normtune.strategy import apply

RESULTS = Path(__file__).parent / "results" / "gpu.json"
WARM_UP, STEPS = 3, 10
SHAPES = {
    "7b": Shape(4096, 32, patches=576, features=1024, head=128, inner=11008),
    "13b": Shape(5120, 40, patches=576, features=1024, head=128, inner=13824),
    "tiny": Shape(128, 2, vocabulary=1000, patches=16, features=32, head=32),
}


@dataclass(frozen=True)
class Row:
    """A way to train on a workload; `make` gives it a fresh model."""

    name: str
    workload: str
    make: Callable[[Shape, torch.device], Method]
    packs: bool = True
    trains: str | tuple[str, ...] = "layernorm-simple"
    rank: int = 64


def flops_of(shape: Shape, row: Row) -> Flops:
    """By the rule, for what the row trains; told from a model on the meta device."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(shape.config())
    trains = row.trains if isinstance(row.trains, str) else list(row.trains)
    model.model.vision_tower = GivenFeatures()
    apply(model, trains, rank=row.rank)
    return count_flops(model)


def our_row(compiled: bool, count: int, dense: bool, **options: Any) -> Callable[[Shape, torch.device], Method]:
    """One micro-batch of `count` samples: packed, or where all are of one length (`dense`) as rows."""
    layout = padded if dense else packed
    return lambda shape, device: ours(base(shape, device), count, layout, compiled=compiled, **options)


def rows(counts: dict[str, int]) -> list[Row]:
    """By priority: what the goals need first."""
    a, c = counts["A"], counts["C"]
    lora = {"strategy": ["lora"], "rank": 16, "alpha": 32, "dropout": 0.0}
    return [
        Row("normtune compiled", "A", our_row(True, a, dense=False)),
        Row("normtune eager", "A", our_row(False, a, dense=False)),
        Row("PEFT LNTuning", "A", lambda s, d: theirs(peft_norms(base(s, d))), packs=False),
        Row(
            "PEFT LoRA r 64, dropout .05",
            "A",
            lambda s, d: theirs(peft_lora(base(s, d))),
            packs=False,
            trains=("lora",),
        ),
        Row(
            "strong LoRA: r 16, no dropout, compiled, packed",
            "A",
            our_row(True, a, dense=False, **lora),
            trains=("lora",),
            rank=16,
        ),
        Row("normtune compiled", "C", our_row(True, c, dense=True)),
        Row("normtune eager", "C", our_row(False, c, dense=True)),
        Row("PEFT LNTuning, fp32 gains, autocast", "A", autocast_norms, packs=False),
        Row("normtune eager, 8-bit gate and up", "A", our_row(False, a, dense=False, activations="8bit")),
        Row("full finetuning", "A", our_row(True, a, dense=False, strategy="full"), trains="full"),
    ]


def autocast_norms(shape: Shape, device: torch.device) -> Method:
    return theirs(peft_norms(base(shape, device), fp32=True), torch.bfloat16)


def workload(shape: Shape, name: str, step: int) -> list[Sample]:
    """Samples of a step: the lengths are the same in every step, ids and images are not."""
    lengths = torch.Generator().manual_seed(7)
    values = torch.Generator().manual_seed(step)
    tiny = shape.patches < 100
    if name == "C":
        text = (128 if tiny else 4096) - shape.patches
        return [sample(shape, text, text, values, torch.bfloat16) for _ in range(2)]
    budget, low, high, supervised = (256, 24, 60, 8) if tiny else (8192, 600, 1101, 100)
    found, used = [], 0
    while True:
        length = int(torch.randint(low, high, (), generator=lengths))
        if used + length > budget:
            return found
        used += length
        found.append(sample(shape, length - shape.patches, supervised, values, torch.bfloat16))


def time_row(row: Row, shape: Shape, device: torch.device) -> dict[str, Any]:
    """Builds the model, warms up (compiling), measures STEPS steps one by one."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    batches = [workload(shape, row.workload, step) for step in range(WARM_UP + STEPS)]
    method = row.make(shape, device)
    before = {n: p.detach().clone() for n, p in method.model.named_parameters() if p.requires_grad and p.ndim == 1}
    began = time.perf_counter()
    losses = [float(method.step(batches[0]))]
    synchronize(device)
    first = time.perf_counter() - began
    times = []
    for step, batch in enumerate(batches[1:], 1):
        synchronize(device)
        began = time.perf_counter()
        loss = method.step(batch)
        synchronize(device)
        if step >= WARM_UP:
            times.append(time.perf_counter() - began)
        losses.append(float(loss))
    moved = [bool((p.detach() != before[n]).any()) for n, p in method.model.named_parameters() if n in before]
    middle = statistics.median(times)
    lengths = [one["input_ids"].shape[1] for one in batches[0]]
    labels = [int((one["labels"][:, 1:] != IGNORED).sum()) for one in batches[0]]
    flops = flops_of(shape, row).step(sum(lengths), sum(labels), len(lengths), causal_pairs(lengths))
    return {
        "milliseconds": 1e3 * middle,
        "spread": [1e3 * value for value in statistics.quantiles(times, n=4)[::2]],
        "tokens_per_second": sum(lengths) / middle,
        "padded_tokens_per_second": None if row.packs else max(lengths) * len(lengths) / middle,
        "samples_per_second": len(lengths) / middle,
        "flops_per_step": flops,
        "flop_rate": flops / middle,
        "first_step_seconds": first,
        "peak_allocated": torch.cuda.max_memory_allocated(device) if cuda else None,
        "peak_reserved": torch.cuda.max_memory_reserved(device) if cuda else None,
        "losses": losses,
        "finite": all(torch.tensor(losses).isfinite().tolist()),
        "gains_moved": sum(moved) / len(moved) if moved else None,
    }


def shallow(shape: Shape, layers: int) -> Shape:
    return replace(shape, layers=layers, vocabulary=1000)


def saved_units(shape: Shape, device: torch.device, row: Row) -> float:
    """Hidden-size bf16 values that autograd keeps per token and block: the slope between 2 and 4 blocks."""
    batch = workload(shape, row.workload, 0)
    sizes = []
    for layers in (2, 4):
        method = row.make(shallow(shape, layers), device)
        with kept(method.model) as most:
            method.step(batch)
        sizes.append(most[0])
        del method
        release(device)
    lengths = [one["input_ids"].shape[1] for one in batch]
    tokens = sum(lengths) if row.packs else max(lengths) * len(lengths)
    return (sizes[1] - sizes[0]) / 2 / tokens / (2 * shape.hidden)


def gradients(method: Method, batch: Sequence[Sample]) -> tuple[float, torch.Tensor]:
    """The loss of a step, and the gradients of all gains, in the order of the modules."""
    gains = [p for p in method.model.parameters() if p.requires_grad]
    found: dict[int, torch.Tensor] = {}

    def take(gain: torch.Tensor) -> None:
        assert gain.grad is not None
        found[id(gain)] = gain.grad.float().clone()

    handles = [gain.register_post_accumulate_grad_hook(take) for gain in gains]
    loss = float(method.step(batch))
    for handle in handles:
        handle.remove()
    return loss, torch.cat([found[id(gain)] for gain in gains])


def agreement(shape: Shape, device: torch.device) -> dict[str, float]:
    """|a - b| / |a| of the loss and of the gains' gradients; a: transformers' eager model, fp32 gains, autocast."""
    small = shallow(shape, 2)
    batch = workload(small, "A", 0)
    loss, gradient = gradients(theirs(peft_norms(base(small, device), fp32=True), torch.bfloat16), batch)
    result = {}
    for name, compiled in (("eager", False), ("compiled", True)):
        other, own = gradients(our_row(compiled, len(batch), dense=False)(small, device), batch)
        result[f"{name}: loss"] = abs(other - loss) / abs(loss)
        result[f"{name}: gradients"] = float((own - gradient).norm() / gradient.norm())
    return result


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    torch._dynamo.reset()


def driver() -> str:
    """Name, driver, clocks and power of the GPU, as nvidia-smi says it."""
    query = "name,driver_version,clocks.sm,clocks.mem,power.draw,power.limit"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["7b", "13b"])
    parser.add_argument("--tiny", action="store_true", help="a small model, to see that all of it runs")
    parser.add_argument("--stop", type=float, default=500.0, help="seconds after which no row starts")
    options = parser.parse_args()
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        parser.error("no GPU here; --tiny runs it on a small model")
    record: dict[str, Any] = {"device": driver(), "provenance": provenance(), "shapes": {}}
    options.json.parent.mkdir(parents=True, exist_ok=True)

    def write() -> None:
        record["seconds"] = round(time.perf_counter() - began, 1)
        options.json.write_text(json.dumps(record, indent=1) + "\n")

    for name in ["tiny"] if options.tiny else options.shapes:
        shape = SHAPES[name]
        sizes = (256, 1 << 20) if options.tiny else (8192, 4 << 30)
        result: dict[str, Any] = {
            "ceilings": ceilings(shape.hidden, shape.width, 256 if options.tiny else 8192, device, *sizes)
        }
        result["datasheet"] = peak_rate(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        record["shapes"][name] = result
        write()
        measure(shape, device, result, write, lambda: time.perf_counter() - began > options.stop)
    print(f"{record['seconds']:.0f} s, figures in {options.json}")


def attempt(run: Callable[..., Any], *arguments: Any) -> Any:
    """What `run` returns, or what it raised: a row that fails must not cost the others on a lent machine."""
    try:
        return run(*arguments)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def measure(
    shape: Shape, device: torch.device, result: dict[str, Any], write: Callable[[], None], late: Callable[[], bool]
) -> None:
    every = rows({key: len(workload(shape, key, 0)) for key in ("A", "C")})
    result["agreement"] = attempt(agreement, shape, device)
    release(device)
    result["rows"], result["saved_units"] = [], {}
    for number, row in enumerate([*every, *reversed(every)]):
        if late():
            break
        found = {"method": row.name, "workload": row.workload, "pass": 1 + number // len(every)}
        found |= attempt(time_row, row, shape, device)
        release(device)
        if number < len(every) and row.workload == "A":
            result["saved_units"][row.name] = attempt(saved_units, shape, device, row)
            release(device)
        if "error" in found:
            print(f"{row.name:48s} {row.workload}  {found['error']}")
        else:
            found["of_measured"] = found["flop_rate"] / result["ceilings"]["own_median"]
            found["of_datasheet"] = found["flop_rate"] / result["datasheet"] if result["datasheet"] else None
            print(
                f"{row.name:48s} {row.workload}  {found['milliseconds']:9.1f} ms  "
                f"{found['tokens_per_second']:10,.0f} tok/s  {100 * found['of_measured']:5.1f} % of the measured rate"
            )
        result["rows"].append(found)
        write()


if __name__ == "__main__":
    main()
