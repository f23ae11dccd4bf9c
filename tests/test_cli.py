"""The command line as a user meets it: exit codes, one to three lines, nothing half-written, Ctrl-C."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import OlmoConfig

from command import run
from normtune.recipe import load_recipe
from stubs import text_config, vision_config
from toys import toy_data, toy_recipe


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def recipe(here: Path, llm_folder: Path, vision_folder: Path) -> dict[str, Any]:
    return toy_recipe(llm_folder, vision_folder, toy_data(here / "toys", 12))


def write(recipe: dict[str, Any]) -> str:
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    return "recipe.yaml"


def one_sample(**changes: Any) -> list[dict[str, Any]]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    return [{"id": "a", "image": "0.png", "conversations": turns, **changes}]


TURNS = one_sample()[0]["conversations"]
FAULTS: dict[str, tuple[dict[str, Any], Any, list[str]]] = {
    # name: (recipe changes by dotted key, content of the data file or None, words of the message)
    "missing llm": ({"model.llm": "./nowhere"}, None, ["nowhere", "does not exist"]),
    "missing encoder": ({"model.vision": "./nowhere"}, None, ["nowhere", "does not exist"]),
    "hub id without network": ({"model.llm": "someone/some-model"}, None, ["someone/some-model"]),
    "wrong json": ({}, '[{"id": 1,\n "image": oops}]', ["data.json", "line 2", "column 11"]),
    "not a list": ({}, '{"id": 1}', ["data.json"]),
    "no conversations": ({}, [{"id": "x7", "image": "0.png"}], ["data.json", "x7", "conversations"]),
    "more image marks": (
        {},
        one_sample(conversations=[{"from": "human", "value": "<image><image>"}, TURNS[1]]),
        ["'a'", "<image>"],
    ),
    "missing image": ({}, one_sample(image="gone.png"), ["'a'", "gone.png"]),
    "image outside": ({}, one_sample(image="../secret.png"), ["'a'", "secret.png"]),
    "broken image": ({}, one_sample(image="broken.png"), ["'a'", "broken.png"]),
    "unknown role": ({}, one_sample(conversations=[{"from": "robot", "value": "x"}, TURNS[1]]), ["'a'", "robot"]),
    "empty file": ({}, "", ["data.json"]),
    "strategy misspelt": ({"stages.1.strategy": "layernrom"}, None, ["'layernrom'", "'layernorm'"]),
    "rate misspelt": ({"stages.1.learningrate": 1e-3}, None, ["learningrate", "'learning_rate'"]),
    "rate no number": ({"stages.1.learning_rate": "fast"}, None, ["stages.1.learning_rate", "fast"]),
    "part the model lacks": ({"stages.1.strategy": ["qk_norms"]}, None, ["qk_norms"]),
    "no data file": ({"stages.0.data": [{"path": "none.json"}]}, None, ["none.json"]),
    "unknown world file": ({"stages.0.data": [{"path": "world:train/algin.json"}]}, None, ["algin", "align"]),
    "no start": ({"start_from": "runs/none"}, None, ["runs/none"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_exits_2_and_leaves_nothing(
    fault: str, recipe: dict[str, Any], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, content, words = FAULTS[fault]
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (here / "toys" / "data.json").write_text(text)
        (here / "toys" / "images" / "broken.png").write_bytes((here / "toys/images/0.png").read_bytes()[:40])
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    before = set(here.rglob("*"))
    code = run("train", write(recipe), *overrides, "--out", "run")
    error = capsys.readouterr().err
    message = error[error.index("normtune:") :]
    assert code == 2, error
    assert 1 <= len(message.strip().splitlines()) <= 3
    assert "Traceback" not in error
    assert all(word in message for word in words), message
    left = {path.name for path in set(here.rglob("*")) - before if path.is_file()}
    assert left == {"recipe.yaml"} and not (here / "run").exists()


def test_train_refuses_an_existing_run_and_resumes_it(
    recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", write(recipe), "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert [stage["stage"] for stage in result["stages"]] == ["align", "instruct"] and result["run"] == "runs/toy"
    assert run("train", "recipe.yaml") == 2
    assert "exists already" in capsys.readouterr().err
    assert run("train", "recipe.yaml", "--resume") == 0
    assert run("train", "recipe.yaml", "stages.0.learning_rate=1", "--resume") == 2
    assert "stages.0.learning_rate" in capsys.readouterr().err


def test_chat_export_merge_norms(recipe: dict[str, Any], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", write(recipe)) == 0
    assert "normtune chat runs/toy" in capsys.readouterr().out
    image = "toys/images/1.png"
    assert run("chat", "runs/toy", "What colour is it?", "--image", image, "--max-new-tokens", "3") == 0
    assert run("chat", "runs/toy/adapter", "Hello", "--max-new-tokens", "3") == 0
    capsys.readouterr()
    assert run("export", "runs/toy", "--out", "out") == 0
    assert "survives" in capsys.readouterr().out
    assert run("merge", "runs/toy", "--out", "out") == 2
    assert run("merge", "runs/toy", "--out", "out2", "--dtype", "bfloat16", "--force") == 0
    assert run("chat", "out", "Hello", "--max-new-tokens", "3") == 0
    assert run("norms", "out", "--json") == 0
    text = capsys.readouterr().out
    parts = json.loads(text[text.index("{") :])["parts"]
    assert parts["norms"]["modules"] == 4 and parts["connector"]["modules"] == 1


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", ["nf4", "int8"])
def test_run_on_a_quantized_base_trains_answers_and_leaves_unquantized(
    dtype: str, recipe: dict[str, Any], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    recipe["model"]["dtype"] = dtype
    assert run("train", write(recipe), "--json") == 0
    assert json.loads(capsys.readouterr().out)["stages"][1]["moved_percent"] == 100.0
    assert run("chat", "runs/toy", "Hello", "--max-new-tokens", "3") == 0
    assert run("export", "runs/toy", "--out", "out", "--dtype", "float32") == 0
    assert "quantization_config" not in json.loads((here / "out" / "config.json").read_text())
    assert run("train", "recipe.yaml", "stages.1.strategy=full", "--out", "other") == 2
    message = capsys.readouterr().err
    assert "is quantized and cannot be trained" in message and not (here / "other").exists()


@pytest.fixture
def configs(here: Path) -> Path:
    """Configs alone, as they lie in a model folder before its weights are downloaded."""
    text_config("qwen3").save_pretrained(here / "llm")
    OlmoConfig(num_hidden_layers=2).save_pretrained(here / "gainless")
    vision_config().save_pretrained(here / "vision")
    return here


def test_norms_from_a_config_alone(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("norms", "llm") == 0
    table = capsys.readouterr().out
    assert "rms*g, eps 1e-06" in table and "self_attn.q_norm" in table and "512 B" in table
    assert run("norms", "llm", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parts"]["norms"]["modules"] == 4 and found["parts"]["norms"]["bytes"] == 4 * 32 * 4
    assert found["parts"]["qk_norms"]["modules"] == 4 and found["blocks"] == 2


def test_plan_from_configs_alone(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = ["--llm", "llm", "--vision", "vision", "--connector", "linear"]
    assert run("plan", *parts, "--parameters") == 0
    text = capsys.readouterr().out
    assert "layernorm-simple" in text and "vision encoder" in text and "for LoRA its matrices" in text
    arguments = ["--compare", "lora,norms+final_norm,qk_norms", "--lora-rank", "2", "--parameters", "--json"]
    assert run("plan", *parts, *arguments) == 0
    found = json.loads(capsys.readouterr().out)
    lora, norms, qk = found["plans"]
    assert lora["strategy"] == "lora (r = 2)" and norms["trainable_parameters"] == 5 * 32
    assert qk["trainable_parameters"] == 4 * 128 and qk["trainable_bytes"] == 4 * 4 * 128
    total = sum(found["denominator"].values())
    assert (
        norms["total_parameters"] == total < lora["total_parameters"] and found["denominator"]["connector"] == 32 * 33
    )
    assert run("plan", "--llm", "llm", "--compare", "layernorm") == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["norms", "gainless"], ["OlmoForCausalLM", "attn-qv, attn-mlp, lora, full"]),
        (["plan", "--llm", "gainless", "--compare", "layernorm"], ["no norm with a learned gain", "attn-mlp"]),
        (["plan"], ["--llm"]),
        (["plan", "--llm", "llm", "--compare", "layernrom"], ["'layernorm'"]),
        (["plan", "--llm", "llm", "--compare", "norms+connector"], ["no part 'connector'"]),
        (["plan", "--llm", "llm", "--vision", "llm"], ["takes no images"]),
        (["plan", "--llm", "./none", "--vision", "vision"], ["./none"]),
    ],
    ids=lambda value: " ".join(value[:4]),
)
def test_wrong_models_and_strategies_exit_2(
    arguments: list[str], words: list[str], configs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    message = error[error.index("normtune:") :]
    assert all(word in message for word in words) and len(message.strip().splitlines()) <= 3, message


def test_export_that_would_round_the_tuning_away_exits_1(
    recipe: dict[str, Any], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe["model"]["dtype"] = "bfloat16"
    recipe["stages"][1].update(strategy="layernorm-simple", learning_rate=1e-5)
    assert run("train", write(recipe)) == 0
    assert run("export", "runs/toy", "--out", "out") == 1
    assert "--dtype float32" in capsys.readouterr().err and not (here / "out").exists()
    assert run("export", "runs/toy", "--out", "out", "--dtype", "float32") == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["chat", "nowhere", "Hello"],
        ["chat", "toys", "Hello"],
        ["chat", "run", "Hello", "--image", "none.png"],
        ["export", "nowhere", "--out", "out"],
        ["norms", "./nowhere"],
        ["train", "none.yaml"],
        ["evaluate", "nowhere", "--benchmarks", "pope", "--data", "toys"],
        ["init", "--llm", "a", "--vision", "b", "--data", "none.json"],
        ["init", "--llm", "./none", "--vision", "b", "--data", "none.json"],
        ["train"],
        ["export", "run", "--out", "out", "--format", "tarball"],
        ["unknown"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_exit_2(arguments: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "toys").mkdir()
    assert run(*arguments) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (here / "out").exists()


def test_unfinished_run_is_no_model(recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", write(recipe)) == 0
    shutil.rmtree("runs/toy/adapter")
    assert run("chat", "runs/toy", "Hello") == 2
    said = capsys.readouterr().err
    assert "normtune train runs/toy/recipe.yaml --out runs/toy --resume" in said
    assert run("train", "runs/toy/recipe.yaml", "--out", "runs/toy", "--resume") == 0
    assert run("chat", "runs/toy", "Hello") == 0


def test_evaluate_refuses_wrong_data_before_it_opens_the_model(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("evaluate", "no-model", "--benchmarks", "pope", "--data", "no-data") == 2
    assert "no-data: no such folder" in capsys.readouterr().err
    assert run("evaluate", "no-model", "--benchmarks", "pop", "--data", ".") == 2
    assert "did you mean 'pope'" in capsys.readouterr().err
    assert run("evaluate", "no-model") == 2
    assert "no-model is no folder here" in capsys.readouterr().err


def test_init_prints_a_recipe_that_loads(recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    llm, vision = recipe["model"]["llm"], recipe["model"]["vision"]
    data = ["--data", "toys/data.json", "--images", "toys/images"]
    assert run("init", "--llm", llm, "--vision", vision, *data) == 0
    text = capsys.readouterr().out
    made = load_recipe(yaml.safe_load(text))
    assert made.model.llm == llm and made.model.dtype == "float32"
    assert made.stages[1].data[0].path == "toys/data.json" and "12 samples" in text
    Path("made.yaml").write_text(text)
    assert run("train", "made.yaml", "stages.0.max_steps=1", "stages.1.max_steps=1", "--out", "made") == 0


def test_chat_in_a_conversation(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe["stages"] = recipe["stages"][:1]
    assert run("train", write(recipe)) == 0
    capsys.readouterr()
    said = iter(
        ["/image toys/images/0.png", "What?", "And <image> now?", "/image none.png", "/what", "/new", "Hi", "/quit"]
    )
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    assert run("chat", "runs/toy", "--max-new-tokens", "2") == 0
    captured = capsys.readouterr()
    assert "none.png" in captured.err and "/what" in captured.err


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "normtune", *arguments]


@pytest.mark.heavy
def test_ctrl_c_saves_and_resume_goes_on(recipe: dict[str, Any], here: Path) -> None:
    recipe["stages"][1]["max_steps"] = 4000
    write(recipe)
    process = subprocess.Popen(command("train", "recipe.yaml"), cwd=here, stderr=subprocess.PIPE, text=True)
    log = here / "runs" / "toy" / "log.jsonl"
    limit = time.monotonic() + 120
    while not (log.exists() and '"instruct", "step": 3,' in log.read_text()):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in error and "Traceback" not in error
    saved = [json.loads(line)["step"] for line in log.read_text().splitlines() if '"loss"' in line][-1]
    resumed = subprocess.Popen(command("train", "recipe.yaml", "--resume"), cwd=here, stderr=subprocess.PIPE, text=True)
    while f'"instruct", "step": {saved + 2},' not in log.read_text():  # align has steps of these numbers, too
        assert resumed.poll() is None and time.monotonic() < limit
        time.sleep(0.1)
    resumed.send_signal(signal.SIGTERM)
    resumed.communicate(timeout=60)
    assert resumed.returncode == 143
    steps = [
        json.loads(line)["step"] for line in log.read_text().splitlines() if '"loss"' in line and "instruct" in line
    ]
    assert steps == list(range(1, len(steps) + 1))  # nothing lost, nothing done twice


def test_full_disk_exits_1_with_a_line(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import normtune.checkpoint

    def save_file(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(normtune.checkpoint, "save_file", save_file)
    assert run("train", write(recipe), "--out", "run") == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error and "Traceback" not in error
    assert not list((here / "run").rglob("*.part"))
