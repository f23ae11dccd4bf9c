"""`python -m benchmarks.step`: the training step of norm tuning beside PEFT's norm tuning and LoRA, in one process.

The same LLaVA-shaped model (random weights, bf16) and the same samples (144 image tokens and 20 to 300 of text, half of
it supervised) for every method; methods take turns, so that a slower minute of the machine hits all of them. Printed:
samples/s (median over rounds, and the quartiles), ratios with their quartiles over rounds, the bytes autograd keeps
at most, in H units (hidden-size bf16 values) per token and block, and the peak of resident memory over that of the
loaded model, each method in a process of its own. Figures go to benchmarks/results/step-THREADS.json (or --json FILE).
On a GPU, if there is one; else on the CPU with --threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.ceilings import synchronize
from benchmarks.readme import write_table
from benchmarks.resident import in_a_process
from benchmarks.workload import (
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
from normtune.runlog import forget_peak, provenance, resident

RESULTS = Path(__file__).parent / "results"
BATCH = 8
SHIPPED, LORA, OURS, COMPILED = (
    "PEFT LNTuning as shipped (bf16 gains)",
    "PEFT LoRA r 64, dropout .05",
    "normtune, packed",
    "normtune, packed, compiled",
)
METHODS: dict[str, Callable[[Shape, torch.device], Method]] = {
    SHIPPED: lambda s, d: theirs(peft_norms(base(s, d))),
    "PEFT LNTuning, fp32 gains, autocast": lambda s, d: theirs(peft_norms(base(s, d), fp32=True), torch.bfloat16),
    LORA: lambda s, d: theirs(peft_lora(base(s, d))),
    "normtune, padded": lambda s, d: ours(base(s, d), BATCH, padded),
    "normtune, one by one": lambda s, d: ours(base(s, d), 1, padded),
    OURS: lambda s, d: ours(base(s, d), BATCH, packed),
    "normtune, packed, 8-bit gate and up": lambda s, d: ours(base(s, d), BATCH, packed, activations="8bit"),
    COMPILED: lambda s, d: ours(base(s, d), BATCH, packed, compiled=True),
}


def batches(shape: Shape, count: int) -> list[list[Sample]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        texts = [int(torch.randint(20, 301, (), generator=generator)) for _ in range(BATCH)]
        found.append([sample(shape, text, text - text // 2, generator, torch.bfloat16) for text in texts])
    return found


def saved(name: str, shape: Shape, device: torch.device, batch: Sequence[Sample]) -> dict[str, float]:
    """Most bytes kept in a step, and the slope per token and block between 4 and 8 blocks, in H units."""
    sizes = {}
    for layers in {shape.layers, 4, 8}:
        method = METHODS[name](replace(shape, layers=layers), device)
        with kept(method.model) as most:
            method.step(batch)
        sizes[layers] = most[0]
    lengths = [one["input_ids"].shape[1] for one in batch]
    tokens = max(lengths) * len(lengths) if name.startswith("PEFT") or name.endswith("padded") else sum(lengths)
    if name.endswith("one by one"):
        tokens = max(lengths)
    return {"kept_bytes": sizes[shape.layers], "units": (sizes[8] - sizes[4]) / 4 / tokens / (2 * shape.hidden)}


def rates(found: dict[str, Method], every: list[list[Sample]], device: torch.device) -> dict[str, list[float]]:
    """Samples/s of each method in each round; the first two rounds warm up and are dropped."""
    result: dict[str, list[float]] = {name: [] for name in found}
    for number, batch in enumerate(every):
        order = list(found)
        for name in order if number % 2 else order[::-1]:
            began = time.perf_counter()
            found[name].step(batch)
            synchronize(device)
            if number >= 2:
                result[name].append(len(batch) / (time.perf_counter() - began))
    return result


def peak(name: str, shape: Shape, threads: int) -> int:
    """Bytes by which three steps raise the resident memory over that of the model, in a child process."""
    options = [f"--{key}={getattr(shape, key)}" for key in ("hidden", "layers", "vocabulary")]
    return in_a_process("benchmarks.step", ["--peak", name, f"--threads={threads}", *options])


def print_peak(name: str, shape: Shape) -> None:
    device = torch.device("cpu")
    METHODS[name](replace(shape, layers=1), device).step(batches(shape, 1)[0])  # loads what is loaded once
    method = METHODS[name](shape, device)
    forget_peak()
    before = resident("VmRSS")
    for batch in batches(shape, 3):
        method.step(batch)
    print(resident("VmHWM") - before)


def quartiles(values: Sequence[float]) -> list[float]:
    return statistics.quantiles(values, n=4)


def measure(shape: Shape, rounds: int, threads: int) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    every = batches(shape, rounds + 2)
    bytes_of = {name: saved(name, shape, device, every[0]) for name in METHODS}
    peaks = {name: peak(name, shape, threads) if device.type == "cpu" else None for name in METHODS}
    speeds = rates({name: make(shape, device) for name, make in METHODS.items()}, every, device)
    rows: list[dict[str, Any]] = []
    for name, values in speeds.items():
        low, middle, high = quartiles(values)
        speed = {"method": name, "samples_per_second": middle, "quartiles": [low, high]}
        rows.append(speed | bytes_of[name] | {"peak_resident_bytes": peaks[name]})
    ratios = {
        f"{name} to {other}": quartiles([a / b for a, b in zip(speeds[name], speeds[other], strict=True)])
        for name in (OURS, COMPILED)
        for other in (SHIPPED, LORA)
        if {name, other} <= speeds.keys()
    }
    about = {"hidden": shape.hidden, "layers": shape.layers, "vocabulary": shape.vocabulary, "device": str(device)}
    about |= {"threads": threads, "rounds": rounds}
    return {"shape": about, "rows": rows, "ratios": ratios, "provenance": provenance()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=6, help="at least 2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--readme", action="store_true", help="write the README's table, too")
    parser.add_argument("--table", action="store_true", help="measure nothing: print the table of the stored figures")
    parser.add_argument("--peak", choices=METHODS, help="only print how far this method raises the resident memory")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds: quartiles take at least 2")
    torch.set_num_threads(options.threads)
    shape = Shape(options.hidden, options.layers, options.vocabulary)
    if options.peak:
        return print_peak(options.peak, shape)
    target = options.json or RESULTS / f"step-{options.threads}.json"
    if not options.table:
        target.parent.mkdir(exist_ok=True, parents=True)
        target.write_text(json.dumps(measure(shape, options.rounds, options.threads), indent=1) + "\n")
    shown = table(json.loads(target.read_text()))
    print(shown)
    if options.readme:
        write_table("step", shown)


def table(record: dict[str, Any]) -> str:
    """The rows as a Markdown table, and the ratios."""
    head = ["method", "samples/s (quartiles)", "H units", "kept MB", "peak MB over the model"]
    lines = [head, ["---"] * len(head)]
    for row in record["rows"]:
        low, high = row["quartiles"]
        peak = row["peak_resident_bytes"]
        lines.append(
            [
                row["method"],
                f"{row['samples_per_second']:.2f} ({low:.2f} to {high:.2f})",
                f"{row['units']:.2f}",
                f"{row['kept_bytes'] / 1e6:.0f}",
                "" if peak is None else f"{peak / 1e6:.0f}",
            ]
        )
    shape, facts = record["shape"], record["provenance"]
    ratios = [
        f"{name} {middle:.2f} ({low:.2f} to {high:.2f})" for name, (low, middle, high) in record["ratios"].items()
    ]
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "transformers", "peft"))
    return "\n".join(
        [
            *(f"| {' | '.join(cells)} |" for cells in lines),
            "",
            f"Ratios of samples/s, round by round: {'; '.join(ratios)}.",
            f"Hidden size {shape['hidden']}, {shape['layers']} blocks, vocabulary {shape['vocabulary']:,}, bf16, "
            f"{shape['threads']} threads of {facts['processor']}, {shape['rounds']} rounds; {versions}.",
        ]
    )


if __name__ == "__main__":
    main()
