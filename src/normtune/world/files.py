"""Training and evaluation files of the embedded world, in LLaVA's format and in the benchmarks' official layouts.

`write(OUT)` makes OUT/train (images and `align`, `conversation`, `detail`, `reasoning`), OUT/eval and OUT/eval-dev
(POPE, MME, VQAv2, MSCOCO and Flickr30k captions, text-only questions). Every part has its own seeded generator, so the
bytes depend on the arguments only (and on Pillow's JPEG encoder). A scene graph belongs to one split by its hash, and
none occurs twice within a split. Not here: what scenes look like (`scenes`) or what is said of them (`text`).

Sources of the layouts: LLaVA (Liu et al., 2023); POPE, MME, VQAv2, MSCOCO, Karpathy's Flickr30k as released.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from normtune.errors import InputError
from normtune.runlog import wrapped_disk_errors
from normtune.world import scenes, text
from normtune.world.scenes import Scene

MARK = "world.json"  # written last: a folder that has it is complete
MANNERS = ("random", "popular", "adversarial")
_ONE = "Is there only one object in this image?"
MME: dict[str, Callable[[str, str], str]] = {  # subtask -> its question about (subject, value)
    "existence": lambda name, _: text.POPE.format(name),
    "count": lambda _, number: _ONE if number == "one" else f"Are there {number} objects in this image?",
    "position": lambda name, place: f"Is the {name} at the {place} of the image?",
    "color": lambda shape, colour: f"Is the {shape} {colour}?",
}


@dataclass(frozen=True)
class Train:
    """How many samples: captions to align, and images that each of the three kinds talks about once."""

    align: int = 1500
    images: int = 1500


@dataclass(frozen=True)
class Evaluation:
    """How much of each benchmark: POPE has 6 questions per image and split, MME 2 per image and subtask."""

    pope_images: int = 50
    mme_images: int = 30
    vqa_images: int = 50
    vqa_questions: int = 250
    captions: int = 50
    texts: int = 100


def write(
    out: Path,
    *,
    seed: int = 0,
    train: Train = Train(),
    evaluation: Evaluation = Evaluation(),
    dev: Evaluation = Evaluation(),
) -> None:
    """Writes everything, or nothing: into a temporary folder beside `out`, renamed at the end.

    If another process finishes `out` meanwhile, its files are kept: they are the same.

    Raises:
        InputError: `out` holds something else, or its parent cannot be written. JobError: the disk is full.
    """
    if (out / MARK).is_file():
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} holds something else than the world's files; choose another folder or remove it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
    except OSError as error:
        raise InputError(f"cannot write in {out.parent}: {error.strerror or error}; choose another folder") from None
    try:
        with wrapped_disk_errors(out):
            _train(temporary / "train", Source("train", seed), train)
            _evaluation(temporary / "eval", Source("eval", seed), evaluation)
            _evaluation(temporary / "eval-dev", Source("dev", seed), dev)
            sizes = {"train": asdict(train), "eval": asdict(evaluation), "eval-dev": asdict(dev)}
            _dump(temporary / MARK, {"seed": seed, **sizes})
            os.chmod(temporary, 0o755)
            try:
                os.replace(temporary, out)
            except OSError:
                if not (out / MARK).is_file():
                    raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class Source:
    """Scenes of one split, none twice, with the generator that everything about them is drawn from."""

    def __init__(self, split: str, seed: int) -> None:
        self.split, self.rng = split, np.random.default_rng((seed, scenes.SPLITS.index(split)))
        self.seen: set[str] = set()

    def scene(self, least: int = 1, admits: Callable[[Scene], bool] = lambda _: True) -> Scene:
        """A new scene of `least` things or more for which `admits` holds."""
        while True:
            scene = scenes.sample(self.rng, self.split, least)
            if scene.key not in self.seen and admits(scene):
                self.seen.add(scene.key)
                return scene

    def picture(self, scene: Scene, path: Path) -> None:
        """Draws the scene into a JPEG file of quality 95 without chroma subsampling."""
        path.parent.mkdir(parents=True, exist_ok=True)
        scenes.render(scene, self.rng).save(path, "JPEG", quality=95, subsampling=0)


def _dump(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _train(folder: Path, source: Source, sizes: Train) -> None:
    """Images and the four files of samples, image names relative to `train/images`."""
    made: dict[str, list[dict[str, Any]]] = {"align": [], "conversation": [], "detail": [], "reasoning": []}

    def add(kind: str, name: str, turns: Sequence[tuple[str, str]]) -> None:
        said = []
        for number, (question, answer) in enumerate(turns):
            said += [
                {"from": "human", "value": question if number else f"<image>\n{question}"},
                {"from": "gpt", "value": answer},
            ]
        made[kind].append({"id": f"{kind}-{name}", "image": f"{name}.jpg", "conversations": said})

    rng = source.rng
    for number in range(sizes.align + sizes.images):
        scene, name = source.scene(), f"{number + 1:06d}"
        source.picture(scene, folder / "images" / f"{name}.jpg")
        if number < sizes.align:
            add("align", name, [(scenes.pick(rng, text.CAPTION_PROMPTS), text.caption(scene))])
            continue
        add("conversation", name, _conversation(rng, scene))
        add("detail", name, [(scenes.pick(rng, text.DETAIL_PROMPTS), text.detail(scene))])
        reasoned = text.ask(rng, scene, text.REASONING)
        add("reasoning", name, [(reasoned.question, reasoned.answer)])
    for kind, samples in made.items():
        _dump(folder / f"{kind}.json", samples)


def _conversation(rng: np.random.Generator, scene: Scene) -> list[tuple[str, str]]:
    """Three to five different questions with their answers; now and then the caption is one of them."""
    turns: dict[str, str] = {}
    while len(turns) < 3 + int(rng.random() * 3):
        if rng.random() < 0.08:
            turns[scenes.pick(rng, text.CAPTION_PROMPTS)] = text.caption(scene)
        else:
            qa = text.ask(rng, scene, text.QUESTIONS)
            turns[text.suffixed(rng, qa)] = qa.answer
    return list(turns.items())


def _evaluation(folder: Path, source: Source, sizes: Evaluation) -> None:
    """All benchmarks of one split; POPE, VQAv2 and MSCOCO share the folder `val2014`, not its images."""
    places = [f"COCO_val2014_{number + 1:012d}.jpg" for number in range(sizes.pope_images)]
    shown = [source.scene(least=3) for _ in places]
    _pope(folder, source, dict(zip(places, shown, strict=True)))
    first = sizes.pope_images + 1
    pictures = {first + n: source.scene() for n in range(max(sizes.vqa_images, sizes.captions))}
    for number, scene in pictures.items():
        source.picture(scene, folder / "val2014" / f"COCO_val2014_{number:012d}.jpg")
    _vqa(folder, source, dict(list(pictures.items())[: sizes.vqa_images]), sizes.vqa_questions)
    _coco(folder, source, dict(list(pictures.items())[: sizes.captions]))
    _mme(folder, source, sizes.mme_images)
    _flickr(folder, source, sizes.captions)
    _texts(folder, source, sizes.texts)


def _pope(folder: Path, source: Source, images: dict[str, Scene]) -> None:
    """Three files of JSON lines; each image has three things that are there and three that are not, in turns."""
    (folder / "pope").mkdir(parents=True)
    for name, scene in images.items():
        source.picture(scene, folder / "val2014" / name)
    for manner in MANNERS:
        lines: list[dict[str, Any]] = []
        for name, scene in images.items():
            there = [scene.things[i].category for i in source.rng.permutation(len(scene.things))[:3]]
            for yes, no in zip(there, _absent(source.rng, scene, manner, len(there)), strict=True):
                for (colour, shape), label in ((yes, "yes"), (no, "no")):
                    question = text.POPE.format(f"{colour} {shape}")
                    lines.append({"question_id": len(lines) + 1, "image": name, "text": question, "label": label})
        written = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "pope" / f"coco_pope_{manner}.json").write_text(written, encoding="utf-8")


def _absent(rng: np.random.Generator, scene: Scene, manner: str, count: int) -> list[scenes.Category]:
    """`count` different categories that the scene lacks; random ones fill up where the manner offers too few."""
    found: dict[scenes.Category, None] = {}
    for attempt in range(1000):
        found[text.absent(rng, scene, manner if attempt < 100 else "random")] = None
        if len(found) == count:
            break
    return list(found)


def _mme(folder: Path, source: Source, count: int) -> None:
    """`mme/SUBTASK/N.jpg` beside `N.txt` with one question answered Yes and one answered No.

    Images come in twos that share their questions: what is true of one is false of the other. So no question can be
    answered better than by chance without its image. An odd `count` leaves the last partner out.
    """
    for subtask, form in MME.items():
        for number in range(0, count, 2):
            one = source.scene(admits=lambda scene: bool(_facts(subtask, scene)))  # noqa: B023 used at once
            other = source.scene(admits=lambda scene: all(_swap(subtask, one, scene)))  # noqa: B023
            told = [form(*scenes.pick(source.rng, options)) for options in _swap(subtask, one, other)]
            for place, (scene, (yes, no)) in enumerate(((one, told), (other, told[::-1]))):
                if number + place < count:
                    target = folder / "mme" / subtask / f"{number + place + 1:06d}.jpg"
                    source.picture(scene, target)
                    lines = f"{yes}{text.YES_OR_NO}\tYes\n{no}{text.YES_OR_NO}\tNo\n"
                    target.with_suffix(".txt").write_text(lines, encoding="utf-8")


def _facts(subtask: str, scene: Scene) -> dict[str, str]:
    """What an MME subtask can ask about the scene: subject -> the one value that it has."""
    things = scene.things
    if subtask == "existence":
        return {text.name(thing): "" for thing in things}
    if subtask == "count":
        return {"objects": text.NUMBERS[len(things)]}
    if subtask == "position":
        return {text.name(thing): thing.place for thing in things}
    shapes = [thing.shape for thing in things]
    return {thing.shape: thing.colour for thing in things if shapes.count(thing.shape) == 1}


def _swap(subtask: str, one: Scene, other: Scene) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Facts (subject, value) that hold in `one` and not in `other`, and the reverse.

    But for existence, both must have the subject: "is the star red" is no question to a scene without a star.
    """
    first, second = _facts(subtask, one), _facts(subtask, other)

    def only(mine: dict[str, str], theirs: dict[str, str]) -> list[tuple[str, str]]:
        if subtask == "existence":
            return [(subject, "") for subject in mine if subject not in theirs]
        return [(subject, value) for subject, value in mine.items() if theirs.get(subject, value) != value]

    return only(first, second), only(second, first)


def _vqa(folder: Path, source: Source, images: dict[int, Scene], count: int) -> None:
    """The official pair of files; ten annotators agree on each answer."""
    questions: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    asked: set[tuple[int, str]] = set()
    while len(questions) < count:
        number = list(images)[len(questions) % len(images)]
        qa = text.ask(source.rng, images[number], text.QUESTIONS)
        if (number, qa.question) in asked:
            continue
        asked.add((number, qa.question))
        key = number * 1000 + len(questions)
        questions.append({"image_id": number, "question": qa.question, "question_id": key})
        kind = "yes/no" if qa.answer in ("yes", "no") else "number" if qa.answer.isdigit() else "other"
        human = [{"answer": qa.answer, "answer_confidence": "yes", "answer_id": n + 1} for n in range(10)]
        annotations.append(
            {
                "question_type": " ".join(qa.question.lower().split()[:2]),
                "multiple_choice_answer": qa.answer,
                "answers": human,
                "image_id": number,
                "answer_type": kind,
                "question_id": key,
            }
        )
    head = {"data_type": "mscoco", "data_subtype": "val2014"}
    name = "v2_OpenEnded_mscoco_val2014_questions.json"
    _dump(folder / "vqav2" / name, {**head, "task_type": "Open-Ended", "questions": questions})
    _dump(folder / "vqav2" / "v2_mscoco_val2014_annotations.json", {**head, "annotations": annotations})


def _coco(folder: Path, source: Source, images: dict[int, Scene]) -> None:
    listed: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    for number, scene in images.items():
        listed.append({"id": number, "file_name": f"COCO_val2014_{number:012d}.jpg", "height": 64, "width": 64})
        for caption in text.references(source.rng, scene):
            captions.append({"image_id": number, "id": len(captions) + 1, "caption": caption})
    _dump(folder / "coco" / "captions_val2014.json", {"images": listed, "annotations": captions})


def _flickr(folder: Path, source: Source, count: int) -> None:
    """Karpathy's form; every image is of split `test`."""
    images = []
    for number in range(count):
        scene, name = source.scene(), f"{1000000 + number}.jpg"
        source.picture(scene, folder / "flickr30k" / "flickr30k-images" / name)
        sentences = []
        for place, caption in enumerate(text.references(source.rng, scene)):
            words = [word for word in caption.replace(",", " ").replace(".", " ").split() if word]
            sentences.append({"raw": caption, "tokens": words, "imgid": number, "sentid": 5 * number + place})
        ids = [sentence["sentid"] for sentence in sentences]
        entry = {"sentids": ids, "imgid": number, "sentences": sentences, "split": "test", "filename": name}
        images.append(entry)
    _dump(folder / "flickr30k" / "dataset_flickr30k.json", {"dataset": "flickr30k", "images": images})


def _texts(folder: Path, source: Source, count: int) -> None:
    """Questions whose scene is told in words: the skill that the language model had before it could see."""
    lines = []
    for number in range(count):
        scene = source.scene()
        qa = text.ask(source.rng, scene, text.QUESTIONS)
        told = f"{text.description(source.rng, scene)} {text.suffixed(source.rng, qa)}"
        lines.append(json.dumps({"question_id": number + 1, "text": told, "answer": qa.answer}) + "\n")
    (folder / "text").mkdir(parents=True)
    (folder / "text" / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
