"""Comparisons on tiny models: fair, resumable, honest about what failed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from asked import write_benchmarks
from normtune.comparison import Compared, Request, compare, engines, running
from normtune.errors import InputError
from normtune.recipe import load_recipe
from normtune.runlog import read_lines
from toys import toy_data, toy_recipe

pytestmark = pytest.mark.heavy
TWICE = ("layernorm", "norms", "layernorm")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training data and, below eval and dev, the benchmarks."""
    root = tmp_path_factory.mktemp("files")
    write_benchmarks(root / "eval")
    write_benchmarks(root / "dev")
    toy_data(root / "train")
    return root


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NORMTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cells run in this process; returns the titles of those that ran."""
    titles: list[str] = []

    def run_cells(cells: Any, engine: str) -> Iterator[Any]:
        for cell in cells:
            titles.append(cell.title)
            yield cell, engines.outcome(cell)

    monkeypatch.setattr(running, "run_cells", run_cells)
    return titles


def recipe_for(llm: Path, vision: Path, files: Path, **changes: Any) -> dict[str, Any]:
    evaluate = {"benchmarks": ["pope", "vqav2", "text"], "data": str(files / "eval"), "dev": str(files / "dev")}
    recipe = toy_recipe(llm, vision, files / "train", evaluate=evaluate)
    recipe["stages"][0]["max_steps"], recipe["stages"][1]["max_steps"] = 2, 3
    return {**recipe, **changes}


def run(recipe: dict[str, Any], out: Path, **asked: Any) -> Compared:
    return compare(load_recipe(recipe), Request(**{"seeds": (0,), "analyzed": False, **asked}), out)


def row_of(compared: Compared, label: str) -> dict[str, Any]:
    (row,) = [row for row in compared.document["rows"] if row["label"] == label]
    return row


@pytest.fixture
def basic(llm_folder: Path, vision_folder: Path, files: Path) -> dict[str, Any]:
    return recipe_for(llm_folder, vision_folder, files)


@pytest.mark.slow
def test_every_strategy_sees_the_same(basic: dict[str, Any], tmp_path: Path, in_process: list[str]) -> None:
    """Same start, same batches, same questions; a strategy that is listed twice comes out twice the same."""
    compared = run(basic, tmp_path / "out", strategies=TWICE, seeds=(0, 1))
    rows = compared.document["rows"]
    trained = [row for row in rows if row["cost"] and row["label"] != "stage 1 only"]
    assert [row["label"] for row in trained] == [*TWICE[:2], "layernorm (2)", "connector", "connector+embed+head"]
    assert {row["baseline"] for row in rows} == {"none", "blind", "shuffled"}
    assert not compared.failed
    for seed in (0, 1):
        folders = list((tmp_path / "out" / "cells").glob(f"*/seed-{seed}"))
        records = [json.loads((folder / "cell.json").read_text())["trained"] for folder in folders]
        assert len(records) == 5 and len({record["stream"] for record in records}) == 1
        results = [json.loads((folder / "evaluations" / "test.json").read_text()) for folder in folders]
        assert len({json.dumps([v["questions_sha256"] for v in r["data"].values()]) for r in results}) == 1
    records = [json.loads(path.read_text())["trained"] for path in (tmp_path / "out").glob("cells/*/*/cell.json")]
    streams = {record["stream"] for record in records}
    assert len(streams) == 2  # one per seed
    one, two = row_of(compared, "layernorm"), row_of(compared, "layernorm (2)")
    for key in ("scores", "average", "text"):
        assert one[key] == two[key]
    for seed in (0, 1):
        (first,), (second,) = (
            [
                load_file(path)
                for path in (tmp_path / "out").glob(f"cells/{name}-0.01-*/seed-{seed}/adapter/*.safetensors")
            ]
            for name in ("layernorm", "layernorm-2")
        )
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert in_process.count("stage 1") == 1
    logs = [read_lines(path) for path in (tmp_path / "out").glob("cells/*/*/log.jsonl")]
    assert all({line["stage"] for line in log if "loss" in line} == {"instruct"} for log in logs)


@pytest.mark.slow
def test_what_is_finished_is_not_done_again(basic: dict[str, Any], tmp_path: Path, in_process: list[str]) -> None:
    first = run(basic, tmp_path / "out", strategies=("connector",))
    assert in_process
    in_process.clear()
    again = run(basic, tmp_path / "out", strategies=("connector",))
    assert in_process == []
    assert again.document["rows"] == first.document["rows"]
    more = run(basic, tmp_path / "out", strategies=("connector", "qk_norms+norms"), seeds=(0,))
    assert set(in_process) == {"qk_norms+norms, seed 0"}  # and it fails: a Llama has none
    assert len(more.failed) == 1 and "qk_norms" in more.failed[0]


def test_a_failed_cell_is_reported_and_the_others_go_on(
    basic: dict[str, Any], tmp_path: Path, in_process: list[str]
) -> None:
    compared = run(basic, tmp_path / "out", strategies=("qk_norms", "norms"))
    assert row_of(compared, "qk_norms")["failed"][0]["seed"] == 0
    assert row_of(compared, "qk_norms")["average"] is None
    assert row_of(compared, "norms")["average"]["mean"] >= 0
    for name in ("report.html", "report.md"):
        assert "qk_norms" in (tmp_path / "out" / name).read_text()


@pytest.mark.slow
def test_images_are_encoded_once(
    basic: dict[str, Any], tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 1 and features are computed once per comparison: as many images through the encoder as there are."""
    from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

    monkeypatch.setenv("NORMTUNE_CACHE", str(tmp_path / "cache"))
    seen = 0
    forward = CLIPVisionEmbeddings.forward

    def counting(self: Any, pixel_values: Any, **options: Any) -> Any:
        nonlocal seen
        seen += len(pixel_values) if pixel_values.abs().sum() else 0  # not the probes, which are zero
        return forward(self, pixel_values, **options)

    monkeypatch.setattr(CLIPVisionEmbeddings, "forward", counting)
    basic["evaluate"]["benchmarks"] = ["pope", "text"]
    run(basic, tmp_path / "out", strategies=("norms",))
    once = seen
    run(basic, tmp_path / "out", strategies=("norms", "layernorm"), seeds=(0, 1))
    assert once >= 4 + 4
    assert seen == once


@pytest.mark.slow
def test_rates_are_searched_on_the_development_split(
    basic: dict[str, Any], tmp_path: Path, in_process: list[str]
) -> None:
    names = ("connector", "connector+embed+head")  # the controls, which are searched, too
    compared = run(basic, tmp_path / "out", strategies=names, learning_rates="auto", candidates=3)
    search = compared.document["search"]
    assert {len(tried) for tried in search.values()} == {3} and set(search) == set(names)
    for name, tried in search.items():
        (chosen,) = [one for one in tried if one["chosen"]]
        assert chosen["score"] == max(one["score"] for one in tried)
        assert row_of(compared, name)["learning_rate"] == chosen["learning_rate"]
    runs = list((tmp_path / "out" / "cells").glob("*/seed-0"))
    assert all((folder / "evaluations").is_dir() for folder in runs)
    with_test = [folder for folder in runs if (folder / "evaluations" / "test.json").is_file()]
    assert len(with_test) < len(runs)  # the others never saw the test questions


@pytest.mark.parametrize("equal", ["samples", pytest.param("supervised-tokens", marks=pytest.mark.slow)])
def test_kinds_of_data(basic: dict[str, Any], files: Path, tmp_path: Path, in_process: list[str], equal: str) -> None:
    samples = json.loads((files / "train" / "data.json").read_text())
    sources = []
    for kind, part in (("short", samples[::3]), ("long", samples[2::3])):
        path = tmp_path / f"{kind}.json"
        path.write_text(json.dumps(part))
        sources.append({"path": str(path), "images": str(files / "train" / "images"), "kind": kind})
    basic["stages"][1]["data"] = sources
    compared = run(basic, tmp_path / "out", kinds=("short", "long", "mixed"), equal=equal)
    rows = [row for row in compared.document["rows"] if row["factors"].get("kind") and row["baseline"] == "none"]
    assert [row["factors"]["kind"] for row in rows] == ["short", "long", "mixed"]
    steps = [row["cost"]["steps"] for row in rows]
    assert (len(set(steps)) == 1) == (equal == "samples")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "nothing to compare"),
        ({"strategies": ("layernrm",)}, "layernorm"),
        ({"kinds": ("short",), "sweep": "data"}, "one of them"),
        ({"sweep": "rates"}, "learning-rate"),
        ({"kinds": ("nonsense",)}, "nonsense"),
        ({"strategies": ("norms",), "seeds": (0, 0)}, "seed"),
    ],
)
def test_wrong_requests(basic: dict[str, Any], tmp_path: Path, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        run(basic, tmp_path / "out", **asked)


@pytest.mark.slow
def test_a_folder_of_another_recipe_is_refused(basic: dict[str, Any], tmp_path: Path, in_process: list[str]) -> None:
    run(basic, tmp_path / "out", strategies=("connector",))
    basic["stages"][1]["batch_size"] = 4
    with pytest.raises(InputError, match="batch_size"):
        run(basic, tmp_path / "out", strategies=("connector",))


def test_no_questions_no_comparison(basic: dict[str, Any], tmp_path: Path) -> None:
    del basic["evaluate"]
    with pytest.raises(InputError, match="evaluate"):
        run(basic, tmp_path / "out", strategies=("connector",))


@pytest.mark.slow
def test_a_comparison_that_was_moved_goes_on(basic: dict[str, Any], tmp_path: Path, in_process: list[str]) -> None:
    """Another path, and another strategy: the rows that are there stay, a training that had begun goes on."""
    run(basic, tmp_path / "out", strategies=("connector",))
    (adapter,) = (tmp_path / "out").glob("cells/connector-0.01-*/seed-0/adapter")
    shutil.rmtree(adapter)  # as if killed after the last checkpoint
    (adapter.parent / "cell.json").unlink()
    (tmp_path / "out").rename(tmp_path / "moved")
    in_process.clear()
    compared = run(basic, tmp_path / "moved", strategies=("connector",))
    assert in_process == ["connector, seed 0"] and not compared.failed


@pytest.mark.slow
def test_other_data_is_another_training(basic: dict[str, Any], tmp_path: Path, in_process: list[str]) -> None:
    """The same label and rate with another stage behind them is not taken for what is there."""
    basic["stages"][1]["data"][0]["kind"] = "one"
    run(basic, tmp_path / "out", kinds=("one",), strategies=("norms",))
    in_process.clear()
    compared = run(basic, tmp_path / "out", kinds=("one",), strategies=("connector",))
    assert in_process == ["one, seed 0"]
    assert row_of(compared, "one")["cost"]["trainable_parameters"] > 2000


@pytest.mark.slow
def test_a_strategy_without_a_working_rate_fails_alone(
    basic: dict[str, Any], tmp_path: Path, in_process: list[str]
) -> None:
    names = ("connector", "qk_norms", "connector+embed+head")
    compared = run(basic, tmp_path / "out", strategies=names, learning_rates=(1e-3,))
    assert row_of(compared, "qk_norms")["failed"] and row_of(compared, "connector")["average"]
    assert not any(one["chosen"] for one in compared.document["search"]["qk_norms"])


@pytest.mark.parametrize("change", ["data", "model", "benchmarks"])
def test_wrong_input_leaves_nothing(basic: dict[str, Any], tmp_path: Path, change: str) -> None:
    if change == "data":
        basic["stages"][1]["data"][0]["path"] = str(tmp_path / "missing.json")
    elif change == "model":
        basic["model"]["vision"] = str(tmp_path / "missing")
    else:
        basic["evaluate"]["benchmarks"] = ["text"]
    with pytest.raises(InputError, match=r"missing|no images"):
        run(basic, tmp_path / "out", strategies=("norms",))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_and_started_again(basic: dict[str, Any], tmp_path: Path) -> None:
    """SIGKILL in the middle, in processes of their own: the child ends too, the same command completes the table."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(basic))
    command = [
        sys.executable,
        "-m",
        "normtune",
        "compare",
        str(path),
        "--strategies",
        "norms,layernorm",
        "--no-analysis",
    ]

    def records() -> list[Path]:
        return sorted((tmp_path / "a").glob("cells/*/*/cell.json"))

    process = subprocess.Popen([*command, "--out", str(tmp_path / "a")])
    while not records():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {record: os.stat(record).st_mtime_ns for record in records()}
    assert len(before) < 4
    subprocess.run([*command, "--out", str(tmp_path / "a")], check=True)
    assert all(os.stat(record).st_mtime_ns == stamp for record, stamp in before.items())
    subprocess.run([*command, "--out", str(tmp_path / "b")], check=True)
    rows = [json.loads((tmp_path / name / "report.json").read_text())["rows"] for name in "ab"]
    for one, two in zip(*rows, strict=True):
        assert one["scores"] == two["scores"] and one["average"] == two["average"]


@pytest.mark.slow
def test_ray_gives_the_same(basic: dict[str, Any], tmp_path: Path, in_process: list[str]) -> None:
    pytest.importorskip("ray", reason="pip install 'normtune[ray]'")
    here = run(basic, tmp_path / "here", strategies=("norms",))
    cells = [cell for cell, error in engines.on_ray([]) if error]
    assert cells == []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "run_cells", engines.run_cells)
        there = compare(load_recipe(basic), Request(("norms",), analyzed=False), tmp_path / "there", engine="ray")
    assert [row["scores"] for row in here.document["rows"]] == [row["scores"] for row in there.document["rows"]]
