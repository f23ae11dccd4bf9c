"""The benchmarks run: a tiny shape, one round beside the warm-up, and the figures that they write."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import step


def test_step_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    shape = ["--hidden", "64", "--layers", "1", "--vocabulary", "1000", "--rounds", "2", "--threads", "1"]
    arguments = [*shape, "--json", str(tmp_path / "a.json")]
    monkeypatch.setattr(sys, "argv", ["step", *arguments])
    try:
        step.main()
    finally:
        torch.set_num_threads(threads)
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["provenance"]["versions"]["torch"] and record["shape"]["layers"] == 1
    kept = [row["kept_bytes"] for row in record["rows"]]
    assert kept[4] < kept[3] < kept[0] < kept[2]  # one by one, padded, PEFT's norms, PEFT's LoRA
    assert "to LoRA" in capsys.readouterr().out
