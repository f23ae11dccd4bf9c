"""What a run folder holds, for tests that compare runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]


def adapter(folder: Path) -> Tensors:
    return load_file(folder / "adapter" / "adapter.safetensors")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def steps(folder: Path) -> list[tuple[str, int]]:
    """Stage and number of each step, in the order in which they were made."""
    return [(line["stage"], line["step"]) for line in lines(folder) if "loss" in line]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_same(a: Tensors, b: Tensors) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
