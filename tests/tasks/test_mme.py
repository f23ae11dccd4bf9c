"""MME: the first-four-characters rule row by row, the official sums, both folder layouts, wrong files."""

from __future__ import annotations

from pathlib import Path

import pytest

from normtune.errors import InputError
from normtune.tasks import TASKS, Item, mme

READINGS = {
    "yes": ["yes", "Yes", "YES", "yes\n", "Yes, it is", " yes", "yesterday", "eyes", "yes and no"],
    "no": ["no", "No", "no\n", "No.", "know", "snow", "not sure", "nope", "none", "  no"],
    "other": ["", "y", "n", "  yes", "Answer: yes", "The answer is no", "maybe", "   no"],
}


@pytest.mark.parametrize("reading, answer", [(r, a) for r, answers in READINGS.items() for a in answers])
def test_reading(reading: str, answer: str) -> None:
    assert mme.parse(answer) == reading


def pairs(subtask: str, count: int) -> list[Item]:
    """Two items for each of `count` images: yes, then no."""
    return [
        Item(f"{subtask}/{n}.jpg/{k}", Path(f"{n}.jpg"), "?", answer, subtask)
        for n in range(count)
        for k, answer in ((1, "yes"), (2, "no"))
    ]


def test_sums() -> None:
    items = pairs("existence", 2) + pairs("OCR", 1) + pairs("code_reasoning", 1)
    found = TASKS["mme"].score(items, ["yes", "no", "yes", "yes", "yes", "no", "y", "no"])
    assert found["subtasks"] == {"existence": 125.0, "OCR": 200.0, "code_reasoning": 50.0}
    assert found["details"]["existence"] == {"acc": 0.75, "acc+": 0.5, "other": 0, "n": 4}
    assert found["details"]["code_reasoning"] == {"acc": 0.5, "acc+": 0.0, "other": 1, "n": 2}
    assert found["perception"] == 125.0 + 200.0 and found["cognition"] == 50.0
    assert found["other"] == 1 and found["score"] == pytest.approx(6 / 8)


def test_full_marks() -> None:
    items = [item for subtask in mme.PERCEPTION + mme.COGNITION for item in pairs(subtask, 2)]
    found = TASKS["mme"].score(items, [item.answer for item in items])
    assert (found["perception"], found["cognition"], found["score"]) == (2000.0, 800.0, 1.0)


def test_pairs_are_found_by_image_whatever_the_order() -> None:
    items = pairs("count", 2)
    answers = ["yes", "no", "no", "yes"]
    order = [0, 2, 1, 3]
    mixed = TASKS["mme"].score([items[i] for i in order], [answers[i] for i in order])
    assert mixed == TASKS["mme"].score(items, answers) and mixed["details"]["count"]["acc+"] == 0.5


def test_all_answers_unreadable() -> None:
    found = TASKS["mme"].score(pairs("count", 1), ["?", "?"])
    assert found["score"] == 0.0 and found["other"] == 2


def test_half_a_pair() -> None:
    with pytest.raises(InputError, match=r"image 'count/1\.jpg': 1 answered"):
        TASKS["mme"].score(pairs("count", 2)[:3], ["yes", "no", "yes"])


def write(data: Path, subtask: str, name: str, text: str, *, split: bool = False, suffix: str = ".jpg") -> Path:
    folder = data / "mme" / subtask
    images, texts = (folder / "images", folder / "questions_answers_YN") if split else (folder, folder)
    for place in (images, texts):
        place.mkdir(parents=True, exist_ok=True)
    (images / (name + suffix)).touch()
    (texts / f"{name}.txt").write_text(text)
    return texts / f"{name}.txt"


TWO = "Is it red?  Please answer yes or no.\tYes\nIs it blue? Please answer yes or no.\tNo\n"


def test_load_both_layouts(tmp_path: Path) -> None:
    write(tmp_path, "existence", "001", TWO, suffix=".png")
    write(tmp_path, "landmark", "002", TWO, split=True)
    (tmp_path / "mme" / "eval_tool").mkdir()
    items = TASKS["mme"].load(tmp_path)
    assert [item.id for item in items] == [
        "existence/001.png/1",
        "existence/001.png/2",
        "landmark/002.jpg/1",
        "landmark/002.jpg/2",
    ]
    assert items[0].question == "Is it red?  Please answer yes or no."  # the official second blank stays
    assert [item.answer for item in items] == ["yes", "no"] * 2
    assert items[0].image == tmp_path / "mme/existence/001.png"
    assert items[2].image == tmp_path / "mme/landmark/images/002.jpg"


@pytest.mark.parametrize(
    "text, message",
    [
        ("Is it red?\tYes\n", r"001\.txt: 1 lines, not 2"),
        ("Is it red?\tYes\nIs it blue? No\n", r"001\.txt, line 2: not"),
        ("Is it red?\tYes\nIs it blue?\tPerhaps\n", r"001\.txt, line 2: not"),
    ],
)
def test_wrong_file(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, "count", "001", text)
    with pytest.raises(InputError, match=message):
        mme.load(tmp_path)


def test_no_subtask(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder of an MME subtask"):
        mme.load(tmp_path)


def test_empty_subtask(tmp_path: Path) -> None:
    (tmp_path / "mme" / "count").mkdir(parents=True)
    with pytest.raises(InputError, match="count: holds no item"):
        mme.load(tmp_path)
