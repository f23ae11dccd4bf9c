"""The loop: losses, accumulation, stages, gains that stay. Tiny models, fp32, one thread. Resume: test_resume.py."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from normtune import runlog
from normtune.errors import InputError, JobError
from normtune.flops import Flops
from normtune.kernels import HeadLoss
from normtune.recipe import Stage
from normtune.step import add_throughput, batch_digest, check_rates, make_optimizer, schedule, supervised_loss
from normtune.strategy import apply, tuning
from normtune.training import train
from normtune.tuned import open_tuned
from runs import adapter, assert_same, lines
from stubs import inputs, llava
from toys import toy_data, toy_recipe


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_data(tmp_path_factory.mktemp("toys") / "data")


@pytest.fixture
def recipe(llm_folder: Path, vision_folder: Path, toys: Path) -> dict[str, Any]:
    return toy_recipe(llm_folder, vision_folder, toys)


def test_loss_is_the_sum_over_supervised_tokens() -> None:
    model = llava()
    batch = inputs(model)
    labels = batch.pop("labels").clone()
    labels[:, :20] = -100
    labels[1, 22:] = -100
    loss = supervised_loss(model, {**batch, "labels": labels})
    count = int((labels[:, 1:] != -100).sum())
    wanted = model(**batch, labels=labels).loss * count
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)


def test_throughput_counts_the_wait_for_data() -> None:
    record: dict[str, Any] = {"tokens": 300, "supervised_tokens": 30, "images": 2, "pairs": 400, "seconds": 2.0}
    add_throughput(record, 1.0, Flops(token=1e9, supervised=1e9, image=1e9, pair=1e6), peak=1e12)
    assert record == {
        "tokens": 300,
        "supervised_tokens": 30,
        "tokens_per_second": 100.0,
        "supervised_per_second": 10.0,
        "data_wait": 0.3333,
        "tflops": 0.1108,  # (300 + 30 + 2 + .4) / 3
        "mfu": 0.1108,
    }


@pytest.mark.heavy
@pytest.mark.parametrize(
    "options",
    [
        {"packing": False},
        pytest.param({"packing": True}, marks=pytest.mark.slow),
        pytest.param({"packing": True, "micro_batch_size": 2}, marks=pytest.mark.slow),
        {"cache_features": True},
        {"activations": "8bit"},
        pytest.param({"packing": True, "cache_features": True, "checkpoint_activations": True}, marks=pytest.mark.slow),
        pytest.param({"packing": True, "compile": True}, marks=pytest.mark.slow),
    ],
    ids=lambda options: "+".join(options),
)
def test_how_a_stage_computes_does_not_change_its_losses(
    options: dict[str, Any], recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NORMTUNE_CACHE", str(tmp_path / "cache"))
    for name, changes in (("plain", {"packing": False, "micro_batch_size": 1}), ("run", options)):
        for stage in recipe["stages"]:
            stage.pop("micro_batch_size", None)
            stage.update(changes)
        train(recipe, out=tmp_path / name, quiet=True)
    plain, run = ([line["loss"] for line in lines(tmp_path / name) if "loss" in line] for name in ("plain", "run"))
    assert run == pytest.approx(plain, rel=1e-2 if "activations" in options else 1e-4)
    assert len(set(plain)) == len(plain)


def test_head_runs_on_supervised_positions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llava()
    batch = inputs(model)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, :-3] = -100
    batch["labels"][1, -1] = -100
    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr(HeadLoss, "apply", lambda hidden, *rest: shapes.append(hidden.shape))
    supervised_loss(model, dict(batch))
    assert shapes == [(5, 32)]
    monkeypatch.undo()
    tuning(model).logits = (None,)  # logits of an unknown kind: the model's own, on columns that some row supervises
    widths: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, out: widths.append(args[0].shape[1]))
    supervised_loss(model, dict(batch))
    assert widths == [3]


def test_micro_batches_do_not_change_the_update(recipe: dict[str, Any], tmp_path: Path) -> None:
    for stage in recipe["stages"]:
        stage["max_steps"] = 2
    train(recipe, out=tmp_path / "one", quiet=True)
    for stage in recipe["stages"]:
        stage["micro_batch_size"] = 3
    train(recipe, out=tmp_path / "many", quiet=True)
    one, many = adapter(tmp_path / "one"), adapter(tmp_path / "many")
    for name, tensor in one.items():
        assert (tensor - many[name]).norm() <= 1e-4 * tensor.norm() + 1e-6, name
    losses = [[line["loss"] for line in lines(tmp_path / run) if "loss" in line] for run in ("one", "many")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_run_folder_and_log(recipe: dict[str, Any], tmp_path: Path) -> None:
    run = train(recipe, out=tmp_path / "run", quiet=True)
    assert {p.name for p in run.folder.iterdir()} == {"recipe.yaml", "log.jsonl", "checkpoints", "adapter"}
    log = lines(run.folder)
    starts = [line for line in log if line.get("event") == "start"]
    assert [(line["stage"], line["step"]) for line in starts] == [("align", 0), ("instruct", 0)]
    sizes = sum(parameter.numel() for parameter in run.model.parameters())
    assert [line["total"] for line in starts] == [sizes, sizes] and starts[0]["parameters"] < sizes
    steps = [(line["stage"], line["step"]) for line in log if "loss" in line]
    assert steps == [(name, step) for name in ("align", "instruct") for step in range(1, 7)]
    assert log[-2]["movement"]["norms"]["moved"] == 100.0 and log[-1]["event"] == "end"
    instruct = [line["loss"] for line in log if line.get("stage") == "instruct" and "loss" in line]
    assert instruct[-1] < instruct[0]
    record = json.loads((run.folder / "adapter" / "adapter.json").read_text())
    assert record["strategy"] == "layernorm" and record["base"]["model"]["llm"] == recipe["model"]["llm"]


def step_of(*rows: list[int]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor(rows), "labels": torch.tensor(rows) - 1, "attention_mask": torch.ones(1)}


FIRST = [step_of([1, 2], [3, 4]), step_of([5, 6])]


@pytest.mark.parametrize(
    "other",
    [
        FIRST[:1],
        FIRST[::-1],
        [FIRST[0], step_of([5, 7])],
        [step_of([3, 4], [1, 2]), FIRST[1]],
        [step_of([1, 2, 3, 4]), FIRST[1]],
        [step_of([1, 2]), step_of([3, 4], [5, 6])],
        [FIRST[0], {**FIRST[1], "labels": torch.tensor([[4, -100]])}],
        [FIRST[0], {**FIRST[1], "input_ids": FIRST[1]["labels"], "labels": FIRST[1]["input_ids"]}],
    ],
    ids=["fewer", "order", "token", "rows", "packed", "grouped", "label", "exchanged"],
)
def test_a_digest_shows_any_difference_of_two_steps(other: list[dict[str, torch.Tensor]]) -> None:
    again = [{name: tensor.clone() for name, tensor in batch.items()} for batch in FIRST]
    assert batch_digest(again) == batch_digest(FIRST) != batch_digest(other)
    assert len(batch_digest(other)) == 8


def stream(folder: Path, stage: str) -> list[str]:
    return [line["batch"] for line in lines(folder) if "loss" in line and line["stage"] == stage]


@pytest.mark.heavy
def test_two_strategies_see_the_same_batches(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is trained and however images are seen; another seed or another sample has other batches."""
    monkeypatch.setenv("NORMTUNE_CACHE", str(tmp_path / "cache"))
    streams = {}
    for name in ("connector", "layernorm", "cached", "seed", "limit"):
        changed = json.loads(json.dumps(recipe))
        stage = changed["stages"][1]
        stage["strategy"] = "connector" if name == "connector" else "layernorm"
        stage["cache_features"] = name == "cached"
        stage["data"][0]["limit"] = 23 if name == "limit" else None
        changed["seed"] = int(name == "seed")
        train(changed, out=tmp_path / name, quiet=True)
        streams[name] = stream(tmp_path / name, "instruct")
    assert streams["connector"] == streams["layernorm"] == streams["cached"]
    assert len(set(streams["layernorm"])) == 6
    assert streams["seed"] != streams["layernorm"] != streams["limit"]


def test_run_and_adapter_folder_open_to_the_trained_model(recipe: dict[str, Any], tmp_path: Path) -> None:
    run = train(recipe, out=tmp_path / "run", quiet=True)
    trained = dict(run.model.named_parameters())
    for path in (run.folder, run.folder / "adapter"):
        for name, parameter in open_tuned(path).model.named_parameters():
            assert torch.equal(parameter, trained[name]), name


def test_start_from_reuses_stage_one(recipe: dict[str, Any], tmp_path: Path) -> None:
    train(recipe, out=tmp_path / "first", quiet=True)
    second = train({**recipe, "start_from": str(tmp_path / "first")}, out=tmp_path / "second", quiet=True)
    assert_same(adapter(tmp_path / "first"), adapter(tmp_path / "second"))
    assert {line.get("stage") for line in lines(second.folder)} == {"instruct", None}
    for changes, words in [
        ({"start_from": str(tmp_path / "nowhere")}, "no run at"),
        ({"model": {**recipe["model"], "connector": "linear"}}, "another model"),
        ({"stages": recipe["stages"][:1]}, "no other"),
    ]:
        with pytest.raises(InputError, match=words):
            train({**recipe, "start_from": str(tmp_path / "first"), **changes}, out=tmp_path / "third", quiet=True)


def test_gains_that_cannot_move_stop_the_run(recipe: dict[str, Any], tmp_path: Path) -> None:
    """A rate that fp32 could add, but an optimizer that does nothing with it."""
    recipe["stages"][1].update(strategy="layernorm-simple", max_steps=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
        with pytest.raises(JobError, match=r"instruct: after 10 steps not one gain has moved; raise learning_rate"):
            train(recipe, out=tmp_path / "run", quiet=True)
    log = runlog.read_lines(tmp_path / "run" / "log.jsonl")
    assert log[-1]["step"] == 10 and log[-1]["movement"]["norms"] == {"moved": 0.0, "max_change": 0.0}


def test_gains_without_gradient_stop_the_run(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["stages"][1].update(strategy="layernorm-simple", max_steps=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("normtune.step.supervised_loss", lambda model, batch: 0 * supervised_loss(model, batch))
        with pytest.raises(JobError, match=r"gradients are zero"):
            train({**recipe, "stages": recipe["stages"][1:]}, out=tmp_path / "run", quiet=True)


def test_loss_that_is_not_finite_stops_before_the_update(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("normtune.step.supervised_loss", lambda model, batch: supervised_loss(model, batch) * math.nan)
        with pytest.raises(JobError, match=r"align, step 1: loss nan.*lower learning_rate"):
            train(recipe, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": [{"path": "nowhere.json"}]}, "nowhere.json"),
        ({"strategy": ["qk_norms"]}, "no part 'qk_norms'"),
        ({"learning_rates": {"mlp": 1e-3}}, "mlp"),
        ({"weight_decays": {"mlp": 1e-3}}, "mlp"),
        ({"learning_rate": 1e-12}, r"stage instruct: learning rate 1e-12 would be rounded away: .* float32.*raise it"),
        ({"strategy": ["lora"], "lora": {"targets": ["connector"]}}, "'connector' holds no linear layer"),
    ],
)
def test_faults_are_found_before_anything_is_written(
    recipe: dict[str, Any], changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    recipe["stages"][1].update(changes)
    with pytest.raises(InputError, match=words):
        train(recipe, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_too_small_max_length_is_no_silent_success(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["stages"][0]["max_length"] = 10
    with pytest.raises(JobError, match="supervised"):
        train(recipe, out=tmp_path / "run", quiet=True)


def test_optimizer_groups_have_rates_by_part_and_no_decay_on_vectors() -> None:
    model = llava()
    report = apply(model, "layernorm")
    stage = Stage.model_validate(
        {
            "name": "s",
            "strategy": "layernorm",
            "data": [{"path": "x"}],
            "learning_rate": 1e-3,
            "learning_rates": {"connector": 1e-5},
            "weight_decay": 0.1,
        }
    )
    groups = make_optimizer(model, stage).param_groups
    for group in groups:
        assert {p.dim() > 1 for p in group["params"]} == {group["weight_decay"] > 0}
    assert sorted({g["peak"] for g in groups}) == [1e-5, 1e-3]
    wrong = stage.model_copy(update={"learning_rates": {"mlp": 1e-3}})
    with pytest.raises(InputError, match=r"mlp.*does not train"):
        check_rates(wrong, {part: [] for part in report.part_of.values()})


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_schedule(kind: str) -> None:
    stage = Stage.model_validate(
        {
            "name": "s",
            "strategy": "full",
            "data": [{"path": "x"}],
            "learning_rate": 1,
            "warmup_ratio": 0.1,
            "schedule": kind,
        }
    )
    factors = [schedule(stage, step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1.0
    assert factors[-1] == pytest.approx(
        {"cosine": 0.5 * (1 + math.cos(math.pi * 89 / 90)), "linear": 1 / 90}.get(kind, 1)
    )
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_device_that_is_not_there(recipe: dict[str, Any], device: str, tmp_path: Path) -> None:
    available = torch.cuda.is_available() if device == "cuda" else torch.backends.mps.is_available()
    if available:
        pytest.skip("this machine has one")
    with pytest.raises(InputError, match=f"no {device.upper()} device"):
        train({**recipe, "device": device}, out=tmp_path / "run", quiet=True)


def test_lora_may_not_be_lost_between_stages(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["stages"][0]["strategy"] = "lora"
    with pytest.raises(InputError, match="lora must stay"):
        train(recipe, out=tmp_path / "run", quiet=True)
    recipe["stages"][1].update(strategy="lora", lora={"rank": 4})
    with pytest.raises(InputError, match="different options"):
        train(recipe, out=tmp_path / "run", quiet=True)


def test_tensorboard_gets_the_figures(recipe: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    train({**recipe, "trackers": ["tensorboard"]}, out=tmp_path / "run", quiet=True)
    assert any((tmp_path / "run" / "trackers").rglob("events.out.tfevents.*"))


def test_a_folder_that_another_makes_meanwhile_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists already"), runlog.atomic_folder(tmp_path / "run") as temporary:
        (temporary / "mine").write_text("mine")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "theirs").write_text("theirs")
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["run", "run/theirs"]
    (tmp_path / "empty").mkdir()
    with runlog.atomic_folder(tmp_path / "empty") as temporary:
        (temporary / "mine").write_text("mine")
    assert (tmp_path / "empty" / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    ("out", "words"), [(".", "give a new one in it"), ("link", "is a link"), ("lost", "is a link")]
)
def test_folders_that_cannot_be_put_in_place_are_refused_first(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, words: str
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "here" / "lost").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path / ("empty" if out == "." else "here"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=words):
        train(recipe, out=out, quiet=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_torn_log_line_harms_no_other(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"a": 1}\n{"a": 2')
    runlog.append_line(log, {"a": 3})
    assert runlog.read_lines(log) == [{"a": 1}, {"a": 3}]
    with log.open("ab") as file:
        file.write('{"a": "é'.encode()[:-1])  # cut off within a letter
    runlog.append_line(log, {"a": "\u2028"})  # an end of a line to `splitlines`
    assert runlog.read_lines(log) == [{"a": 1}, {"a": 3}, {"a": "\u2028"}]


def test_text_alone_does_not_reach_the_connector_and_that_is_fine(recipe: dict[str, Any], tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}]
    (tmp_path / "text.json").write_text(json.dumps([{"id": str(i), "conversations": turns} for i in range(9)]))
    recipe["stages"][0]["data"] = [{"path": str(tmp_path / "text.json")}]
    run = train(recipe, out=tmp_path / "run", quiet=True)
    assert [line["grad_norm"] for line in lines(run.folder) if line.get("stage") == "align" and "loss" in line] == [
        0.0
    ] * 6


def test_opened_lora_model_answers_without_dropout(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["stages"][1].update(strategy="lora", lora={"rank": 4, "dropout": 0.5})
    train(recipe, out=tmp_path / "run", quiet=True)
    assert not any(module.training for module in open_tuned(tmp_path / "run").model.modules())


def raise_input_error(*arguments: Any) -> None:
    raise InputError("a broken image")


def test_an_encoder_that_a_later_stage_trains_is_loaded_although_features_are_stored(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NORMTUNE_CACHE", str(tmp_path / "cache"))
    talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Nothing at all."}]
    (tmp_path / "text.json").write_text(json.dumps([{"conversations": talk}] * 8))
    first, second = recipe["stages"]
    first.update(cache_features=True, max_steps=1)
    second.update(data=[{"path": str(tmp_path / "text.json")}], strategy=["vision_norms", "norms"], max_steps=1)
    for name in ("filling", "complete"):
        train(recipe, out=tmp_path / name, quiet=True)
    assert_same(adapter(tmp_path / "filling"), adapter(tmp_path / "complete"))


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe.update(device="cpu", save_every="0.0001m")  # late at every step, by a clock that all go by
    for stage in recipe["stages"]:  # 24 samples in batches of 23: one process is idle in every second step
        stage["batch_size"] = 23
    train(recipe, out=tmp_path / "one", quiet=True)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "normtune", "train", "recipe.yaml", "--out", "two"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=240)
    losses = [[line["loss"] for line in lines(tmp_path / run) if "loss" in line] for run in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    for name, tensor in one.items():
        assert (tensor - two[name]).norm() <= 1e-3 * tensor.norm() + 1e-6, name
