"""MME: the first-four-characters rule row by row, the official sums, both folder layouts, wrong files."""

from __future__ import annotations

import json
from pathlib import Path

import official
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


@pytest.mark.parametrize("asked, other", [("count", "cognition"), ("code_reasoning", "perception")])
def test_what_was_not_asked_has_no_score(asked: str, other: str) -> None:
    items = pairs(asked, 2)
    found = mme.measure(items, ["blue"] * 4)
    assert {"perception", "cognition"} & found.scores.keys() == {"perception", "cognition"} - {other}
    assert other not in found.with_intervals()["intervals"] and found.scores["subtasks"] == {asked: 0.0}


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


# ---- lmms-eval's rules, result files, the programs ---------------------------------------------------------

LMMS = {
    "yes": ["Yes.", "  yes", "y", "Y.", "yesterday", ". yes", "Yes, it is"],
    "no": ["N", "n.", "   no", "no\n", "know", "nope"],
    "other": ["", ".", "maybe", "Answer: yes", "x"],
}


@pytest.mark.parametrize("reading, answer", [(r, a) for r, answers in LMMS.items() for a in answers])
def test_reading_of_lmms_eval(reading: str, answer: str) -> None:
    assert mme.parse(answer, "lmms-eval") == reading


def write_results(folder: Path, **subtasks: list[str]) -> Path:
    """Result files; a line is image, question, label and response between tabs."""
    folder.mkdir(exist_ok=True)
    for name, lines in subtasks.items():
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    return folder


def lines_of(*answers: str) -> list[str]:
    """Two lines per image, Yes then No."""
    return [f"{n // 2}.jpg\tquestion {n}?\t{'No' if n % 2 else 'Yes'}\t{answer}" for n, answer in enumerate(answers)]


ANSWER = st.sampled_from([a for table in (READINGS, LMMS) for row in table.values() for a in row if "\n" not in a])
PAIRS = st.lists(st.tuples(ANSWER, ANSWER), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PAIRS, st.booleans())
def test_equals_the_programs(tmp_path: Path, asked: list[tuple[str, str]], lmms: bool) -> None:
    lines = lines_of(*[answer for pair in asked for answer in pair])
    joined = mme.join([write_results(tmp_path / "r", count=lines)], [], "count")
    found = mme.measure(joined.items, joined.answers, "lmms-eval" if lmms else "official").scores
    # the official program reads the response with its line end
    expected = official.mme([f"{line}\n" for line in lines], lmms)
    assert found["subtasks"] == {"count": pytest.approx(expected, abs=1e-9)}
    assert found["perception"] == pytest.approx(expected, abs=1e-9)


def test_join_a_whole_folder(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "r", **{name: lines_of("Yes", "No") for name in mme.SUBTASKS})
    (folder / "eval.log").write_text("x")
    (folder / "other.txt").write_text("not MME's\n")
    joined = mme.join([folder], [])
    found = mme.measure(joined.items, joined.answers).scores
    assert (found["perception"], found["cognition"], len(joined.items)) == (2000.0, 800.0, 28)
    assert joined.absent == 0


def test_missing_subtasks(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "r", count=lines_of("Yes", "No"))
    with pytest.raises(InputError, match=r"no existence\.txt \(13 of 14 subtasks are missing\)"):
        mme.join([folder], [])
    part = mme.join([folder], [], None, True)
    assert len(part.items) == 2 and part.absent == 2374 - 60  # of the official questions
    with pytest.raises(InputError, match=r"no existence\.txt \(14 of 14"):
        mme.join([write_results(tmp_path / "empty")], [], None, True)
    with pytest.raises(InputError, match="no subtask 'counts'"):
        mme.join([folder], [], "counts")
    with pytest.raises(InputError, match="not a folder"):
        mme.join([folder / "count.txt"], [])


@pytest.mark.parametrize(
    "lines, message",
    [
        (["a.jpg\tq?\tYes\tYes", "", "a.jpg\tr?\tNo\tNo"], r"line 2: 1 fields between tabs, not 4"),
        (["a.jpg\tq?\tYes\tYes\t!", "a.jpg\tr?\tNo\tNo"], r"line 1: 5 fields"),
        (["a.jpg\tq?\tYes\tYes,", "it is", "a.jpg\tr?\tNo\tNo"], r"line 2: 1 fields"),
        (["a.jpg\tq?\tYes\tYes"], r"1 line\(s\) for image a.jpg, not 2"),
        (["a.jpg\tq?\tYes\tYes", "b.jpg\tr?\tNo\tNo"], r"1 line\(s\) for image a.jpg"),
        ([f"a.jpg\tq{n}?\tYes\tYes" for n in range(4)], r"4 line\(s\) for image a.jpg"),
        (["a.jpg\tq?\tYes\tYes"] * 2, r"line 2: this question about a.jpg occurs twice"),
        (["a.jpg\tq?\tPerhaps\tYes", "a.jpg\tr?\tNo\tNo"], r"line 1: label is 'Perhaps'"),
        ([], "holds no result"),
    ],
)
def test_wrong_results(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        mme.join([write_results(tmp_path / "r", count=lines)], [], "count")
    assert "count.txt" in str(caught.value)


def test_half_a_pair_may_be_left_out(tmp_path: Path) -> None:
    """Officially two lines that are missing from different images re-pair all lines between them."""
    lines = lines_of("Yes", "No", "Yes", "No", "No", "No")
    folder = write_results(tmp_path / "r", count=lines[:1] + lines[2:5])
    found = mme.join([folder], [], "count", True)
    assert [item.id for item in found.items] == ["count/1.jpg/2", "count/1.jpg/3"] and found.absent == 4


LLAVA = " Answer the question using a single word or phrase."


@pytest.mark.parametrize("name", ["001.txt", "001.png", "count/001.jpg", "001"])
@pytest.mark.parametrize("suffix", [LLAVA, "  Please answer yes or no.", " Please answer yes or no." + LLAVA, ""])
def test_join_in_llavas_form(tmp_path: Path, name: str, suffix: str) -> None:
    """LLaVA's result files name the text file, and its prompts end otherwise."""
    write(tmp_path, "count", "001", TWO)
    lines = [f"{name}\tIs it {color}?{suffix}\t{label}\t{label}" for color, label in (("red", "Yes"), ("blue", "No"))]
    found = mme.join([write_results(tmp_path / "r", count=lines)], [tmp_path])
    assert [item.id for item in found.items] == ["count/001.jpg/1", "count/001.jpg/2"] and found.absent == 0
    assert found.answers == ["Yes", "No"]
    lines[0] = lines[0].replace("red", "green")
    with pytest.raises(InputError, match=r"'Is it green\?'.* is not in the annotations"):
        mme.join([write_results(tmp_path / "r", count=lines)], [tmp_path])


def test_join_against_the_official_questions(tmp_path: Path) -> None:
    write(tmp_path, "count", "001", TWO)
    write(tmp_path, "count", "002", TWO)
    asked = [line.split("\t") for line in TWO.splitlines()]
    lines = [f"{n}.jpg\t{q}\t{label}\t{label}" for n in ("002", "001") for q, label in asked]
    folder = write_results(tmp_path / "r", count=lines)
    for truth in (tmp_path, tmp_path / "mme"):  # the folder of all benchmarks or MME's own
        found = mme.join([folder], [truth])
        assert [item.id for item in found.items] == [f"count/{n}.jpg/{k}" for n in ("001", "002") for k in (1, 2)]
        assert found.answers == ["Yes", "No"] * 2
    write_results(folder, count=lines[:3])
    with pytest.raises(InputError, match="no prediction for image and question"):
        mme.join([folder], [tmp_path])
    part = mme.join([folder], [tmp_path], None, True)
    assert [item.id for item in part.items] == ["count/002.jpg/1", "count/002.jpg/2"] and part.absent == 2
    write_results(folder, count=[*lines[:3], "001.jpg\tIs it?\tNo\tNo"])
    with pytest.raises(InputError, match="is not in the annotations"):
        mme.join([folder], [tmp_path])
    with pytest.raises(InputError, match="no folder of an MME subtask"):
        mme.join([folder], [tmp_path / "mme" / "count"])


# ---- other layouts -----------------------------------------------------------------------------------------


def test_load_one_subtask_and_the_release_folder(tmp_path: Path) -> None:
    write(tmp_path, "count", "001", TWO)
    write(tmp_path, "OCR", "001", TWO)
    assert [item.group for item in mme.load(tmp_path, "OCR")] == ["OCR"] * 2
    with pytest.raises(InputError, match=r"no split 'ocr'(.|\n)*count, OCR"):
        mme.load(tmp_path, "ocr")
    release = tmp_path / "release"
    (release / "mme").mkdir(parents=True)
    (tmp_path / "mme").rename(release / "mme" / "MME_Benchmark_release_version")
    assert len(mme.load(release)) == 4


def llava(text: str, **change: str) -> dict[str, str]:
    text += "\nAnswer the question using a single word or phrase."
    return {"question_id": "count/001.jpg", "image": "count/001.jpg", "text": text, "category": "count"} | change


def test_load_llava(tmp_path: Path) -> None:
    """LLaVA replaces "Please answer yes or no."; one official question has two blanks before it."""
    write(tmp_path, "count", "001", TWO)
    path = tmp_path / "mme" / "llava_mme.jsonl"
    path.write_text("".join(json.dumps(llava(q)) + "\n" for q in ("Is it blue?", "Is it red?")))
    found = mme.load(tmp_path)
    assert [(item.id, item.answer) for item in found] == [("count/001.jpg/2", "no"), ("count/001.jpg/1", "yes")]
    assert found[0].question == "Is it blue?\nAnswer the question using a single word or phrase."
    path.write_text(json.dumps(llava("Is it green?")))
    with pytest.raises(InputError, match=r"line 1: .Is it green\?. is not asked about count/001.jpg"):
        mme.load(tmp_path)


def test_load_rows(tmp_path: Path) -> None:
    (tmp_path / "mme").mkdir()
    row = {"question_id": "count/001.jpg", "question": "Is it red?", "answer": "Yes", "category": "count"}
    rows = [row, row | {"question": "Is it blue?", "answer": "No."}]
    (tmp_path / "mme" / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = mme.load(tmp_path)
    assert [(item.id, item.answer) for item in found] == [("count/001.jpg/1", "yes"), ("count/001.jpg/2", "no")]
    assert found[0].image == tmp_path / "mme" / "count" / "001.jpg"
    (tmp_path / "mme" / "test.jsonl").write_text(json.dumps(row | {"answer": "maybe"}))
    with pytest.raises(InputError, match="line 1: answer is 'maybe'"):
        mme.load(tmp_path)
