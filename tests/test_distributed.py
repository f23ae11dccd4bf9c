"""Several processes: equal to one, nothing sent but what trains, no waiting for ever, restarts, shared work."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import ranks
from asked import write_benchmarks
from command import run
from normtune.errors import InputError
from normtune.evaluation.journal import read_answers
from normtune.memory import Traffic, plan_traffic
from normtune.sharding import buckets, level, shard, sum_gradients
from runs import adapter, assert_same, lines, steps
from stubs import llava
from toys import toy_data, toy_recipe

ROOT = Path(__file__).parents[1]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
FEW = 100
"""Bytes of a step that are no gradients and no weights: counts, the loss, how many micro-batches."""


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def launch(arguments: list[str], folder: Path, *options: str) -> str:
    """stderr of two processes that end well."""
    command = [*LAUNCH, *options, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def assert_close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], limit: float) -> None:
    """Per tensor, by norm."""
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert (tensor - two[name]).norm() <= limit * tensor.norm(), name


@pytest.fixture
def recipe(llm_folder: Path, vision_folder: Path, tmp_path: Path) -> dict[str, Any]:
    device = "cpu" if torch.cuda.is_available() else "auto"
    return toy_recipe(llm_folder, vision_folder, toy_data(tmp_path / "data"), device=device)


def train_two(recipe: dict[str, Any], folder: Path, name: str, *more: str) -> None:
    """`torchrun -m normtune train` into `folder / name`."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    launch(["-m", "normtune", "train", "recipe.yaml", "--out", name, *more], folder)


CASES: dict[str, dict[str, Any]] = {
    "norms": {"strategy": "layernorm-simple", "sharded": False},
    "norms, sharded": {"strategy": "layernorm-simple", "sharded": True},
    "norms, sharded, recomputed": {"strategy": "layernorm-simple", "sharded": True, "checkpointed": True},
    "connector, sharded": {"strategy": "connector", "sharded": True},
    "layernorm, sharded": {"strategy": "layernorm", "sharded": True},
    "lora, sharded": {"strategy": ["lora", "norms"], "sharded": True},
    "attn-qv": {"strategy": "attn-qv", "sharded": False},
    "attn-qv, sharded": {"strategy": "attn-qv", "sharded": True},
}


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of every case."""
    folder = tmp_path_factory.mktemp("ranks")
    launch([str(ROOT / "tests" / "ranks.py"), str(folder), json.dumps(CASES)], folder)
    return folder


@pytest.mark.heavy
@pytest.mark.parametrize("name", CASES)
def test_two_processes_compute_what_one_does_and_send_what_trains(name: str, of_two: Path) -> None:
    strategy, sharded = CASES[name]["strategy"], CASES[name]["sharded"]
    figures = json.loads((of_two / f"{name}.json").read_text())
    one, tensors = ranks.run(**CASES[name])
    assert figures["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert_close(tensors, load_file(of_two / f"{name}.safetensors"), 1e-5)
    planned = plan_traffic(llava(), strategy, shard=sharded, micro_batches=2, size=4)
    sent = figures["bytes"]
    assert planned.gradients == figures["trainable_bytes"]
    assert 0 <= sent["allreduce"] - planned.gradients <= FEW
    assert sent.get("allgather", 0) == planned.all_gather
    assert set(sent) <= {"allreduce", "allgather"}  # nothing reduce-scattered, nothing broadcast
    cut = planned.gathered // 4  # weights
    assert figures["held"] == figures["whole"] - cut // 2
    assert (cut > 0) == sharded


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["norms", "attn-qv"])
def test_sharding_changes_no_bit(name: str, of_two: Path) -> None:
    assert_same(load_file(of_two / f"{name}.safetensors"), load_file(of_two / f"{name}, sharded.safetensors"))


def test_bytes_of_a_ring() -> None:
    assert Traffic(1000).sent(1) == 0 and Traffic(1000).sent(2) == 1000 and Traffic(1000).sent(8) == 1750
    assert Traffic(1000, gathered=500, micro_batches=3).sent(2) == 1000 + 2 * 3 * 500 / 2


def test_gradients_are_summed_in_groups_of_neighbours() -> None:
    tensors = [torch.zeros(n) for n in (3, 4, 100, 1, 1)] + [torch.zeros(1, dtype=torch.float64)]
    groups = buckets(tensors, size=40)
    assert [[len(tensor) for tensor in group] for group in groups] == [[3, 4], [100], [1, 1], [1]]


def test_one_process_has_nothing_to_exchange() -> None:
    model = llava()
    batches = [{"input_ids": torch.ones(1, 2)}]
    assert level(model, batches, torch.device("cpu")) == batches
    sum_gradients(model, list(model.parameters()))  # no process group: would raise if it exchanged


def test_a_quantized_base_is_not_cut() -> None:
    model = llava()
    layer = model.model.language_model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match="quantized"):
        shard(model, torch.device("cpu"), [])


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
def test_a_recipe_under_torchrun(
    sharded: bool, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two stages, 24 samples in batches of 23 (in every second step a process is idle), images and questions shared."""
    asked = write_benchmarks(tmp_path / "asked")
    recipe["evaluate"] = {"benchmarks": ["pope", "mme"], "data": str(asked)}
    recipe["save_every"] = "0.0001m"  # late at every step, by a clock that all go by
    for stage in recipe["stages"]:
        stage.update(batch_size=23, micro_batch_size=8)
    recipe["stages"][0].update(cache_features=True)
    recipe["stages"][1].update(strategy="layernorm-simple", evaluate_every=6)
    recipe["model"]["shard"] = sharded
    for name in ("one", "two"):
        monkeypatch.setenv("NORMTUNE_CACHE", str(tmp_path / f"cache of {name}"))
        if name == "two":
            train_two(recipe, tmp_path, name)
        else:
            (tmp_path / "one.yaml").write_text(yaml.safe_dump(recipe))
            assert run("train", str(tmp_path / "one.yaml"), "--out", str(tmp_path / name)) == 0
        stored = list((tmp_path / f"cache of {name}").rglob("*.safetensors"))
        assert len(stored) == (2 if name == "two" else 1)  # each process wrote its share
    one, two = ([line for line in lines(tmp_path / name) if "loss" in line] for name in ("one", "two"))
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    assert_close(adapter(tmp_path / "one"), adapter(tmp_path / "two"), 1e-5)
    scores = [[line for line in lines(tmp_path / name) if line.get("event") == "evaluation"] for name in ("one", "two")]
    assert len(scores[0]) == 1
    for first, second in zip(*scores, strict=True):
        assert {key: first[key] for key in ("pope", "mme")} == {key: second[key] for key in ("pope", "mme")}


@pytest.mark.slow
def test_an_evaluation_under_torchrun_is_written_once_and_goes_on(mllm_folder: Path, tmp_path: Path) -> None:
    asked = write_benchmarks(tmp_path / "asked")
    words = ["evaluate", str(mllm_folder), "--benchmarks", "pope,text", "--data", str(asked), "--batch-size", "2"]
    assert run(*words, "--out", str(tmp_path / "one.json")) == 0
    launch(["-m", "normtune", *words, "--device", "cpu", "--out", "two.json"], tmp_path)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["scores"] == two["scores"]
    texts = [read_answers(tmp_path / name) for name in ("one", "two")]
    assert texts[0] == texts[1]
    journal = tmp_path / "two" / "journal.jsonl"
    full = journal.read_bytes()
    journal.write_bytes(full[:-1])  # killed while it wrote the last round
    launch(["-m", "normtune", *words, "--device", "cpu", "--out", "two.json"], tmp_path)
    assert journal.read_bytes() == full


STALE = """
import os, sys
from normtune.training import resuming, train
if os.environ["RANK"] == "1":
    real = resuming.list_checkpoints
    resuming.list_checkpoints = lambda *given: real(*given)[:-1]
train(sys.argv[1], out=sys.argv[2], resume=True)
"""


@pytest.mark.slow
def test_all_go_on_from_the_checkpoint_that_the_first_one_sees(recipe: dict[str, Any], tmp_path: Path) -> None:
    """On a folder of the network another machine may see an older list of files."""
    recipe["save_every"] = 2
    train_two(recipe, tmp_path, "run")
    whole = adapter(tmp_path / "run")
    for folder in ("adapter", "checkpoints/instruct-6"):
        shutil.rmtree(tmp_path / "run" / folder)
    (tmp_path / "stale.py").write_text(STALE)
    launch(["stale.py", "recipe.yaml", "run"], tmp_path)
    assert_same(whole, adapter(tmp_path / "run"))
    assert steps(tmp_path / "run")[-2:] == [("instruct", 5), ("instruct", 6)]


def workers(parent: int) -> list[int]:
    """Processes that run normtune below a process."""
    found = []
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if b"normtune" in Path(f"/proc/{child}/cmdline").read_bytes():
            found.append(int(child))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["save_every"] = 5
    for stage in recipe["stages"]:
        stage["max_steps"] = 40
    train_two(recipe, tmp_path, "whole")
    command = [*LAUNCH, "--max-restarts", "1", "-m", "normtune", "train", "recipe.yaml", "--out", "killed"]
    log = tmp_path / "killed" / "log.jsonl"
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True) as agent:
        deadline = time.monotonic() + 120
        while not (log.exists() and len(steps(tmp_path / "killed")) > 12) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(workers(agent.pid)[-1], signal.SIGKILL)
        _, said = agent.communicate(timeout=200)
    assert agent.returncode == 0, said[-3000:]
    made = steps(tmp_path / "killed")
    assert "resuming after step" in said
    assert 0 <= len(made) - len(set(made)) <= 5
    assert set(made) == set(steps(tmp_path / "whole"))
    assert_same(adapter(tmp_path / "whole"), adapter(tmp_path / "killed"))
