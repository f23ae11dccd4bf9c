"""A small data set of coloured squares in LLaVA's format, and a recipe for it on the tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "white": (240, 240, 240)}


def toy_data(folder: Path, count: int = 24) -> Path:
    """Writes images/ and data.json: what colour is it?"""
    (folder / "images").mkdir(parents=True)
    samples = []
    for number in range(count):
        name = list(COLOURS)[number % len(COLOURS)]
        Image.new("RGB", (32, 32), COLOURS[name]).save(folder / "images" / f"{number}.png")
        turns = [
            {"from": "human", "value": "<image>\nWhat colour is it?"},
            {"from": "gpt", "value": name + " paint" * (number % 3)},
        ]
        samples.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(samples, indent=1))
    return folder


def toy_recipe(llm: Path, vision: Path, data: Path, **changes: Any) -> dict[str, Any]:
    source = [{"path": str(data / "data.json"), "images": str(data / "images")}]
    stage = {"data": source, "batch_size": 8, "max_steps": 6, "warmup_ratio": 0.2}
    recipe = {
        "name": "toy",
        "threads": 1,
        "model": {"llm": str(llm), "vision": str(vision), "dtype": "float32"},
        "stages": [
            {"name": "align", "strategy": "connector", "learning_rate": 1e-2, **stage},
            {"name": "instruct", "strategy": "layernorm", "learning_rate": 1e-2, **stage},
        ],
    }
    return {**recipe, **changes}
