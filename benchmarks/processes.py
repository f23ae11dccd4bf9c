"""What several processes send one another in a step, and how many samples they train a second.

    python -m benchmarks.processes --table    # bytes per step by strategy and size, from shapes (docs/cluster.md)
    python -m benchmarks.processes            # the embedded world: counted bytes, samples/s of two processes and of one

`Collectives` counts what torch.distributed is given, at the dispatcher, independently of what normtune plans
(memory/traffic.py). Figures go to benchmarks/results/processes.json (or --json FILE). Not here: what a network makes
of it; two processes of one machine share its memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "processes.json"
STRATEGIES: tuple[str | list[str], ...] = ("layernorm-simple", ["norms", "connector"], "lora", "layernorm", "full")
SIZES = {"7B": (4096, 11008, 32, 32), "13B": (5120, 13824, 40, 40)}  # Llama 2: hidden, inner, blocks, heads
ETHERNET = {"1 Gbit/s": 125e6, "10 Gbit/s": 1.25e9}  # bytes a second
STEPS = 12


class Collectives(TorchDispatchMode):
    """Within, notes every exchange of torch.distributed: `calls` and `bytes` by operation.

    Bytes are those of the whole tensor: what is summed (all-reduce), what everyone has afterwards (all-gather).
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            name = function._schema.name.split("::")[1].strip("_").removesuffix("_base")
            self.calls[name] += 1
            self.bytes[name] += max(map(size, args[:2]))
        return function(*args, **(kwargs or {}))


def size(given: Any) -> int:
    """Bytes of a tensor, or of tensors in lists."""
    if isinstance(given, torch.Tensor):
        return given.numel() * given.element_size()
    return sum(map(size, given)) if isinstance(given, list | tuple) else 0


def llava(hidden: int, inner: int, blocks: int, heads: int) -> Any:
    """A Llama under CLIP ViT-L/14, on the meta device."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=blocks, num_attention_heads=heads)
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )
    with torch.device("meta"):
        return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))


def table() -> list[str]:
    """Rows of Markdown: by strategy and size, gradients, what each of many processes sends, and seconds for it."""
    from normtune.memory import Traffic, plan_traffic

    many = 8
    head = ["strategy", "LLM", "gradients", f"sent by each of {many}", *(f"over {name}" for name in ETHERNET)]
    head += ["with `shard: true`, per micro-batch, also"]
    rows = []
    for name, shape in SIZES.items():
        model = llava(*shape)
        for strategy in STRATEGIES:
            label = strategy if isinstance(strategy, str) else "+".join(strategy)
            found = plan_traffic(model, strategy, shard=True)
            alone = Traffic(found.gradients).sent(many)
            seconds = [f"{alone / rate:.3g} s" for rate in ETHERNET.values()]
            gathered = Traffic(0, found.gathered).sent(many)
            rows.append([label, name, human(found.gradients), human(alone), *seconds, human(gathered)])
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def human(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return "0" if not count else f"{count:.3g} {unit}"


def launch(processes: int, arguments: list[str]) -> str:
    """stdout of a module under torchrun, or alone, one thread to a process."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    there = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*start, *arguments], cwd=ROOT, env=there, check=True, capture_output=True, text=True).stdout


def world(out: Path, steps: int, strategy: str, shard: bool) -> list[str]:
    """Arguments of `normtune train` for both stages of the embedded world, `steps` each."""
    values = {"stages.0.max_steps": steps, "stages.1.max_steps": steps, "stages.1.strategy": strategy}
    values |= {"model.shard": str(shard).lower(), "save_every": 1000, "device": "cpu"}
    return ["recipes/world.yaml", *(f"{key}={value}" for key, value in values.items()), "--out", str(out)]


def rate(processes: int, strategy: str, shard: bool) -> float:
    """Samples a second of stage 2, by the median step after the first."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        launch(processes, ["-m", "normtune", "train", *world(out, STEPS, strategy, shard)])
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    seconds = [
        one["tokens"] / one["tokens_per_second"] for one in lines if "loss" in one and one["stage"] == "instruct"
    ]
    return 16 / statistics.median(seconds[1:])  # samples of a step of recipes/world.yaml


def counted(strategy: str, shard: bool) -> dict[str, dict[str, float]]:
    """Calls and bytes of a step of stage 2 on two processes: 5 steps less 3."""
    found = []
    for steps in (3, 5):
        text = launch(2, ["-m", "benchmarks.processes", "--count", strategy, str(int(shard)), str(steps)])
        found.append(json.loads(text.strip().splitlines()[-1]))
    few, many = found
    return {kind: {key: (many[kind][key] - few[kind].get(key, 0)) / 2 for key in many[kind]} for kind in many}


def count(strategy: str, shard: bool, steps: int) -> None:
    """In each of two processes: trains stage 1 for a step and stage 2 for `steps`; the first prints what was sent."""
    from normtune.recipe import load_recipe
    from normtune.training import train
    from normtune.world import resolve

    folder = Path(tempfile.gettempdir()) / f"normtune-count-{os.environ['TORCHELASTIC_RUN_ID']}"
    _, *values, _, _ = world(folder, steps, strategy, shard)
    recipe = resolve(load_recipe(ROOT / "recipes" / "world.yaml", [*values, "stages.0.max_steps=1"]))
    with Collectives() as sent:
        train(recipe, out=folder, quiet=True)
    if os.environ["RANK"] == "0":
        import shutil

        shutil.rmtree(folder)
        print(json.dumps({"calls": sent.calls, "bytes": sent.bytes}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table of docs/cluster.md")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--count", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table:
        print("\n".join(table()))
        return
    if options.count:
        count(options.count[0], options.count[1] == "1", int(options.count[2]))
        return
    from normtune.runlog import provenance

    rows = []
    one = rate(1, "layernorm-simple", False)
    for shard in (False, True):
        row = {"shard": shard, "samples_per_second": rate(2, "layernorm-simple", shard), "one_process": one}
        row |= {"ratio": row["samples_per_second"] / one, "sent_per_step": counted("layernorm-simple", shard)}
        rows.append(row)
        print(json.dumps(row))
    record = {"load": os.getloadavg()[0], "rows": rows, "provenance": provenance()}
    options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
