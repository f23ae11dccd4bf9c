"""MME: fourteen subtasks of paired yes/no questions, two per image, one of them answered Yes and one No.

Scope: the official folders `mme/SUBTASK/`, with images and texts side by side or in `images/` and
`questions_answers_YN/`; LLaVA's `mme/llava_mme.jsonl` beside them; rows of the Hugging Face data set; folders of
official result files. Unlike the official program, which pairs adjacent lines, questions are paired by image, so that a
lost line is an error and not a shift. Rules `official` and `lmms-eval` differ in how an answer is read.
Source: BradyFU/Awesome-Multimodal-Large-Language-Models, `calculation.py`; Fu et al., arXiv 2306.13394; lmms-eval,
`tasks/mme/utils.py`; LLaVA, `convert_answer_to_mme.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from normtune.errors import InputError
from normtune.tasks.bootstrap import Statistics, share
from normtune.tasks.files import (
    add_prediction,
    field,
    first_existing,
    read_json_lines,
    read_rows,
    read_text,
    row_files,
    single,
    stored_image,
    unique,
)
from normtune.tasks.items import Item, Joined, Measured, Rules, check_rules, chosen, joined, paired

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = PERCEPTION + COGNITION
_QUESTIONS = {  # in the official release: two per image
    **dict.fromkeys(("existence", "count", "position", "color"), 60),
    **{"posters": 294, "celebrity": 340, "scene": 400, "landmark": 400, "artwork": 400, "OCR": 40},
    **{"commonsense_reasoning": 140, "numerical_calculation": 40, "text_translation": 40, "code_reasoning": 40},
}
_IMAGES = (".jpg", ".png", ".jpeg", ".JPG", ".PNG")
_ASKED = "Please answer yes or no."
_LLAVA = "\nAnswer the question using a single word or phrase."


def load(data: Path, split: str | None = None) -> list[Item]:
    """The questions of every official subtask present, or of the subtask `split`; `group` = subtask, id =
    "SUBTASK/IMAGE/1" or "/2"; `answer` is "yes" or "no". LLaVA's file, where there is one, gives the wording.
    InputError when there is no such subtask, or for a bad file."""
    root = first_existing(data / "mme" / "MME_Benchmark_release_version", data / "mme")
    present = [subtask for subtask in SUBTASKS if (root / subtask).is_dir()]
    rows = row_files(data / "mme", ("test",))
    items: list[Item] = []
    if present:
        for subtask in present:
            items += read_subtask(root / subtask)
        if (data / "mme" / "llava_mme.jsonl").exists():
            items = _llava(data / "mme" / "llava_mme.jsonl", items)
    elif rows:
        items = unique([item for path in rows["test"] for item in _rows(path, data / "mme" / "images")], data / "mme")
    else:
        raise InputError(
            f"{root}: no folder of an MME subtask ({', '.join(PERCEPTION[:3])}, ...).\n"
            "Put the folders of MME_Benchmark_release_version there."
        )
    return chosen(items, split, root)


def read_subtask(folder: Path) -> list[Item]:
    """The questions in a subtask's folder, in either official layout."""
    texts = folder / "questions_answers_YN"
    texts, images = (texts, folder / "images") if texts.is_dir() else (folder, folder)
    return unique([item for text in sorted(texts.glob("*.txt")) for item in _items(folder.name, text, images)], folder)


def _items(subtask: str, text: Path, images: Path) -> list[Item]:
    """The two questions in the file `text`, lines of question, tab, Yes or No."""
    lines = [line for line in read_text(text).split("\n") if line.strip()]
    if len(lines) != 2:
        raise InputError(
            f"{text}: {len(lines)} lines, not 2.\nMME has two questions per image: restore the official file."
        )
    image = first_existing(*(images / (text.stem + suffix) for suffix in _IMAGES))
    items = []
    for number, line in enumerate(lines, start=1):
        question, tab, label = line.rpartition("\t")
        if not tab or label.strip().lower() not in ("yes", "no"):
            raise InputError(
                f"{text}, line {number}: not 'question<TAB>Yes' or 'question<TAB>No'.\nRestore the official file."
            )
        items.append(Item(f"{subtask}/{image.name}/{number}", image, question.strip(), label.strip().lower(), subtask))
    return items


def _llava(path: Path, official: list[Item]) -> list[Item]:
    """LLaVA's questions, which replace "Please answer yes or no."; the labels are found by putting it back after one
    blank, or two (some official questions have two)."""
    labels = {(item.group, item.image and item.image.stem, item.question): item for item in official}
    items = []
    for where, record in read_json_lines(path):
        subtask = field(record, "category", str, where)
        image = Path(field(record, "image", str, where))
        text = field(record, "text", str, where)
        plain = text.removesuffix(_LLAVA)
        asked = (f"{plain}{blanks}{_ASKED}" for blanks in (" ", "  "))
        own = next((labels[key] for q in asked if (key := (subtask, image.stem, q)) in labels), None)
        if own is None:
            raise InputError(f"{where}: '{plain:.60}' is not asked about {image} officially.\nUse matching files.")
        items.append(Item(own.id, own.image, text, own.answer, subtask))
    return unique(items, path)


def _rows(path: Path, images: Path) -> list[Item]:
    """Rows of the Hugging Face data set: question_id is "SUBTASK/IMAGE", twice."""
    items: list[Item] = []
    asked: dict[str, int] = {}
    for where, row in read_rows(path):
        key = field(row, "question_id", str, where)
        subtask = field(row, "category", str, where)
        label = field(row, "answer", str, where).lower().strip().replace(".", "")
        if label not in ("yes", "no"):
            raise InputError(f"{where}: answer is '{label:.40}', not 'Yes' or 'No'.\nCorrect the label.")
        asked[key] = asked.get(key, 0) + 1
        name = key if Path(key).suffix else f"{key}.jpg"
        image = stored_image(row, name, (images.parent, images), where)
        items.append(Item(f"{key}/{asked[key]}", image, field(row, "question", str, where).strip(), label, subtask))
    return items


def join(
    predictions: Sequence[Path], annotations: Sequence[Path], split: str | None = None, allow_missing: bool = False
) -> Joined:
    """The answers in a folder of official result files SUBTASK.txt, lines of image, question, label and response
    between tabs; other files are ignored. The labels are in them; with `annotations`, the folder of the subtasks, the
    questions are checked against it. InputError for a missing subtask, an odd line, or an image without two lines."""
    folder = single(predictions, "predictions")
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder.\nGive the folder of MME's result files (existence.txt, ...).")
    official: list[Item] = []
    if annotations:
        official = load_annotations(single(annotations, "annotations"))
    expected = list(dict.fromkeys(item.group for item in official)) or list(SUBTASKS)
    if split is not None:
        if split not in expected:
            raise InputError(f"{folder}: no subtask '{split}'.\nThere are {', '.join(expected)}.")
        expected = [split]
        official = [item for item in official if item.group == split]
    missing = [name for name in expected if not (folder / f"{name}.txt").is_file()]
    if missing and (not allow_missing or len(missing) == len(expected)):
        raise InputError(
            f"{folder}: no {missing[0]}.txt ({len(missing)} of {len(expected)} subtasks are missing).\n"
            "Complete the folder, or score what is there with --allow-missing."
        )
    items: list[Item] = []
    answers: list[str] = []
    for subtask in expected:
        if subtask not in missing:
            found = _results(folder / f"{subtask}.txt", subtask)
            items += [item for item, _ in found]
            answers += [answer for _, answer in found]
    if not official:
        items, answers, lost = _whole_pairs(items, answers, folder, allow_missing)
        lost += sum(_QUESTIONS[name] for name in missing)
        return Joined(items, answers, lost, "image, labels in the result files")
    return _against(official, items, answers, folder, allow_missing)


def load_annotations(folder: Path) -> list[Item]:
    """The official questions below `folder`, which is MME's own folder or holds it as `mme/`."""
    root = folder if any((folder / subtask).is_dir() for subtask in SUBTASKS) else folder / "mme"
    present = [subtask for subtask in SUBTASKS if (root / subtask).is_dir()]
    if not present:
        raise InputError(f"{folder}: no folder of an MME subtask.\nGive MME_Benchmark_release_version, or nothing.")
    return [item for subtask in present for item in read_subtask(root / subtask)]


def _results(path: Path, subtask: str) -> list[tuple[Item, str]]:
    """Items and responses of one result file."""
    lines = read_text(path).split("\n")
    found = []
    seen: set[tuple[str, str]] = set()
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, start=1):
        parts = line.split("\t")
        if len(parts) != 4:
            raise InputError(
                f"{path}, line {number}: {len(parts)} fields between tabs, not 4 (image, question, label, response).\n"
                "Take tabs and line breaks out of the responses; leave no blank line."
            )
        image, question, label, response = parts
        if label.lower() not in ("yes", "no"):
            raise InputError(f"{path}, line {number}: label is '{label:.40}', not Yes or No.\nRestore the third field.")
        if (image, question) in seen:
            raise InputError(f"{path}, line {number}: this question about {image} occurs twice.\nRemove one line.")
        seen.add((image, question))
        found.append((Item(f"{subtask}/{image}/{len(seen)}", None, question, label.lower(), subtask), response))
    if not found:
        raise InputError(f"{path}: holds no result.\nGive MME's result file with two lines per image.")
    return found


def _whole_pairs(
    items: list[Item], answers: list[str], folder: Path, allow_missing: bool
) -> tuple[list[Item], list[str], int]:
    """Images with two lines; how many questions those lose that have one: two each, as acc+ needs both."""
    count: dict[str, int] = {}
    for item in items:
        count[_image(item)] = count.get(_image(item), 0) + 1
    for image, number in count.items():
        if number > 2 or (number < 2 and not allow_missing):
            subtask, _, name = image.partition("/")
            raise InputError(
                f"{folder / subtask}.txt: {number} line(s) for image {name}, not 2.\n"
                "acc+ needs both questions of an image: restore the file"
                + (", or leave such images out with --allow-missing." if number < 2 else ".")
            )
    kept = [(item, answer) for item, answer in zip(items, answers, strict=True) if count[_image(item)] == 2]
    return [item for item, _ in kept], [answer for _, answer in kept], 2 * sum(n < 2 for n in count.values())


def _against(official: list[Item], items: list[Item], answers: list[str], folder: Path, allow_missing: bool) -> Joined:
    """The responses joined to the official questions by subtask, image (whatever its suffix: LLaVA writes NAME.txt) and
    wording."""
    given: dict[tuple[str, str, str], str] = {}
    for item, answer in zip(items, answers, strict=True):
        add_prediction(given, _asked(item), answer, "question", str(folder))
    keys = [_asked(item) for item in official]
    if allow_missing:
        known, count = set(keys), Counter(key[:2] for key in given)
        whole = {key[:2] for key in keys if count[key[:2]] == 2}
        given = {key: answer for key, answer in given.items() if key[:2] in whole or key not in known}
    return joined(official, given, keys, folder, by="image and question", allow_missing=allow_missing)


def _asked(item: Item) -> tuple[str, str, str]:
    """Subtask, name of the image, and the question without the request for yes or no, or for one word."""
    question = item.question.strip().removesuffix(_LLAVA.strip()).strip().removesuffix(_ASKED).strip()
    return item.group, Path(_image(item)).stem, question


def _image(item: Item) -> str:
    return item.id.rpartition("/")[0]


def parse(answer: str, rules: Rules = "official") -> str:
    """The official reading of a lower-cased answer: exactly yes or no; else "yes" or "no" contained in its first four
    characters, yes before no (so `know` is no and `eyes` is yes); else "other". lmms-eval's strips, removes full stops
    and accepts `y` and `n`."""
    text = answer.lower()
    if rules == "lmms-eval":
        text = text.strip().replace(".", "")
        text = {"y": "yes", "n": "no"}.get(text, text)
    return "yes" if "yes" in text[:4] else "no" if "no" in text[:4] else "other"


def measure(items: Sequence[Item], answers: Sequence[str], rules: Rules = "official") -> Measured:
    """`subtasks`: of each the score 100 (acc + acc+), from `acc` (share of right answers) and `acc+` (share of images
    with both right) in `details`, with `other` (answers neither yes nor no, counted as wrong) and `n`; `perception`
    (0 to 2000) and `cognition` (0 to 800) add up the subtasks present, and are left out where none is. The headline
    `score` is the accuracy over all questions, 0 to 1. InputError when an image has not exactly two questions."""
    check_rules(rules)
    marks: dict[tuple[str, str], list[tuple[bool, bool]]] = {}
    for item, answer in paired(items, answers):
        guess = parse(answer, rules)
        marks.setdefault((item.group, _image(item)), []).append((guess == item.answer, guess == "other"))
    for (_, image), pair in marks.items():
        if len(pair) != 2:
            raise InputError(
                f"MME, image '{image}': {len(pair)} answered question(s), not 2.\n"
                "acc+ needs both questions of an image: give both or neither."
            )
    subtasks = list(dict.fromkeys(subtask for subtask, _ in marks))
    rows = np.zeros((len(marks), len(subtasks), 4))  # right answers, right images, unreadable answers, images
    for place, ((subtask, _), pair) in enumerate(marks.items()):
        right = [mark for mark, _ in pair]
        rows[place, subtasks.index(subtask)] = (sum(right), all(right), sum(other for _, other in pair), 1)

    def figures(totals: np.ndarray) -> dict[str, np.ndarray]:
        counts = totals.reshape(len(totals), len(subtasks), 4)
        right, both, _, images = np.moveaxis(counts, 2, 0)
        scores = 100 * (share(right, 2 * images) + share(both, images))
        found = {name: scores[:, place] for place, name in enumerate(subtasks)}
        members = {
            name: np.array([subtask in own for subtask in subtasks], dtype=bool)
            for name, own in (("perception", PERCEPTION), ("cognition", COGNITION))
        }
        sums = {name: scores[:, own].sum(1) for name, own in members.items() if own.any()}  # 0 would read as a score
        overall = share(right.sum(axis=1), 2 * images.sum(axis=1))
        return {**sums, "score": overall, **found}

    names = [subtask for subtask, _ in marks]
    statistics = Statistics.gather([image for _, image in marks], names, rows, 4 * len(subtasks), figures)
    totals = statistics.totals()
    details = {name: _details(rows[:, place].sum(axis=0)) for place, name in enumerate(subtasks)}
    scores: dict[str, Any] = {key: totals[key] for key in ("score", "perception", "cognition") if key in totals}
    scores["other"] = sum(detail["other"] for detail in details.values())
    scores["subtasks"] = {name: totals[name] for name in subtasks}
    return Measured({**scores, "details": details, "rules": rules}, statistics)


def _details(sums: np.ndarray) -> dict[str, Any]:
    """Figures of one subtask from its sums."""
    right, both, other, images = sums
    return {"acc": right / (2 * images), "acc+": both / images, "other": int(other), "n": int(2 * images)}
