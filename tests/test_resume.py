"""Nothing lost: interruptions at any point, damaged checkpoints, faults within a step. fp32, one thread, to the bit."""

from __future__ import annotations

import errno
import json
import math
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from benchmarks.crash import SAVE_EVERY, crash, lost_steps
from safetensors.torch import load_file

from command import run as command
from normtune import checkpoint, step
from normtune.errors import InputError, JobError
from normtune.recipe import load_recipe
from normtune.runlog import Run
from normtune.training import Interrupted, guarding, stopping, train
from normtune.training import loop as stage_loop
from runs import Tensors, adapter, assert_same, checkpoints, lines, steps
from toys import toy_data, toy_recipe

pytestmark = pytest.mark.heavy

Change = Callable[[Path], None]
NAMES = [(name, number) for name in ("align", "instruct") for number in range(1, 7)]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_data(tmp_path_factory.mktemp("toys") / "data")


@pytest.fixture
def recipe(llm_folder: Path, vision_folder: Path, toys: Path) -> dict[str, Any]:
    return toy_recipe(llm_folder, vision_folder, toys, save_every=2)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, llm_folder: Path, vision_folder: Path, toys: Path) -> Path:
    """A finished run of `recipe`. Do not write into it."""
    folder = tmp_path_factory.mktemp("done") / "run"
    train(toy_recipe(llm_folder, vision_folder, toys, save_every=2), out=folder, quiet=True)
    return folder


class Killed(BaseException):
    """Stands in for SIGKILL: no handler of the training knows it."""


def on_loss(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], Any]) -> None:
    """Calls `act` in the forward of micro-batch `number`, counted from 1 over a training."""
    real, seen = step.supervised_loss, [0]

    def supervised_loss(model: Any, batch: Any) -> torch.Tensor:
        seen[0] += 1
        found = act() if seen[0] == number else None
        loss = real(model, batch)
        return loss if found is None else loss * found

    monkeypatch.setattr(step, "supervised_loss", supervised_loss)


def interrupted(*arguments: Any, **options: Any) -> Interrupted:
    with pytest.raises(Interrupted, match="--resume") as error:
        train(*arguments, quiet=True, **options)
    return error.value


def cut_to(done: Path, folder: Path, stage: str, step: int) -> Path:
    """A copy of a finished run as it was after a step whose checkpoint was kept."""
    shutil.copytree(done, folder)
    shutil.rmtree(folder / "adapter")
    for path in (folder / "checkpoints").iterdir():
        if (path.name.split("-")[0], int(path.name.split("-")[1])) > (stage, step):
            shutil.rmtree(path)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"strategy": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}, marks=pytest.mark.slow),
        pytest.param({"packing": True, "cache_features": True, "schedule": "linear"}, marks=pytest.mark.slow),
        pytest.param({"strategy": ["norms", "vision_norms"], "weight_decay": 0.1}, marks=pytest.mark.slow),
        pytest.param({"activations": "8bit", "checkpoint_activations": True}, marks=pytest.mark.slow),
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_a_run_that_is_stopped_after_every_step_is_bit_identical(
    options: dict[str, Any], recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps are an epoch, so this cuts within epochs and between them, in both stages and at their ends."""
    monkeypatch.setenv("NORMTUNE_CACHE", str(tmp_path / "cache"))
    recipe["stages"][1].update(options)
    recipe["save_every"] = "10m"
    train(recipe, out=tmp_path / "whole", quiet=True)
    keep_safe = stage_loop.keep_safe

    def stopping(loop: Any, *rest: Any) -> None:
        loop.stop.set()
        keep_safe(loop, *rest)

    monkeypatch.setattr(stage_loop, "keep_safe", stopping)
    for number, (name, at) in enumerate(NAMES):
        error = interrupted(recipe, out=tmp_path / "cut", resume=number > 0)
        assert f"after step {at} of {name}" in str(error) and error.exit_code == 130
        assert not (tmp_path / "cut" / "adapter").exists()
    monkeypatch.setattr(stage_loop, "keep_safe", keep_safe)
    train(recipe, out=tmp_path / "cut", resume=True, quiet=True)
    assert_same(adapter(tmp_path / "whole"), adapter(tmp_path / "cut"))
    if "lora" in options:
        assert_same(*(load_file(tmp_path / run / "adapter/lora/adapter_model.safetensors") for run in ("whole", "cut")))
    assert steps(tmp_path / "cut") == NAMES
    starts = [(line["stage"], line["step"]) for line in lines(tmp_path / "cut") if line.get("event") == "start"]
    assert starts == [("align", n) for n in range(6)] + [("instruct", n) for n in range(6)]


@pytest.mark.parametrize(
    ("number", "signal_number", "after"),
    [
        pytest.param(1, signal.SIGTERM, ("align", 0), marks=pytest.mark.slow),
        (8, signal.SIGINT, ("align", 2)),
        pytest.param(9, signal.SIGTERM, ("align", 3), marks=pytest.mark.slow),  # the last: the step is completed
        pytest.param(20, signal.SIGTERM, ("instruct", 0), marks=pytest.mark.heavy),
        pytest.param(35, signal.SIGINT, ("instruct", 5), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_signal_within_an_accumulation(
    recipe: dict[str, Any],
    number: int,
    signal_number: int,
    after: tuple[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three micro-batches a step. The step is given up at once, what was done before it is saved."""
    recipe["save_every"] = "10m"
    for stage in recipe["stages"]:
        stage["micro_batch_size"] = 3
    with monkeypatch.context() as patch:
        forwards: list[int] = []
        on_loss(patch, number, lambda: (forwards.append(1), signal.raise_signal(signal_number), None)[2])
        error = interrupted(recipe, out=tmp_path / "cut")
    assert error.exit_code == 128 + signal_number and f"after step {after[1]} of {after[0]}" in str(error)
    assert ("nothing to save yet" if number == 1 else f"saved in {tmp_path}") in str(error)
    train(recipe, out=tmp_path / "cut", resume=True, quiet=True)
    train(recipe, out=tmp_path / "whole", quiet=True)
    assert_same(adapter(tmp_path / "whole"), adapter(tmp_path / "cut"))
    assert steps(tmp_path / "cut") == NAMES  # no step twice


def test_a_signal_that_is_passed_on_is_no_second_one(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all processes of a job are told to end, torchrun tells those that it started once more."""

    def twice() -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    recipe["save_every"] = "10m"
    on_loss(monkeypatch, 4, twice)
    assert interrupted(recipe, out=tmp_path / "run").exit_code == 143
    assert checkpoints(tmp_path / "run") == ["align-4"]
    monkeypatch.setattr(stopping, "ONE", 0.0)
    on_loss(monkeypatch, 1, twice)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, out=tmp_path / "run", resume=True, quiet=True)


def test_what_no_step_has_changed_is_not_tuned_after_a_resume_either(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text alone does not reach the connector: the adapter has none, interrupted or not."""
    turns = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello."}]
    (tmp_path / "text.json").write_text(json.dumps([{"conversations": turns}] * 8))
    recipe["stages"][0]["data"] = [{"path": str(tmp_path / "text.json")}]
    recipe["stages"][1]["strategy"] = "layernorm-simple"
    train(recipe, out=tmp_path / "whole", quiet=True)
    for name, number in (("within", 3), ("after", 6)):
        with monkeypatch.context() as patch:
            on_loss(patch, number, lambda: (signal.raise_signal(signal.SIGINT), None)[1])
            interrupted(recipe, out=tmp_path / name)
        train(recipe, out=tmp_path / name, resume=True, quiet=True)
        assert_same(adapter(tmp_path / "whole"), adapter(tmp_path / name))
    assert not any("projector" in name for name in adapter(tmp_path / "whole"))


@pytest.mark.parametrize("at", [("align", 1), ("align", 6), ("instruct", 5)], ids=str)
def test_a_killed_run_repeats_at_most_save_every_steps(
    recipe: dict[str, Any], done: Path, at: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = stage_loop.Loop.log

    def dying(loop: Any, record: dict[str, Any], step: int | None = None) -> None:
        log(loop, record, step)
        if (record.get("stage"), record.get("step")) == at and "loss" in record:
            raise Killed

    monkeypatch.setattr(stage_loop.Loop, "log", dying)
    with pytest.raises(Killed):
        train(recipe, out=tmp_path / "run", quiet=True)
    monkeypatch.undo()
    before = steps(tmp_path / "run")
    train(recipe, out=tmp_path / "run", resume=True, quiet=True)
    assert_same(adapter(done), adapter(tmp_path / "run"))
    repeated = len(steps(tmp_path / "run")) - len(NAMES)
    assert before[-1] == at and 0 < repeated <= 2


def test_no_step_is_logged_before_the_checkpoint_of_the_one_before(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a kill would repeat more than `save_every` steps."""
    real, seen = checkpoint.write_json, []

    def write_json(path: Path, data: Any) -> None:
        threading.Event().wait(0.05)  # the training goes on meanwhile
        seen.append((data["name"], data["step"], steps(tmp_path / "run")[-1]))
        real(path, data)

    monkeypatch.setattr(checkpoint, "write_json", write_json)
    train(recipe, out=tmp_path / "run", quiet=True)
    assert [(name, number) for name, number, _ in seen] == [n for n in NAMES if n[1] % 2 == 0]
    assert all((name, number) == last for name, number, last in seen)


def test_a_checkpoint_is_written_while_the_training_goes_on(
    recipe: dict[str, Any], done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first write ends only when two further steps are logged; it holds the tensors of its own step."""
    real, first = checkpoint.save_file, []

    def save_file(tensors: Tensors, path: Path) -> None:
        while not first and ("align", 3) not in steps(tmp_path / "run"):
            threading.Event().wait(0.01)
        first.append(tensors)
        real(tensors, path)

    def late_once(loop: Any, optimizer: Any, index: int, number: int, total: int) -> None:
        if (index, number) == (0, 1):
            loop.saved = -math.inf
        keep_safe(loop, optimizer, index, number, total)

    keep_safe = stage_loop.keep_safe
    monkeypatch.setattr(stage_loop, "keep_safe", late_once)
    monkeypatch.setattr(checkpoint, "save_file", save_file)
    train(recipe, out=tmp_path / "run", quiet=True, save_every="10m")
    connector = "model.multi_modal_projector.linear_1.weight"
    assert [int(tensors["s." + connector]) for tensors in first] == [1, 6, 6]
    assert not torch.equal(first[0]["p." + connector], first[1]["p." + connector])
    assert_same(adapter(done), adapter(tmp_path / "run"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def pretend(path: Path) -> None:
    """A state that says something else than what was written."""
    path.write_text(path.read_text().replace('"step": 6', '"step": 5'))


@pytest.mark.parametrize(
    ("file", "fault"),
    [
        ("tensors.safetensors", truncate),
        ("tensors.safetensors", flip),
        ("tensors.safetensors", Path.unlink),
        ("state.json", truncate),
        ("state.json", Path.unlink),
        ("state.json", pretend),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_damaged_checkpoint_falls_back_to_the_one_before(
    file: str, fault: Change, recipe: dict[str, Any], done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cut_to(done, tmp_path / "run", "instruct", 6)
    fault(folder / "checkpoints" / "instruct-6" / file)
    train(recipe, out=folder, resume=True)
    said = capsys.readouterr().err
    assert "instruct-6" in said and "resuming after step 4 of instruct" in said
    assert "damaged" in said or "no checkpoint at" in said
    assert_same(adapter(done), adapter(folder))
    assert checkpoints(folder) == checkpoints(done)  # the damaged one was written anew


def test_without_any_usable_checkpoint_it_starts_over_and_says_so(
    recipe: dict[str, Any], done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = cut_to(done, tmp_path / "run", "instruct", 6)
    for path in (folder / "checkpoints").glob("*/tensors.safetensors"):
        flip(path)
    train(recipe, out=folder, resume=True)
    said = capsys.readouterr().err
    assert said.count("damaged") == 4 and "no usable checkpoint: starting from the beginning" in said
    assert_same(adapter(done), adapter(folder))


def test_what_a_kill_left_half_written_is_removed_or_put_back(
    recipe: dict[str, Any], done: Path, tmp_path: Path
) -> None:
    folder = cut_to(done, tmp_path / "run", "instruct", 4)
    there = folder / "checkpoints"
    shutil.copytree(there / "instruct-4", there / ".instruct-6.abc.part")
    (there / ".align-4.abc.old").mkdir()
    (there / "align-4").rename(there / ".align-4.abc.old" / "was")
    (folder / ".adapter.abc.part").mkdir()
    train(recipe, out=folder, resume=True, quiet=True)
    assert_same(adapter(done), adapter(folder))
    assert not list(folder.rglob(".*")) and checkpoints(folder) == checkpoints(done)


def test_checkpoints_behind_the_present_step_are_stale(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    places = [checkpoint.Position(0, "a", n, n == 6) for n in (2, 4, 6)] + [checkpoint.Position(1, "b", 2, False)]
    for position in places:
        checkpoint.write_checkpoint(folder, {"p.x": torch.ones(1)}, position)
    checkpoint.prune(folder, places[1], keep=1)
    assert [path.name for _, path in checkpoint.list_checkpoints(folder)] == ["a-4"]


def test_only_the_last_checkpoints_are_kept(recipe: dict[str, Any], tmp_path: Path) -> None:
    train({**recipe, "save_every": 1, "keep": 2}, out=tmp_path / "run", quiet=True)
    assert checkpoints(tmp_path / "run") == ["align-5", "align-6", "instruct-5", "instruct-6"]


def test_a_checkpoint_holds_what_trains_and_no_frozen_weight(recipe: dict[str, Any], done: Path) -> None:
    path = done / "checkpoints" / "instruct-6"
    tensors = load_file(path / "tensors.safetensors")
    assert {name[2:] for name in tensors if name.startswith("p.")} == {
        name for name in adapter(done) if not name.startswith("base.")
    }
    state = json.loads((path / "state.json").read_text())
    expected = {"stage": 1, "name": "instruct", "step": 6, "finished": True, "total": 6, "samples": 24, "processes": 1}
    assert expected.items() <= state.items() and len(state["files"]["tensors.safetensors"]) == 64


@pytest.mark.parametrize(
    "harmless",
    ["keep=3", "save_every=1m", "on_nonfinite=skip", "watchdog=null", "bad_samples=skip", "max_bad=7", "threads=2"],
)
def test_harmless_changes_are_no_other_recipe(harmless: str, recipe: dict[str, Any], done: Path) -> None:
    assert checkpoint.check_same(load_recipe(recipe, [harmless]), stage_loop.Run(done)) == {}


def test_another_recipe_is_refused_unless_forced(recipe: dict[str, Any], done: Path, tmp_path: Path) -> None:
    folder = cut_to(done, tmp_path / "run", "instruct", 4)
    changes = {"stages.1.learning_rate": 1e-3, "seed": 1}
    with pytest.raises(
        InputError, match=r"seed \(0 then, 1 now\), stages\.1\.learning_rate \(0\.01 then(.|\n)*--force"
    ):
        train(recipe, out=folder, resume=True, **changes)
    train(recipe, out=folder, resume=True, force=True, quiet=True, **changes)
    (event,) = [line for line in lines(folder) if line.get("event") == "recipe"]
    assert event["changed"] == {"seed": [0, 1], "stages.1.learning_rate": [0.01, 0.001]}
    assert load_recipe(folder / "recipe.yaml").seed == 1
    assert [line["learning_rate"] for line in lines(folder) if "loss" in line][-1] < 1e-3
    assert steps(folder)[-3:] == [("instruct", 6), ("instruct", 5), ("instruct", 6)]


def test_a_checkpoint_of_other_stages_or_data_is_refused(
    recipe: dict[str, Any], done: Path, toys: Path, tmp_path: Path
) -> None:
    folder = cut_to(done, tmp_path / "run", "instruct", 4)
    other = {**recipe, "stages": [recipe["stages"][0], {**recipe["stages"][1], "name": "tune"}]}
    with pytest.raises(InputError, match="of stage instruct, number 2; the recipe has align, tune"):
        train(other, out=folder, resume=True, force=True, quiet=True)
    shutil.copytree(toys, tmp_path / "data")
    text = (folder / "recipe.yaml").read_text().replace(str(toys), str(tmp_path / "data"))
    (folder / "recipe.yaml").write_text(text)
    data = tmp_path / "data" / "data.json"
    samples = json.loads(data.read_text())
    data.write_text(json.dumps(samples[:-1]))
    with pytest.raises(InputError, match="24 samples then, 23 now"):
        train(folder / "recipe.yaml", out=folder, resume=True, quiet=True)
    data.write_text(json.dumps(samples[::-1]))
    with pytest.raises(InputError, match=r"has changed since .*: as many samples, but others\n"):
        train(folder / "recipe.yaml", out=folder, resume=True, quiet=True)
    shutil.copytree(folder, tmp_path / "forced")
    train(folder / "recipe.yaml", out=tmp_path / "forced", resume=True, force=True, quiet=True)
    shutil.copyfile(toys / "data.json", data)  # another place and time, the same content
    train(folder / "recipe.yaml", out=folder, resume=True, quiet=True)
    assert_same(adapter(folder), adapter(done))


def test_finished_run_and_run_that_is_there(
    recipe: dict[str, Any], done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=r"exists already.*--resume"):
        train(recipe, out=done, quiet=True)
    with pytest.raises(InputError, match=r"stages\.1\.learning_rate"):
        train(recipe, out=done, resume=True, **{"stages.1.learning_rate": 1e-3})
    before = (done / "log.jsonl").read_text()
    again = train(recipe, out=done, resume=True)
    assert "finished already" in capsys.readouterr().err
    name = "model.language_model.layers.0.input_layernorm.weight"
    assert torch.equal(again.model.get_parameter(name), adapter(done)[name])
    assert (done / "log.jsonl").read_text() == before


def test_resume_without_a_run_starts_over_and_says_so(
    recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe, out=tmp_path / "run", resume=True)
    assert "starting from the beginning" in capsys.readouterr().err
    assert (tmp_path / "run" / "adapter" / "adapter.json").is_file()


def test_resume_in_a_folder_that_holds_other_files(
    recipe: dict[str, Any], done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as a scheduler's. Checkpoints whose recipe is lost are no such files."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "slurm-1.out").write_text("started")
    train(recipe, out=tmp_path / "run", resume=True)
    assert "starting from the beginning" in capsys.readouterr().err
    assert_same(adapter(done), adapter(tmp_path / "run"))
    folder = cut_to(done, tmp_path / "lost", "instruct", 4)
    (folder / "recipe.yaml").unlink()
    with pytest.raises(InputError, match=r"checkpoints and no recipe\.yaml"):
        train(recipe, out=folder, resume=True, quiet=True)


def test_exit_codes_of_the_command(
    recipe: dict[str, Any], done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ("train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run"))
    for number, options in ((signal.SIGTERM, ()), (signal.SIGINT, ("--resume",))):
        with monkeypatch.context() as patch:
            on_loss(patch, 3, lambda number=number: (signal.raise_signal(number), None)[1])
            assert command(*arguments, *options) == 128 + number
    assert command(*arguments, "seed=1", "--resume") == 2
    assert command(*arguments, "--resume") == 0
    assert command(*arguments, "--resume") == 0  # finished
    assert_same(adapter(done), adapter(tmp_path / "run"))


@pytest.mark.heavy
def test_a_tracker_goes_on_under_the_same_id(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    recipe["trackers"] = ["tensorboard"]
    with monkeypatch.context() as patch:
        on_loss(patch, 3, lambda: (signal.raise_signal(signal.SIGINT), None)[1])
        interrupted(recipe, out=tmp_path / "run")
    train(recipe, out=tmp_path / "run", resume=True, quiet=True)
    found = [position.tracker for position, _ in checkpoint.list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert len(found) == 4 and len(set(found)) == 1 and found[0]


@pytest.mark.parametrize("worst", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_and_names_the_samples(
    worst: float, recipe: dict[str, Any], toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for stage in recipe["stages"]:
        stage["micro_batch_size"] = 2
    on_loss(monkeypatch, 4 * 3 + 2, lambda: worst)  # step 4, second micro-batch
    with pytest.raises(JobError, match=r"align, step 4: loss (nan|inf).*lower learning_rate") as error:
        train(recipe, out=tmp_path / "run", quiet=True)
    (event,) = [line for line in lines(tmp_path / "run") if line.get("event") == "not finite"]
    assert event["step"] == 4 and len(event["samples"]) == 2
    assert all(name in str(error.value) and str(toys / "data.json") in name for name in event["samples"])
    assert checkpoints(tmp_path / "run") == ["align-2"] and not (tmp_path / "run" / "adapter").exists()


def test_a_step_that_is_not_finite_is_left_out_by_policy(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe["on_nonfinite"] = "skip"
    on_loss(monkeypatch, 3, lambda: math.nan)
    train(recipe, out=tmp_path / "run")
    assert "skipped align, step 3: loss nan" in capsys.readouterr().err
    assert steps(tmp_path / "run") == [place for place in NAMES if place != ("align", 3)]
    (event,) = [line for line in lines(tmp_path / "run") if line.get("event") == "not finite"]
    assert len(event["samples"]) == 8 and event["loss_was"] == "nan"
    state = load_file(tmp_path / "run" / "checkpoints" / "align-6" / "tensors.safetensors")
    assert {int(tensor) for name, tensor in state.items() if name.startswith("s.")} == {5}
    assert all(tensor.isfinite().all() for tensor in adapter(tmp_path / "run").values())


def test_steps_are_not_left_out_for_ever(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = step.supervised_loss
    monkeypatch.setattr(step, "supervised_loss", lambda *given: real(*given) * math.nan)
    monkeypatch.setattr(guarding, "IN_A_ROW", 4)
    with pytest.raises(JobError, match="4 steps in a row skipped; the last: align, step 4"):
        train({**recipe, "on_nonfinite": "skip"}, out=tmp_path / "run", quiet=True)


@pytest.mark.parametrize("fault", ["long", "broken"])
def test_a_step_without_a_usable_sample_is_left_out(
    fault: str, recipe: dict[str, Any], toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its samples are broken, and the recipe leaves such out; or nothing of them is left within `max_length`."""
    shutil.copytree(toys, tmp_path / "data")
    samples = json.loads((toys / "data.json").read_text())
    for number in range(8):
        if fault == "broken":
            (tmp_path / "data" / "images" / f"{number}.png").write_bytes(b"no image")
        else:
            samples[number]["conversations"][0]["value"] += " again" * 200
    (tmp_path / "data" / "data.json").write_text(json.dumps(samples))
    source = {"path": str(tmp_path / "data" / "data.json"), "images": str(tmp_path / "data" / "images")}
    for stage in recipe["stages"]:
        stage.update(data=[source], batch_size=1, max_steps=24, max_length=200)
    if fault == "broken":
        recipe.update(bad_samples="skip", max_bad=8)
    train(recipe, out=tmp_path / "run", quiet=True)
    log = lines(tmp_path / "run")
    left_out = [(line["stage"], line["step"]) for line in log if line.get("event") == "nothing to learn"]
    made = steps(tmp_path / "run")
    assert len(left_out) == 16 and len(made) == 32 and not set(left_out) & set(made)
    monkeypatch.setattr(guarding, "IN_A_ROW", 1)
    with pytest.raises(JobError, match=r"1 steps in a row skipped; the last: align.*no sample has a supervised token"):
        train(recipe, out=tmp_path / "other", quiet=True)


def test_full_disk_keeps_the_checkpoint_before(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves = []

    def save_file(tensors: Any, path: Path, *rest: Any) -> None:
        saves.append(path)
        if len(saves) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, *rest)

    real = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(JobError, match="No space left"):
        train(recipe, out=tmp_path / "run", quiet=True)
    assert checkpoints(tmp_path / "run") == ["align-2", "align-4"]
    assert steps(tmp_path / "run")[-1] == ("instruct", 1)  # told at the step after


def test_folder_that_cannot_be_written(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "run" / "checkpoints"
    on_loss(monkeypatch, 1, lambda: (there.write_text("no folder"), None)[1])
    with pytest.raises(InputError, match=r"cannot write in .*checkpoints"):
        train(recipe, out=tmp_path / "run", quiet=True)


def test_vanished_image_leaves_the_last_checkpoint(
    recipe: dict[str, Any], done: Path, toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, away = toys / "images", toys / "away"
    with monkeypatch.context() as patch:
        on_loss(patch, 3, lambda: (images.rename(away), None)[1])
        with pytest.raises(InputError, match=r"data\.json.*\.png"):
            train(recipe, out=tmp_path / "run", quiet=True)
    away.rename(images)
    assert checkpoints(tmp_path / "run") in (["align-2"], ["align-2", "align-4"])
    train(recipe, out=tmp_path / "run", resume=True, quiet=True)
    assert_same(adapter(done), adapter(tmp_path / "run"))


def raise_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (10**10, "10.0 GB: micro_batch_size: 4; it changes no result"),
        pytest.param(1, "set micro_batch_size: 1, checkpoint_activations: true", marks=pytest.mark.heavy),
    ],
)
def test_out_of_memory_says_what_would_fit(
    memory: int, words: str, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe["stages"][0].update(packing=False)
    monkeypatch.setattr(guarding, "usable_memory", lambda device: memory)
    on_loss(monkeypatch, 3, raise_out_of_memory)
    with pytest.raises(JobError, match=r"align, step 3: out of memory on cpu") as error:
        train(recipe, out=tmp_path / "run", quiet=True)
    assert words in str(error.value) and checkpoints(tmp_path / "run") == ["align-2"]


def test_watchdog_prints_stacks_when_no_step_is_completed(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    said = threading.Event()
    monkeypatch.setattr("normtune.training.watchdog.faulthandler.dump_traceback", dump_and(said))
    on_loss(monkeypatch, 3, lambda: (said.wait(60), None)[1])
    train({**recipe, "watchdog": 0.005}, out=tmp_path / "run", quiet=True)
    text = capfd.readouterr().err
    assert "align: no step in 0.005 minutes, since step 2; all stacks:" in text
    assert "in supervised_loss" in text and "in run_stage" in text


def dump_and(said: threading.Event) -> Callable[..., None]:
    import faulthandler

    real = faulthandler.dump_traceback

    def dump_traceback(*given: Any, **options: Any) -> None:
        real(*given, **options)
        said.set()

    return dump_traceback


def test_a_folder_that_was_there_before_is_never_removed(recipe: dict[str, Any], done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, tmp_path / "run")
    for path in (*(tmp_path / "run").glob("checkpoints/*/state.json"), tmp_path / "run" / "adapter" / "adapter.json"):
        path.unlink()
    with pytest.MonkeyPatch.context() as patch:
        on_loss(patch, 1, raise_input_error)
        with pytest.raises(InputError, match="a broken image"):
            train(recipe, out=tmp_path / "run", resume=True, quiet=True)
    assert (tmp_path / "run" / "adapter" / "adapter.safetensors").is_file()


def test_a_run_that_has_made_steps_is_never_removed(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log, and the best adapter, are there without a checkpoint; a run that has made none is not in the way."""
    recipe["save_every"] = "10m"
    for number in (3, 1):
        with monkeypatch.context() as patch, pytest.raises(InputError, match="a broken image"):
            on_loss(patch, number, raise_input_error)
            train(recipe, out=tmp_path / f"run-{number}", quiet=True)
    assert len(steps(tmp_path / "run-3")) == 2 and not (tmp_path / "run-1").exists()


def test_two_trainings_do_not_write_into_one_folder(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second() -> None:
        with pytest.raises(InputError, match="being trained into by another process"):
            train(recipe, out=tmp_path / "run", resume=True, quiet=True)

    before = train(recipe, out=tmp_path / "alone", quiet=True)
    on_loss(monkeypatch, 3, second)
    after = train(recipe, out=tmp_path / "run", quiet=True)
    assert_same(adapter(after.folder), adapter(before.folder))
    with Run(after.folder).alone():  # it is free again
        pass


def raise_input_error() -> None:
    raise InputError("a broken image")


@pytest.mark.slow
@pytest.mark.parametrize("kills", [20])
def test_killed_at_random_moments(kills: int, tmp_path: Path) -> None:
    found = crash(tmp_path, kills, seed=kills)
    assert found["kills"] == kills and found["differing"] == []
    assert max(map(int, found["repeated"]), default=0) <= SAVE_EVERY


def test_steps_that_kills_cost_are_counted_once(tmp_path: Path) -> None:
    """A stage that follows another is no kill; a start without a step costs nothing more."""
    events: list[dict[str, Any]] = [{"stage": "align", "step": n, "loss": 1.0} for n in range(1, 9)]
    events[0:0] = [{"event": "start", "stage": "align", "step": 0}]
    events += [{"event": "stage end", "stage": "align"}, {"event": "start", "stage": "instruct", "step": 0}]
    events += [{"stage": "instruct", "step": n, "loss": 1.0} for n in (1, 2, 3)]
    events += [{"event": "start", "stage": "instruct", "step": 0}] * 2
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert lost_steps(tmp_path) == [3, 0]
