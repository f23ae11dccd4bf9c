"""Evaluation while a model trains: when, what is logged, which adapter is kept, and that training does not notice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from asked import write_benchmarks
from command import run
from normtune.adapter import read_adapter
from normtune.errors import InputError
from normtune.evaluation import Settings, evaluate_model
from normtune.evaluation.during import during_training
from normtune.model import load
from normtune.recipe import load_recipe, to_yaml
from normtune.training import Interrupted, train
from normtune.training import loop as stage_loop
from normtune.tuned import Tuned, open_tuned
from toys import toy_data, toy_recipe

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_data(tmp_path_factory.mktemp("toys") / "data")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmarks(tmp_path_factory.mktemp("data"))


@pytest.fixture
def recipe(llm_folder: Path, vision_folder: Path, toys: Path, data: Path) -> dict[str, Any]:
    """Two stages of six steps; the second is scored after its steps 4 and 6."""
    found = toy_recipe(llm_folder, vision_folder, toys)
    found["evaluate"] = {"benchmarks": ["pope", "mme"], "data": "nowhere", "dev": str(data), "limit": 4}
    found["stages"][1]["evaluate_every"] = 4
    return found


def evaluations(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") == "evaluation"]


def given(*values: float) -> Any:
    """An evaluation that gives these scores one after another."""
    rest = iter(values)
    return lambda model, processor: {"pope": next(rest), "pope.mean_f1": 0.5}


def test_scores_are_those_of_an_evaluation(recipe: dict[str, Any], data: Path, tmp_path: Path) -> None:
    seen: dict[int, Any] = {}
    real = during_training(load_recipe(recipe))
    assert real is not None

    def evaluate(model: Any, processor: Any) -> dict[str, float]:
        seen[len(seen)] = evaluate_model(model, processor, ["pope", "mme"], data, limit=4)
        assert model.training
        return real(model, processor)

    trained = train(recipe, out=tmp_path / "run", quiet=True, evaluate=evaluate)
    logged = evaluations(tmp_path / "run")
    assert [(line["stage"], line["step"]) for line in logged] == [("instruct", 4), ("instruct", 6)]
    for line, scores in zip(logged, seen.values(), strict=True):
        assert line["pope"] == scores["pope"]["score"] and line["mme.perception"] == scores["mme"]["perception"]
    assert evaluate_model(trained.model, trained.processor, ["pope"], data, limit=4)["pope"] == seen[1]["pope"]


@pytest.mark.parametrize("strategy", ["layernorm", pytest.param("lora", marks=pytest.mark.slow)])
def test_training_is_the_same_with_and_without(recipe: dict[str, Any], strategy: str, tmp_path: Path) -> None:
    recipe["stages"][1].update(strategy=strategy, lora={"rank": 4, "alpha": 8, "dropout": 0.1})
    train(recipe, out=tmp_path / "with", quiet=True, evaluate=during_training(load_recipe(recipe)))
    train(recipe, out=tmp_path / "without", quiet=True)
    assert len(evaluations(tmp_path / "with")) == 2 and not evaluations(tmp_path / "without")
    for name in ["adapter.safetensors", *(["lora/adapter_model.safetensors"] if strategy == "lora" else [])]:
        ours, theirs = (load_file(tmp_path / run / "adapter" / name) for run in ("with", "without"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("values, step", [((0.5, 0.4, 0.7), 6), ((0.5, 0.9, 0.6), 4), ((0.5, 0.5, 0.5), 2)])
def test_the_best_adapter_is_kept(recipe: dict[str, Any], values: tuple[float, ...], step: int, tmp_path: Path) -> None:
    recipe["evaluate"]["keep_best"] = "pope"
    recipe["stages"][1]["evaluate_every"] = 2
    scores = given(*values)
    norms: list[torch.Tensor] = []

    def evaluate(model: Any, processor: Any) -> dict[str, float]:
        norms.append(model.model.language_model.layers[0].input_layernorm.weight.detach().clone())
        return scores(model, processor)

    train(recipe, out=tmp_path / "run", quiet=True, evaluate=evaluate)
    _, record = read_adapter(tmp_path / "run" / "best")
    assert record["best"] == {"stage": "instruct", "step": step, "name": "pope", "value": max(values)}
    opened = open_tuned(tmp_path / "run" / "best").model.model.language_model
    assert torch.equal(opened.layers[0].input_layernorm.weight, norms[step // 2 - 1])
    assert len({tuple(norm.tolist()) for norm in norms}) == 3


def test_an_interrupted_run_goes_on_with_the_best_so_far(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe["evaluate"]["keep_best"] = "pope"
    recipe["stages"][1]["evaluate_every"] = 2
    whole = stage_loop.keep_safe

    def interrupting(loop: Any, optimizer: Any, index: int, step: int, total: int) -> None:
        if index == 1 and step == 4:
            loop.stop.set()
        whole(loop, optimizer, index, step, total)

    monkeypatch.setattr(stage_loop, "keep_safe", interrupting)
    with pytest.raises(Interrupted):
        train(recipe, out=tmp_path / "run", quiet=True, evaluate=given(0.3, 0.8))
    monkeypatch.setattr(stage_loop, "keep_safe", whole)
    train(recipe, out=tmp_path / "run", resume=True, quiet=True, evaluate=given(0.6))
    assert [(line["step"], line["pope"]) for line in evaluations(tmp_path / "run")] == [(2, 0.3), (4, 0.8), (6, 0.6)]
    assert read_adapter(tmp_path / "run" / "best")[1]["best"]["step"] == 4


@pytest.mark.heavy
def test_scores_go_to_the_trackers(recipe: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe["trackers"] = ["tensorboard"]
    train(recipe, out=tmp_path / "run", quiet=True, evaluate=given(0.25, 0.75))
    (folder,) = {path.parent for path in (tmp_path / "run" / "trackers" / "normtune").glob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload().Scalars("instruct/pope")
    assert [(event.step, event.value) for event in events] == [(6 + 4, 0.25), (6 + 6, 0.75)]


@pytest.mark.heavy
def test_the_command_trains_and_evaluates(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe["evaluate"]["keep_best"] = "mme.perception"
    recipe["stages"][1]["cache_features"] = True
    monkeypatch.setenv("NORMTUNE_CACHE", str(tmp_path / "cache"))
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    for name in ("one", "two"):  # the second finds all features on disk, and needs the encoder all the same
        assert run("train", "recipe.yaml", "--out", name) == 0
        assert "instruct, step 4: pope" in capsys.readouterr().err
    assert evaluations(Path("one"))[-1]["pope"] == evaluations(Path("two"))[-1]["pope"]
    words = ["--benchmarks", "mme", "--limit", "4", "--data", str(recipe["evaluate"]["dev"]), "--json"]
    assert run("evaluate", "one/best", *words) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["scores"]["mme"]["perception"] == read_adapter("one/best")[1]["best"]["value"]
    assert document["result"] == "one/evaluations/best/mme-limit4.json"


@pytest.mark.parametrize(
    "words, limit, shown",
    [
        ([], 6, True),
        (["--limit", "0"], None, False),
        (["--limit", "3"], 3, False),
        (["--benchmarks", "mme"], None, False),
        (["--data", "DATA"], None, False),
    ],
)
def test_the_recipes_limit_holds_for_the_recipes_questions(
    words: list[str],
    limit: int | None,
    shown: bool,
    recipe: dict[str, Any],
    data: Path,
    mllm_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe["evaluate"].update(limit=6, data=str(data))
    (tmp_path / "recipe.yaml").write_text(to_yaml(load_recipe(recipe)))
    model, processor = load(mllm_folder)
    tuned = Tuned(model, processor, load_recipe(recipe))
    monkeypatch.setattr("normtune.tuned.open_tuned", lambda path, dtype=None: tuned)
    monkeypatch.setattr("normtune.cli.evaluate.about", lambda model, tuned: {})
    asked: list[Settings] = []

    def look(target: Path, model: Any, processor: Any, settings: Settings, *args: Any, **options: Any) -> Any:
        asked.append(settings)
        return {}

    monkeypatch.setattr("normtune.evaluation.evaluate_into", look)
    words = [str(data) if word == "DATA" else word for word in words]
    assert run("evaluate", str(tmp_path), "--json", *words) == 0
    assert [settings.limit for settings in asked] == [limit]
    assert ("limit 6 (the recipe's)" in capsys.readouterr().err) == shown


@pytest.mark.parametrize(
    "change, words",
    [
        ({"keep_best": "vqav2"}, ["evaluate", "keep_best", "'vqav2'", "pope, mme"]),
        ({"keep_best": "pope.f2"}, ["keep_best", "'pope.f2'", "pope.f1"]),
        ({"dev": "no/such/folder"}, ["no/such/folder"]),
    ],
)
def test_wrong_sections_are_refused_before_training(recipe: dict[str, Any], change: Any, words: list[str]) -> None:
    recipe["evaluate"].update(change)
    with pytest.raises(InputError) as error:
        during_training(load_recipe(recipe))
    assert all(word in str(error.value) for word in words), error.value


def test_evaluate_every_needs_a_section(recipe: dict[str, Any]) -> None:
    del recipe["evaluate"]
    with pytest.raises(InputError, match="evaluate_every needs an `evaluate` section"):
        load_recipe(recipe)


def test_without_evaluate_every_nothing_is_read(recipe: dict[str, Any]) -> None:
    del recipe["stages"][1]["evaluate_every"]
    recipe["evaluate"]["dev"] = "nowhere"
    assert during_training(load_recipe(recipe)) is None
