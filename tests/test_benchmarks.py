"""The benchmarks run: tiny shapes, few rounds, and the figures that they write."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import bank, compare, demo, gpu, readme, serve, step


def run(module: Any, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_step_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    eager = [name for name in step.METHODS if "compiled" not in name]
    monkeypatch.setattr(step, "METHODS", {name: step.METHODS[name] for name in eager})
    monkeypatch.setattr(step, "peak", lambda name, shape, threads: 5_000_000)
    shape = ["--hidden", "64", "--layers", "1", "--vocabulary", "1000", "--rounds", "2", "--threads", "1"]
    run(step, [*shape, "--json", str(tmp_path / "a.json")], monkeypatch)
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["provenance"]["versions"]["torch"] and record["shape"]["layers"] == 1
    found = {row["method"]: row for row in record["rows"]}
    assert list(found) == eager
    kept = [found[name]["kept_bytes"] for name in ("normtune, one by one", step.OURS, step.SHIPPED, step.LORA)]
    assert kept == sorted(kept)
    assert found[step.OURS]["units"] == pytest.approx(2 + 3 + 1 + 2 * 43 / 16, rel=0.05)
    assert found["normtune, packed, 8-bit gate and up"]["units"] < found[step.OURS]["units"] - 2
    shown = capsys.readouterr().out
    assert f"{step.OURS} to {step.LORA}" in shown and "| 5 |" in shown
    run(step, ["--table", "--json", str(tmp_path / "a.json")], monkeypatch)
    assert capsys.readouterr().out == shown


@pytest.mark.slow
def test_the_gpu_programme_runs_on_a_small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    run(gpu, ["--tiny", "--json", str(tmp_path / "gpu.json")], monkeypatch)
    found = json.loads((tmp_path / "gpu.json").read_text())["shapes"]["tiny"]
    assert all(value < 0.03 for value in found["agreement"].values())
    assert all(row["finite"] for row in found["rows"])
    moved = {row["method"]: row["gains_moved"] for row in found["rows"]}
    assert moved["normtune eager"] == moved["normtune compiled"] == 1.0
    assert moved["PEFT LNTuning"] == 0.0  # bf16 gains: what the fp32 ones are for
    assert {row["pass"] for row in found["rows"]} == {1, 2}
    assert found["saved_units"]["normtune eager"] < found["saved_units"]["PEFT LNTuning"]


def test_a_table_is_put_between_its_marks() -> None:
    begin, end = "<!-- step table: written by `make bench` -->", "<!-- end of step table -->"
    assert readme.with_table(f"a\n{begin}\nold\n{end}\nb", "step", "new") == f"a\n{begin}\nnew\n{end}\nb"
    with pytest.raises(SystemExit, match="lacks the marks"):
        readme.with_table("a", "step", "new")


def test_the_comparison_in_the_readme_is_the_committed_one() -> None:
    """The table is what the stored result gives, and the result holds no path of a machine."""
    text = compare.RESULTS.read_text()
    assert compare.table_of(json.loads(text)) in readme.README.read_text()
    assert not any(f'"/{root}/' in text for root in ("tmp", "home", "root", "work", "Users"))


def test_the_demo_in_the_readme_is_the_committed_one() -> None:
    assert demo.table(json.loads(demo.RESULTS.read_text())) in readme.README.read_text()


@pytest.mark.parametrize("module", [bank, serve], ids=["bank", "serve"])
def test_serving_in_the_docs_is_the_committed_one(module: Any) -> None:
    assert module.table(json.loads(module.RESULTS.read_text())) in module.PAGE.read_text()


def test_serving_in_the_readme_is_the_committed_one() -> None:
    results = [json.loads(module.RESULTS.read_text()) for module in (serve, bank)]
    assert serve.in_short(*results) in readme.README.read_text()
