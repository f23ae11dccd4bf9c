"""A made-up result document of a comparison and of an analysis, as large as a real one: what the report is tested on.

Figures come from a seeded generator and mean nothing. Seven strategies, controls and baselines, five benchmarks, three
seeds, six layers; failed cells, a band that may go on, answers that look like HTML and Markdown.
"""

from __future__ import annotations

import base64
import io
import random
from typing import Any

from PIL import Image, ImageDraw

STRATEGIES = ("full", "lora", "attn-qv", "attn-mlp", "layernorm", "layernorm-simple", "connector")
CONTROLS = ("stage 1 only", "connector+embed+head", "layernorm, no image", "layernorm, another image")
BENCHMARKS = {"pope": 300, "mme": 180, "vqav2": 200, "coco": 60, "flickr30k": 60}
PARAMETERS = (1_213_696, 268_544, 214_016, 590_208, 157_440, 1_152, 49_408, 0, 156_288, 0, 0)
PARTS = {"layernorm": ["norms", "connector", "embed", "head"], "layernorm-simple": ["norms"]}
ROLES = ("input", "post_attention")


def comparison() -> dict[str, Any]:
    draw = random.Random(6)
    labels = [*STRATEGIES, *CONTROLS]
    level = [0.88, 0.86, 0.82, 0.87, 0.9, 0.8, 0.7, 0.55, 0.71, 0.5, 0.51]
    rows = [row(draw, *facts) for facts in zip(labels, level, PARAMETERS, strict=True)]
    for place, one in enumerate(rows):
        gaps = {other["label"]: one["average"]["mean"] - other["average"]["mean"] for other in rows[place + 1 :]}
        one["differences"] = {label: {"average": measured(gap)} for label, gap in gaps.items()}
    rows[2]["failed"] = [{"seed": 2, "error": "JobError: loss is not finite at step 31; lower learning_rate"}]
    rows[2]["seeds"] = [0, 1]
    return {
        "format": 1,
        "experiment": "strategies",
        "title": "world: strategies",
        "command": "normtune compare recipes/world.yaml --strategies all --seeds 3 --learning-rates auto",
        "request": {"strategies": list(STRATEGIES), "seeds": [0, 1, 2], "learning_rates": "auto"},
        "recipe": "name: world\nseed: 0\nmodel:\n  llm: world:llm\n  vision: world:vision\n" * 4,
        "recipe_hash": "3f9a2b17c0de",
        "asked_on": "data",
        "benchmarks": list(BENCHMARKS),
        "questions": BENCHMARKS,
        "seeds": [0, 1, 2],
        "rows": rows,
        "winners": {
            "pope": {"best": "layernorm", "tied": []},
            "mme": {"best": "full", "tied": ["layernorm", "lora", "attn-mlp"]},
            "average": {"best": "layernorm", "tied": ["full"]},
        },
        "search": {name: candidates(draw) for name in STRATEGIES},
        "curves": None,
        "axis": None,
        "findings": ["the smallest subset within 2 % of all norms: 4 of 12"],
        "analysis": {name: analysis(draw, name) for name in STRATEGIES},
        "examples": [example(task, color, labels) for task, color in zip(BENCHMARKS, ("red", "teal"), strict=False)],
        "claims": claims(),
        "provenance": {
            "versions": {"normtune": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
            "python": "3.11.2",
            "platform": "Linux",
            "processor": "a made-up processor, 2.60GHz",
            "cores": 2,
        },
        "seconds": 2312.4,
        "wall_seconds": 600.0,
        "started": "2026-11-21T10:00:00+00:00",
    }


def sweep() -> dict[str, Any]:
    """Learning rates: rows and curves of three strategies at eight rates, no search, no analysis."""
    draw, found = random.Random(7), comparison()
    rates = [10 ** (-4 + n / 2) for n in range(8)]
    rows, curves = [], []
    for name, best in (("full", 2), ("lora", 3), ("layernorm", 5)):
        own = [
            row(draw, f"{name}, rate {rate:.3g}", 0.9 - 0.03 * (n - best) ** 2, 1000) for n, rate in enumerate(rates)
        ]
        for one, rate in zip(own, rates, strict=True):
            one["factors"] = {"strategy": name, "learning_rate": rate}
        means = [one["average"] for one in own]
        band = {"low": rates[best] / 2, "high": rates[best] * 2, "decades": 0.6, "open": []}
        curve = {"mean": [one["mean"] for one in means], "interval": [one["interval"] for one in means], "band": band}
        curves.append({"name": name, "x": rates, "failed": [], **curve})
        rows += own
    full = curves[0]  # its two highest rates failed, and its band reaches the lowest
    for key in ("x", "mean", "interval"):
        full[key] = full[key][:-2]
    full |= {"failed": rates[-2:], "band": {"low": rates[0], "high": rates[4], "decades": 2.0, "open": ["low"]}}
    changed = {"experiment": "sweep learning-rate", "title": "world: sweep learning-rate", "rows": rows}
    changed |= {"curves": curves, "axis": {"x": "learning rate", "log": True}, "search": None, "analysis": {}}
    return {**found, **changed, "winners": {}, "claims": [], "asked_on": "dev"}


def measured(mean: float, half: float = 0.02) -> dict[str, Any]:
    return {"mean": mean, "interval": [mean - half, mean + half]}


def row(draw: random.Random, label: str, level: float, parameters: int) -> dict[str, Any]:
    scores = {}
    for name in BENCHMARKS:
        mean = level + draw.uniform(-0.05, 0.05)
        figures = {f"{name} {split}": measured(mean) for split in ("random", "popular", "adversarial")}
        per_seed = {str(seed): mean + draw.uniform(-0.01, 0.01) for seed in range(3)}
        scores[name] = {**measured(mean, draw.uniform(0.01, 0.04)), "per_seed": per_seed, "figures": figures}
    baseline = {"no image": "blind", "another image": "shuffled"}.get(label.partition(", ")[2], "none")
    trains = parameters > 0
    cost = {
        "steps": 112,
        "trainable_parameters": parameters,
        "total_parameters": 1_400_000,
        "percent": parameters / 14_000,
        "adapter_bytes": 4 * parameters + 700,
        "saved_bytes": int(4e6 + 3 * parameters),
        "peak_bytes": int(6e8 + 20 * parameters),
        "peak_of": "resident memory",
        "step_seconds": 0.04 + parameters / 5e7,
        "step_quartiles": [0.037 + parameters / 5e7, 0.051 + parameters / 5e7],
        "seconds": 12.5,
        "moved_percent": 100.0 if "layernorm" in label else None,
        "stream": "00",
        "first_loss": 2.4,
        "last_loss": 0.4 + draw.random(),
    }
    return {
        "label": label,
        "factors": {"strategy": "none" if label == "stage 1 only" else label.partition(",")[0]},
        "control": label in CONTROLS,
        "baseline": baseline,
        "seeds": [0, 1, 2],
        "failed": [],
        "learning_rate": 0.00316 if trains else None,
        "scores": scores,
        "average": measured(level, 0.015),
        "relative": {name: measured(level / base - 1) for name, base in (("lora", 0.86), ("full", 0.88))},
        "text": None
        if baseline != "none"
        else {"before": 0.81, "after": level - 0.1, "interval": [level - 0.13, level - 0.08], "change": level - 0.91},
        "cost": cost if trains else None,
    }


def candidates(draw: random.Random) -> list[dict[str, Any]]:
    best, top = draw.randrange(1, 4), draw.uniform(0.75, 0.9)
    tried = []
    for n in range(5):
        score = top - 0.04 * (n - best) ** 2
        rate = float(f"{10 ** (-4 + n / 2):.3g}")
        scores = dict.fromkeys(BENCHMARKS, score)
        tried.append({"learning_rate": rate, "score": score, "scores": scores, "chosen": n == best})
    tried[0]["score"] = None  # failed
    return tried


def analysis(draw: random.Random, label: str, layers: int = 7) -> dict[str, Any]:
    """A document of `analyze_run`."""
    fall = draw.uniform(0.05, 0.16)
    parts = PARTS.get(label, ["llm", "connector"])
    names = [f"model.layers.{block}.{role}_layernorm" for block in range(layers - 1) for role in ROLES]

    def similar() -> dict[str, Any]:
        matrix = [[1 - fall * abs(i - j) for i in range(layers)] for j in range(layers)]
        rank = [20 - 12 * fall * layer for layer in range(layers)]
        cka: list[list[float | None]] = [[value**2 for value in line] for line in matrix]
        cka[0][0] = None
        means = {"mean_cosine": 1 - 2.7 * fall, "mean_cka": (1 - 2.7 * fall) ** 2}
        return {"cosine": matrix, "cka": cka, **means, "effective_rank": rank}

    def spread(step: int) -> dict[str, float | None]:
        variance = fall * 10 ** (-3 - step / 60) * draw.uniform(0.8, 1.2)
        return {"variance": variance, "share": fall, "noise": None, "norm": variance**0.5}

    def gain(name: str) -> dict[str, Any]:
        block, trained = int(name.split(".")[2]), "norms" in parts
        change = draw.uniform(0.02, 0.3) * (1 + block) if trained else 0.0
        role = ROLES[names.index(name) % 2]
        return {"name": name, "role": role, "block": block, "change": change, "angle": 40 * change, "trained": trained}

    checkpoints = [
        {"step": step, "parts": {p: spread(step) for p in parts}, "norms": {n: spread(step) for n in names}}
        for step in (0, 28, 56, 84, 112)
    ]
    final = {"name": "model.norm", "role": "final", "block": None, "change": 0.1, "angle": 3.0, "trained": True}
    return {
        "format": 1,
        "run": f"runs/{label}",
        "strategy": label,
        "seed": 0,
        "layers": layers,
        "samples": 64,
        "similarity": {"image": similar(), "text": similar()},
        "losses": {
            "train": 0.4,
            "held_out": 0.4 + fall,
            "gap": fall,
            "checkpoints": [
                {"step": 0, "train": 2.4, "held_out": 1.1},
                {"step": 56, "train": 0.7, "held_out": 0.6},
                {"step": 112, "train": 0.4, "held_out": 0.4 + fall},
            ],
        },
        "gradients": {
            "checkpoints": checkpoints,
            "formula": "variance = sum_b |g_b - G|^2 / (m - 1) / values",
            "batches": 8,
            "batch_size": 16,
            "stream": "5ce9c20bb3b0e5a4",
            "trained": parts,
        },
        "gains": [gain(name) for name in names] + ([final] if label == "full" else []),
        "image": {
            key: {"pope": 0.9 - n / 5, "mme": 0.8 - n / 5} for n, key in enumerate(("none", "shuffled", "blind"))
        },
        "notes": ["Losses are means over supervised tokens."],
        "seconds": 12.0,
    }


def example(task: str, color: str, labels: list[str]) -> dict[str, Any]:
    picture = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(picture).ellipse((20, 20, 70, 70), fill=color)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    answers = {label: "Yes, there is a circle left of the square." for label in labels if ", " not in label}
    answers["full"] = "<script>alert(1)</script> | *no* [x](http://example.com)"
    answers["lora"] = "no" * 120
    return {
        "image": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(),
        "task": task,
        "question": "<image>\nIs there a circle in the image?",
        "truth": "yes",
        "answers": answers,
    }


def claims() -> list[dict[str, Any]]:
    held = "layernorm 0.900, lora 0.860: +4.7 % on average of five tasks (95 % interval +1.2 to +8.0)."
    return [
        {
            "claim": "LayerNorm beats LoRA, average of five tasks",
            "paper": "+20 % at 13B",
            "source": "[S]",
            "verdict": "held",
            "here": held,
        },
        {
            "claim": "GPU memory against LoRA",
            "paper": "-17.6 % at 13B",
            "source": "[S]",
            "verdict": "not testable here",
            "here": "Resident memory of a tiny model is the program's own, not the model's.",
        },
        {
            "claim": "Norms + connector > norms alone > connector alone",
            "paper": "ordering",
            "source": "[C]",
            "verdict": "did not hold",
            "here": "norms alone 0.800, connector alone 0.700; norms + connector was not compared.",
        },
    ]
