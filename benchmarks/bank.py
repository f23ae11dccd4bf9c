"""`python -m benchmarks.bank`: a mixed batch of 16 rows over 16 adapters beside the base alone, and switching adapters.

Llama shapes with random weights, text alone. Ways take turns at each step, so that a slower minute hits all of them;
a ratio is the median over rounds of the quotient within a round, with its quartiles. Decoding: one token per row and
step on a KV cache; prefill: the prompts. The base alone is a model without a bank around the same weights. Switching:
`set_adapter`, and a batch of another composition in a bank (gathering its gains, making its forwards). Figures go to
benchmarks/results/bank.json (or --json FILE) and, with `--docs`, into docs/adapters.md; `--table` measures nothing.
`--quick` is for a look.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import normtune as nt
from benchmarks.ceilings import synchronize
from benchmarks.readme import DOCS, write_table
from normtune.adapter import Adapter, load_adapter, set_adapter
from normtune.adapter.loading import capture
from normtune.bank import Bank, Entry
from normtune.runlog import provenance, write_json

PAGE = DOCS / "adapters.md"
RESULTS = Path(__file__).parent / "results" / "bank.json"
ROWS, PROMPT = 16, 64
BASE = "base alone"
SHAPES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4},
    "100M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def made(shape: str, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """A model with random weights, the same for the same shape; embedding and head tied."""
    torch.manual_seed(0)
    vocabulary = 2_000 if shape == "tiny" else 32_000
    config = LlamaConfig(**SHAPES[shape], vocab_size=vocabulary, tie_word_embeddings=True)
    return LlamaForCausalLM(config).to(device, dtype).eval().requires_grad_(False)


def adapters(model: LlamaForCausalLM, number: int) -> dict[str, Adapter]:
    """Adapters of all norms, with random changes."""
    tuned = copy.deepcopy(model)
    nt.apply(tuned, ["norms", "final_norm"])
    found = {}
    for seed in range(number):
        generator = torch.Generator(model.device).manual_seed(seed)
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.fill_(1.0).add_(
                        0.1 * torch.randn(parameter.shape, generator=generator, device=parameter.device)
                    )
        one = capture(tuned)
        found[f"a{seed}"] = Adapter({n: t.clone() for n, t in one.tensors.items()}, one.base, one.record)
    return found


def compositions(bank: Bank) -> dict[str, list[Entry]]:
    """Rows of each way in the bank."""
    names = bank.names
    return {
        "bank, base rows": [bank.entry(None)] * ROWS,
        "bank, one adapter": [bank.entry(names[0])] * ROWS,
        "bank, 16 adapters": [bank.entry(names[row]) for row in range(ROWS)],
        "bank, 8 adapters and base rows": [bank.entry(names[row] if row % 2 else None) for row in range(ROWS)],
    }


class Way:
    """One way to run the 16 rows: `decode()` and `prefill()` in seconds."""

    def __init__(self, model: LlamaForCausalLM, around: Callable[[], Any]) -> None:
        self.model, self.around, self.device = model, around, model.device
        generator = torch.Generator().manual_seed(1)
        self.prompt = torch.randint(3, 1_999, (ROWS, PROMPT), generator=generator).to(model.device)
        self.cache = DynamicCache(config=model.config)
        with torch.inference_mode(), around():
            model(input_ids=self.prompt, past_key_values=self.cache, logits_to_keep=1)

    def decode(self) -> float:
        """One token per row."""
        return self.seconds(input_ids=self.prompt[:, :1], past_key_values=self.cache)

    def prefill(self) -> float:
        return self.seconds(input_ids=self.prompt, use_cache=False)

    def seconds(self, **inputs: Any) -> float:
        synchronize(self.device)
        began = time.perf_counter()
        with torch.inference_mode(), self.around():
            self.model(**inputs, logits_to_keep=1)
        synchronize(self.device)
        return time.perf_counter() - began


def one_round(ways: dict[str, Way], turn: int, steps: int) -> dict[str, dict[str, float]]:
    """Mean seconds of a decoding step, and of a prefill; ways take turns at each step."""
    order = list(ways)[turn % len(ways) :] + list(ways)[: turn % len(ways)]
    taken = {name: {"decode": 0.0, "prefill": ways[name].prefill()} for name in order}
    for _ in range(steps):
        for name in order:
            taken[name]["decode"] += ways[name].decode() / steps
    for way in ways.values():
        way.cache.crop(-steps)
    return taken


def speeds(model: LlamaForCausalLM, found: dict[str, Adapter], rounds: int, steps: int) -> list[dict[str, Any]]:
    """A row per way: milliseconds per step and per prefill (medians), and ratios to the base alone."""
    from contextlib import nullcontext

    alone = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    with nt.bank(model, found) as bank:
        ways = {BASE: Way(alone, nullcontext)}
        for name, entries in compositions(bank).items():
            ways[name] = Way(model, lambda entries=entries: bank.rows(entries))  # type: ignore[misc]
        times: dict[str, dict[str, list[float]]] = {name: {"decode": [], "prefill": []} for name in ways}
        for turn in range(rounds + 1):
            taken = one_round(ways, turn, steps)
            if turn:  # the first calls are slower
                for name, one in taken.items():
                    for what, seconds in one.items():
                        times[name][what].append(seconds)
    rows = []
    for name in ways:
        row: dict[str, Any] = {"way": name}
        for what, base in times[BASE].items():
            quotients = [a / b for a, b in zip(times[name][what], base, strict=True)]
            low, middle, high = statistics.quantiles(quotients, n=4) if len(quotients) > 1 else quotients * 3
            row[f"{what}_ms"] = round(1e3 * statistics.median(times[name][what]), 3)
            row[f"{what}_ratio"] = [round(value, 3) for value in (low, middle, high)]
        rows.append(row)
    return rows


def switching(model: LlamaForCausalLM, found: dict[str, Adapter], folder: Path, rounds: int) -> dict[str, float]:
    """Milliseconds, medians: set_adapter, another composition in a bank, adding an adapter to a bank."""
    with nt.bank(model, found) as bank:
        entries = [bank.entry(name) for name in bank.names]
        norms = list(bank._layout.norms)

        def compose(turn: int) -> None:
            selection = bank.select(entries[turn % ROWS :] + entries[: turn % ROWS])
            for name in norms:
                selection.forward(name, model.get_submodule(name), None, "norm", 3)

        result = {
            "bank_composition_ms": timed(compose, rounds, model.device),
            "bank_add_ms": timed(lambda turn: bank.add("a0", found["a0"], replace=True), rounds, model.device),
        }
    names = list(found)[:2]
    for name in names:
        load_adapter(model, found[name].write(folder / name), name)
    result["set_adapter_ms"] = timed(lambda turn: set_adapter(model, names[turn % 2]), rounds, model.device)
    nt.remove_adapter(model)
    return result


def timed(change: Callable[[int], None], rounds: int, device: torch.device) -> float:
    seconds = []
    for turn in range(rounds + 2):
        synchronize(device)
        began = time.perf_counter()
        change(turn)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return round(1e3 * statistics.median(seconds[2:]), 3)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    import tempfile

    device = torch.device(options.device)
    shapes: dict[str, Any] = {}
    for shape in options.shapes:
        for dtype in options.dtypes:
            model = made(shape, DTYPES[dtype], device)
            found = adapters(model, ROWS)
            rows = speeds(model, found, options.rounds, options.steps)
            with tempfile.TemporaryDirectory() as folder:
                switch = switching(model, found, Path(folder), 2 * options.rounds)
            parameters = sum(p.numel() for p in model.parameters())
            shapes[f"{shape} {dtype}"] = {"parameters": parameters, "rows": rows, "switching": switch}
            show(f"{shape} {dtype}", shapes[f"{shape} {dtype}"])
    return {
        "batch": ROWS,
        "prompt": PROMPT,
        "rounds": options.rounds,
        "steps": options.steps,
        "threads": options.threads,
        "device": options.device,
        "shapes": shapes,
        "provenance": provenance(),
    }


def show(name: str, found: dict[str, Any]) -> None:
    print(f"\n{name}: {found['parameters'] / 1e6:.1f} M parameters, {ROWS} rows")
    print(f"{'':32} {'decode ms':>9}  {'to base (quartiles)':22} {'prefill ms':>10}  to base (quartiles)")
    for row in found["rows"]:
        ratios = [f"{m:.3f} ({low:.3f} to {high:.3f})" for low, m, high in (row["decode_ratio"], row["prefill_ratio"])]
        print(f"{row['way']:32} {row['decode_ms']:9.2f}  {ratios[0]:22} {row['prefill_ms']:10.2f}  {ratios[1]}")
    print(
        ", ".join(f"{key.removesuffix('_ms')} {value:.2f} ms" for key, value in found["switching"].items()), flush=True
    )


def table(record: dict[str, Any]) -> str:
    """Ratios to the base alone of a decoding step in float32, and what switching takes, as Markdown."""
    shapes = {name.split()[0]: found for name, found in record["shapes"].items() if name.endswith("float32")}
    lines = [
        [
            f"{record['batch']} rows, a token each",
            *(f"{found['parameters'] / 1e6:.1f} M parameters" for found in shapes.values()),
        ],
        ["---"] * (len(shapes) + 1),
    ]
    for rows in zip(*(found["rows"] for found in shapes.values()), strict=True):
        ratios = ["{1:.3f} ({0:.3f} to {2:.3f})".format(*row["decode_ratio"]) for row in rows]
        name = rows[0]["way"]
        lines.append([name, *([f"{row['decode_ms']:.1f} ms" for row in rows] if name == BASE else ratios)])
    for key, name in (("bank_composition_ms", "other adapters in the batch"), ("set_adapter_ms", "`set_adapter`")):
        lines.append([name, *(f"{found['switching'][key]:.1f} ms" for found in shapes.values())])
    facts = record["provenance"]
    where = f"{record['threads']} threads of {facts['processor']}" if record["device"] == "cpu" else record["device"]
    return "\n".join(
        [
            *(f"| {' | '.join(cells)} |" for cells in lines),
            "",
            f"Time of a decoding step to that of the base alone (quartiles, {record['rounds']} rounds); Llama shapes, "
            f"float32, {where}; torch {facts['versions']['torch']}.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the figures go")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--steps", type=int, default=8, help="decoding steps of a way in a round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="the tiny shape in fp32, 3 rounds, nothing written")
    parser.add_argument("--docs", action="store_true", help="write the table in docs/adapters.md, too")
    parser.add_argument("--table", action="store_true", help="measure nothing: take the stored figures")
    options = parser.parse_args()
    if options.quick:
        options.shapes, options.dtypes, options.rounds, options.steps = ["tiny"], ["float32"], 3, 4
    torch.set_num_threads(options.threads)
    found = json.loads(options.json.read_text()) if options.table else measure(options)
    if not (options.quick or options.table):
        options.json.parent.mkdir(exist_ok=True)
        write_json(options.json, found)
    if options.docs:
        write_table("bank", table(found), PAGE)


if __name__ == "__main__":
    main()
