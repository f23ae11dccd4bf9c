"""MME: fourteen subtasks of paired yes/no questions, two per image, one of them answered Yes and one No.

Scope: the official folders `mme/SUBTASK/`, with images and texts side by side or in `images/` and
`questions_answers_YN/`; the official reading of answers and the official sums. Unlike the official program,
which pairs by adjacent lines, questions are paired by image, so that a lost line is an error and not a shift.
Source: BradyFU/Awesome-Multimodal-Large-Language-Models, `calculation.py`; Fu et al., arXiv 2306.13394.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normtune.errors import InputError
from normtune.tasks.items import Item, mean, paired, read_text, unique

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
_IMAGES = (".jpg", ".png", ".jpeg", ".JPG", ".PNG")


def load(data: Path) -> list[Item]:
    """The questions of every official subtask present, `group` = subtask, id = "SUBTASK/IMAGE/1" or "/2";
    `answer` is "yes" or "no". InputError when there is no subtask, or for a bad file."""
    root = data / "mme"
    present = [subtask for subtask in PERCEPTION + COGNITION if (root / subtask).is_dir()]
    if not present:
        raise InputError(
            f"{root}: no folder of an MME subtask ({', '.join(PERCEPTION[:3])}, ...).\n"
            "Put the folders of MME_Benchmark_release_version there."
        )
    items: list[Item] = []
    for subtask in present:
        folder = root / subtask
        texts = folder / "questions_answers_YN"
        texts, images = (texts, folder / "images") if texts.is_dir() else (folder, folder)
        found = [item for text in sorted(texts.glob("*.txt")) for item in _items(subtask, text, images)]
        items += unique(found, folder)
    return items


def _items(subtask: str, text: Path, images: Path) -> list[Item]:
    """The two questions in the file `text`, lines of question, tab, Yes or No."""
    lines = [line for line in read_text(text).split("\n") if line.strip()]
    if len(lines) != 2:
        raise InputError(
            f"{text}: {len(lines)} lines, not 2.\nMME has two questions per image: restore the official file."
        )
    candidates = [images / (text.stem + suffix) for suffix in _IMAGES]
    image = next((path for path in candidates if path.exists()), candidates[0])
    items = []
    for number, line in enumerate(lines, start=1):
        question, tab, label = line.rpartition("\t")
        if not tab or label.strip().lower() not in ("yes", "no"):
            raise InputError(
                f"{text}, line {number}: not 'question<TAB>Yes' or 'question<TAB>No'.\nRestore the official file."
            )
        items.append(Item(f"{subtask}/{image.name}/{number}", image, question.strip(), label.strip().lower(), subtask))
    return items


def parse(answer: str) -> str:
    """The official reading of a lower-cased answer: exactly yes or no; else "yes" or "no" contained in its
    first four characters, yes before no (so `know` is no and `eyes` is yes); else "other"."""
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def score(items: Sequence[Item], answers: Sequence[str]) -> dict[str, Any]:
    """Per subtask `acc` (share of right answers), `acc+` (share of images with both right), `score` =
    100 (acc + acc+) and `other` (answers that were neither yes nor no, counted as wrong); `perception`
    (0 to 2000) and `cognition` (0 to 800) add up the subtasks present. The headline `score` is the accuracy
    over all questions, 0 to 1. InputError when an image has not exactly two questions."""
    rights: dict[str, dict[str, list[bool]]] = {}
    others: dict[str, int] = {}
    for item, answer in paired(items, answers):
        guess = parse(answer)
        image = item.id.rpartition("/")[0]
        rights.setdefault(item.group, {}).setdefault(image, []).append(guess == item.answer)
        others[item.group] = others.get(item.group, 0) + (guess == "other")
    subtasks = {name: _subtask(pairs, others[name]) for name, pairs in rights.items()}
    return {
        "score": mean([right for pairs in rights.values() for pair in pairs.values() for right in pair]),
        "perception": sum(s["score"] for name, s in subtasks.items() if name not in COGNITION),
        "cognition": sum(s["score"] for name, s in subtasks.items() if name in COGNITION),
        "other": sum(others.values()),
        "subtasks": subtasks,
        "rules": "official",
    }


def _subtask(pairs: dict[str, list[bool]], other: int) -> dict[str, float]:
    """Figures of one subtask from the marks of each image's two questions."""
    for image, marks in pairs.items():
        if len(marks) != 2:
            raise InputError(
                f"MME, image '{image}': {len(marks)} answered question(s), not 2.\n"
                "acc+ needs both questions of an image: give both or neither."
            )
    acc = mean([mark for marks in pairs.values() for mark in marks])
    acc_plus = mean([all(marks) for marks in pairs.values()])
    return {
        "acc": acc,
        "acc+": acc_plus,
        "score": 100 * (acc + acc_plus),
        "other": other,
        "n": 2 * len(pairs),
    }
