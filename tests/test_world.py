"""The embedded world: files in official layouts, weights that load anywhere, a build that can be resumed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer

from normtune import world
from normtune.errors import InputError
from normtune.recipe import Recipe, load_recipe
from normtune.tasks import TASKS
from normtune.world import build, files, scenes, text, vision

pytestmark = pytest.mark.heavy

SMALL = {"train": files.Train(6, 6), "evaluation": files.Evaluation(3, 2, 3, 12, 3, 5), "dev": files.Evaluation(2, 2)}
ASSETS = Path(world.__file__).parent / "assets"


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files at their real sizes."""
    return world.ensure(tmp_path_factory.mktemp("cache"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_files_depend_on_the_seed_alone(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        files.write(tmp_path / name, seed=seed, **SMALL)
    first, same, other = (contents(tmp_path / name) for name in "abc")
    assert first == same
    assert first.keys() == other.keys()
    assert first["train/images/000001.jpg"] != other["train/images/000001.jpg"]
    assert first["eval/pope/coco_pope_random.json"] != first["eval-dev/pope/coco_pope_random.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]


def test_no_scene_is_in_two_splits_or_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, str]] = []
    picture = files.Source.scene

    def recorded(self: files.Source, *args: Any, **kwargs: Any) -> scenes.Scene:
        scene = picture(self, *args, **kwargs)
        drawn.append((self.split, scene.key))
        return scene

    monkeypatch.setattr(files.Source, "scene", recorded)
    files.write(tmp_path / "w", **SMALL)
    assert {split for split, _ in drawn} == {"train", "eval", "dev"}
    assert len({key for _, key in drawn}) == len(drawn)
    rng = np.random.default_rng(0)
    assert all(scenes.split_of(scenes.sample(rng, split)) == split for split in scenes.SPLITS for _ in range(50))


def test_write_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(files, "_texts", fail)
        files.write(tmp_path / "w", **SMALL)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="mine holds something else"):
        files.write(tmp_path / "mine", **SMALL)
    with pytest.raises(InputError, match="cannot write in"):
        files.write(tmp_path / "mine" / "thesis.txt" / "w", **SMALL)


@pytest.mark.parametrize("split", ["eval", "eval-dev"])
def test_benchmarks_are_well_formed(full: Path, split: str) -> None:
    items = {name: task.load(full / split) for name, task in TASKS.items()}
    assert {name: len(found) for name, found in items.items()} == {
        "pope": 900, "mme": 240, "vqav2": 250, "coco": 50, "flickr30k": 50, "text": 100,
    }  # fmt: skip
    assert all(item.image is None or item.image.is_file() for found in items.values() for item in found)
    for manner in files.MANNERS:
        group = [item for item in items["pope"] if item.group == manner]
        assert sum(item.answer == "yes" for item in group) == len(group) / 2 == 150
        assert len({(item.image, item.question) for item in group}) == len(group)
    assert {item.group for item in items["mme"]} == {"existence", "count", "position", "color"}
    for subtask in files.MME:  # the same questions are answered yes and no equally often: no reply without a look
        found = [(item.question, item.answer) for item in items["mme"] if item.group == subtask]
        said = {answer: sorted(q for q, a in found if a == answer) for answer in ("yes", "no")}
        assert said["yes"] == said["no"]
    pairs = list(zip(items["mme"][::2], items["mme"][1::2], strict=True))
    assert all({a.answer, b.answer} == {"yes", "no"} and a.image == b.image for a, b in pairs)
    assert all(len(item.answer) == 5 for name in ("coco", "flickr30k") for item in items[name])
    assert all(len(item.answer["answers"]) == 10 for item in items["vqav2"])
    for name, task in TASKS.items():
        if name not in ("coco", "flickr30k", "vqav2"):
            assert task.score(items[name], [item.answer for item in items[name]])["score"] == 1.0
    truth = [item.answer["answers"][0]["answer"] for item in items["vqav2"]]
    assert TASKS["vqav2"].score(items["vqav2"], truth)["score"] == 1.0


def test_pope_splits_differ_in_difficulty(full: Path) -> None:
    """Absent categories of the popular and the adversarial split are more frequent in the world than random ones."""
    frequency = dict(zip(scenes.CATEGORIES, scenes.popularity(), strict=True))
    mean = {}
    for manner in files.MANNERS:
        found = [i for i in TASKS["pope"].load(full / "eval") if i.group == manner and i.answer == "no"]
        words = [i.question.split("Is there a ")[1].split(" in ")[0].split() for i in found]
        mean[manner] = np.mean([frequency[colour, shape] for colour, shape in words])
    assert mean["popular"] > mean["random"] * 1.5


def test_training_files_are_llava_samples(full: Path) -> None:
    for kind in ("align", "conversation", "detail", "reasoning"):
        samples = json.loads((full / "train" / f"{kind}.json").read_text())
        assert len(samples) == 1500 and len({sample["id"] for sample in samples}) == 1500
        for sample in samples:
            turns = sample["conversations"]
            assert (full / "train" / "images" / sample["image"]).is_file()
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert turns[0]["value"].startswith("<image>\n")
            assert all("<image>" not in turn["value"] and turn["value"] for turn in turns[1:])
    image = Image.open(full / "train" / "images" / "000001.jpg")
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))


def test_the_cache_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "write", lambda out: (out.mkdir(parents=True), (out / files.MARK).write_text("{}")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("NORMTUNE_CACHE", raising=False)
    assert world.ensure() == world.ensure() == tmp_path / "xdg" / "normtune" / f"world-{world.version()}"
    monkeypatch.setenv("NORMTUNE_CACHE", str(tmp_path / "own"))
    assert world.ensure().parent == tmp_path / "own"
    assert world.ensure(tmp_path / "given").parent == tmp_path / "given"


def recipe(**changes: Any) -> Recipe:
    stage = {"name": "align", "strategy": "connector", "learning_rate": 1e-3}
    data = [{"path": "world:train/align.json", "images": "world:train/images"}, {"path": "mine.json"}]
    base: dict[str, Any] = {
        "model": {"llm": "world:llm", "vision": "world:vision2"},
        "stages": [{**stage, "data": data}],
        "evaluate": {"data": "world:eval", "dev": "world:eval-dev/"},
    }
    return load_recipe({**base, **changes})


def test_resolve_replaces_world_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "ensure", lambda: tmp_path)
    monkeypatch.setattr(world, "path", lambda name: Path("/assets") / name)
    resolved = world.resolve(recipe())
    assert (resolved.model.llm, resolved.model.vision) == ("/assets/llm", "/assets/vision2")
    first, second = resolved.stages[0].data
    assert (first.path, first.images) == (str(tmp_path / "train/align.json"), str(tmp_path / "train/images"))
    assert (second.path, second.images) == ("mine.json", None)
    assert resolved.evaluate is not None
    assert (resolved.evaluate.data, resolved.evaluate.dev) == (str(tmp_path / "eval"), str(tmp_path / "eval-dev"))
    assert world.resolve(resolved) == resolved
    assert world.resolve_path("world:eval") == str(tmp_path / "eval")
    assert world.resolve_path("world:llm") == "/assets/llm"
    assert world.resolve_path("eval") == "eval"
    with pytest.raises(InputError, match=r"no 'world:evil' .did you mean 'eval'"):
        world.resolve_path("world:evil")


def test_resolve_writes_no_files_that_nobody_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "ensure", lambda: pytest.fail("no data is needed"))
    monkeypatch.setattr(world, "path", lambda name: Path(name))
    plain = recipe(evaluate=None).model_dump(mode="json")
    plain["stages"][0]["data"] = [{"path": "mine.json"}]
    assert world.resolve(load_recipe(plain)).model.llm == "llm"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model": {"llm": "world:lm", "vision": "v"}}, "model.llm: .*'world:lm' .did you mean 'llm'"),
        ({"model": {"path": "world:train/images"}}, "model.path: "),
        ({"evaluate": {"data": "world:evals"}}, "evaluate.data: .*world:eval, world:eval-dev"),
    ],
)
def test_unknown_world_names_are_input_errors(
    changes: dict[str, Any], field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "ensure", lambda: tmp_path)
    monkeypatch.setattr(world, "path", lambda name: Path(name))
    with pytest.raises(InputError, match=f"(?s){field}"):
        world.resolve(recipe(**changes))


def test_unknown_or_missing_assets_are_input_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no model 'visoin' .did you mean 'vision'"):
        world.path("visoin")
    monkeypatch.setattr(world, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(InputError, match=r"normtune\.world\.build"):
        world.path("llm")


def test_finding_and_writing_files_imports_no_torch() -> None:
    code = "import sys, normtune.world, normtune.world.files as f; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_assets_are_small() -> None:
    sizes = {str(p.relative_to(ASSETS)): p.stat().st_size for p in ASSETS.rglob("*") if p.is_file()}
    assert sum(sizes.values()) <= 8 * 2**20
    assert max(sizes.values()) <= 5 * 2**20
    assert {"llm/model.safetensors", "vision/model.safetensors", "vision2/model.safetensors"} <= sizes.keys()


@pytest.mark.parametrize("design", vision.DESIGNS, ids=lambda design: design.name)
def test_encoders_load_with_plain_transformers_and_see(design: vision.Design) -> None:
    folder = world.path(design.name)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert model.dtype == torch.bfloat16 and not info["missing_keys"] and not info["unexpected_keys"]
    assert processor(images=Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"].shape[-1] == design.side
    figures = vision.measure(folder, design, count=100)
    assert figures["found"] >= 0.95 and figures["things"]["colour"] >= 0.95 and figures["things"]["shape"] >= 0.8


def test_labels_tell_what_each_patch_belongs_to() -> None:
    scene = scenes.Scene(
        (scenes.Thing(0, 0, "red", "star", "large"), scenes.Thing(2, 2, "blue", "circle", "small")), "gray"
    )
    boxes = [scenes.Box(10, 10, 9, 0), scenes.Box(54, 54, 5, 0)]
    labels = vision.labels_of(scene, boxes, 4)
    assert labels[0].tolist() == [1, 0, 4, 1, 0, 0, 1]
    assert labels[2].tolist() == [1, 6, 5, 2, 3, 3, 0]
    assert labels[15].tolist() == [1, 2, 0, 0, 2, 2, 1]
    assert labels[:, 6].sum() == 2


def test_the_language_model_can_read() -> None:
    """The scene told in words, questions in POPE's manner: the skill that tuning has to open to the encoder."""
    tokenizer = AutoTokenizer.from_pretrained(world.path("llm"))
    model = AutoModelForCausalLM.from_pretrained(world.path("llm"), dtype=torch.float32).eval()
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    rng = np.random.default_rng(5)
    source = files.Source("dev", 5)
    right = []
    for _ in range(60):
        scene = source.scene(least=2)
        told = text.description(rng, scene)
        there = scene.things[0].category
        missing = text.absent(rng, scene, scenes.pick(rng, files.MANNERS))
        for (colour, shape), truth in ((there, True), (missing, False)):
            message = [{"role": "user", "content": f"{told} {text.POPE.format(f'{colour} {shape}')}"}]
            encoded = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt")
            with torch.no_grad():
                logits = model(input_ids=encoded["input_ids"]).logits[0, -1]
            assert logits.argmax() in (yes, no)
            right.append((logits[yes] > logits[no]).item() == truth)
    assert np.mean(right) >= 0.9


def test_questions_have_no_unknown_words(full: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.path("llm"))
    asked = {item.question for task in TASKS.values() for item in task.load(full / "eval")}
    for kind in ("align", "conversation", "detail", "reasoning"):
        samples = json.loads((full / "train" / f"{kind}.json").read_text())
        asked |= {turn["value"].removeprefix("<image>\n") for sample in samples for turn in sample["conversations"]}
    ids = tokenizer(sorted(asked), add_special_tokens=False)["input_ids"]
    assert not any(tokenizer.unk_token_id in row for row in ids)
    answer = "there are 2 circles and 0 stars, so yes."
    assert tokenizer.decode(tokenizer(answer, add_special_tokens=False)["input_ids"]) == answer


@pytest.mark.slow
def test_the_encoders_build_resumes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        vision.build(tmp_path / name, 0.01, seed=3, measured=10)
    before = contents(tmp_path / "a")
    assert before == contents(tmp_path / "b")
    (tmp_path / "a" / "vision2" / "config.json").unlink()
    first = (tmp_path / "a" / "vision" / "model.safetensors").stat().st_mtime_ns
    figures = vision.build(tmp_path / "a", 0.01, seed=3, measured=10)
    assert contents(tmp_path / "a") == before
    assert (tmp_path / "a" / "vision" / "model.safetensors").stat().st_mtime_ns == first
    assert "steps" not in figures["vision"] and figures["vision2"]["steps"] == 2


def test_build_refuses_nonsense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert build.main(["--out", str(tmp_path / "x"), "--minutes", "0"]) == 2
    assert build.main(["--out", str(tmp_path / "file" / "x"), "--minutes", "1"]) == 2
    assert capsys.readouterr().err.count("error:") == 2


def test_build_shares_its_minutes_and_writes_down_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[float, int]] = []

    def record(out: Path, minutes: float, seed: int) -> dict[str, Any]:
        given.append((minutes, seed))
        return {"steps": round(minutes)}

    monkeypatch.setattr(build.vision, "build", record)
    monkeypatch.setattr(build.pretrain, "build", record)
    build.build(tmp_path / "out", seed=4)
    assert given == [(pytest.approx(vision.MINUTES), 4), (pytest.approx(build.MINUTES - vision.MINUTES), 4)]
    facts = json.loads((tmp_path / "out" / "build.json").read_text())
    assert (facts["minutes"], facts["seed"]) == (build.MINUTES, 4) and "torch" in facts["versions"]
