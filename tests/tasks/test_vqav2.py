"""VQAv2: the official normalization and accuracy row by row, the joined files, wrong files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import official
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normtune.errors import InputError
from normtune.tasks import TASKS, Item, files, vqav2


@pytest.mark.parametrize(
    "text, expected",
    [
        ("blue-green", "blue green"),  # no blank beside it: becomes a blank
        ("blue - green", "blue  green"),  # a blank beside it: goes
        ("a-b c- d", "ab c d"),  # one place decides for all places
        ("1,000", "1000"),
        ("red,blue", "red blue"),
        ("1,000 red/blue", "1000 redblue"),  # digit-comma-digit anywhere deletes every mark
        ("yes.", "yes"),
        ("3.14", "3.14"),
        ("u.s.a.", "usa"),
        ("5.", "5"),
        ("." * 40, "." * 8),  # 32 at most
        ("it's 10:30 $5 50% #1 *", "it's 10:30 $5 50% #1 *"),  # these stay
        ("what?! (no)", "what  no "),
        (';/[]"{}()=+\\_-><@`,?!', " " * 21),
    ],
)
def test_strip_punctuation(text: str, expected: str) -> None:
    assert vqav2.strip_punctuation(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The  Two dogs", "2 dogs"),
        ("A", ""),
        ("an apple a day", "apple day"),
        ("none", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),  # two apostrophes missing: not in the table
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("ow's'at", "'ow's'at"),
        ("twas", "'twas"),
        ("let's", "let's"),
        ("she's", "she's"),
        ("Im", "im"),  # the official key has a capital and is never met
        ("ive", "ive"),
        ("shed", "shed"),
        ("somebody'd", "somebodyd"),
        ("somebodyd've", "somebody'd've"),
    ],
)
def test_plain_words(text: str, expected: str) -> None:
    assert vqav2.plain_words(text) == expected


def humans(*texts: str) -> list[dict[str, Any]]:
    return [{"answer": text, "answer_id": place} for place, text in enumerate(texts, start=1)]


@pytest.mark.parametrize("matches, expected", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)])
def test_accuracy_by_matches(matches: int, expected: float) -> None:
    answers = humans(*["red"] * matches, *["blue"] * (10 - matches))
    assert vqav2.accuracy("red", answers) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "prediction, texts, expected",
    [
        ("The red.", ["red"] * 9 + ["blue"], 1.0),  # normalized, since the humans differ
        ("Red", ["red"] * 10, 0.0),  # unanimous: nothing is normalized
        ("red.", ["red"] * 10, 0.0),
        (" red\n", ["red"] * 10, 1.0),  # but line ends and outer blanks go
        ("STOP.", ["STOP."] * 10, 1.0),
        ("red", ["red "] * 5 + ["red\n"] * 5, 1.0),  # compared after stripping
        ("2", ["two"] * 5 + ["2"] * 5, 1.0),
        ("two", ["two"] * 10, 1.0),
        ("2", ["two"] * 10, 0.0),
        ("", ["a"] * 5 + ["the"] * 5, 1.0),
    ],
)
def test_unanimous_rule(prediction: str, texts: list[str], expected: float) -> None:
    assert vqav2.accuracy(prediction, humans(*texts)) == pytest.approx(expected)


def test_others_are_those_whose_object_differs() -> None:
    without_ids = [{"answer": "red"}] * 10
    assert vqav2.accuracy("red", without_ids) == 0.0
    assert vqav2.accuracy("red", humans("red")) == 0.0  # one annotator has no others
    confident = [{"answer": "red", "answer_confidence": c} for c in ("yes", "no")] * 5
    assert vqav2.accuracy("red", confident) == 1.0  # five of the other confidence each


def item(key: str, answers: list[dict[str, Any]], kind: str = "other", question: str = "what is") -> Item:
    return Item(key, None, "?", {"answers": answers, "answer_type": kind, "question_type": question})


def test_score_in_percent() -> None:
    items = [
        item("1", humans(*["yes"] * 9, "no"), "yes/no", "is the"),
        item("2", humans(*["red"] * 2, *["blue"] * 8)),
        item("3", humans(*["red"] * 2, *["blue"] * 8)),
    ]
    found = TASKS["vqav2"].score(items, ["yes", "red", "green"])
    assert found["overall"] == 53.33 and found["score"] == pytest.approx(0.5333)
    assert found["per_answer_type"] == {"other": 30.0, "yes/no": 100.0}
    assert found["per_question_type"] == {"is the": 100.0, "what is": 30.0}
    assert found["rules"] == "official" and TASKS["vqav2"].score([], [])["score"] == 0.0


@pytest.mark.parametrize("right, number", [(23, 160), (49, 160), (51, 160), (46, 320)])
def test_percent_is_rounded_as_officially(right: int, number: int) -> None:
    """100 times the sum, then divided: 100 times the mean rounds these halves the other way."""
    items = [item(str(n), humans(*["red"] * 10)) for n in range(number)]
    found = TASKS["vqav2"].score(items, ["red"] * right + ["blue"] * (number - right))["overall"]
    assert found == round(100 * float(right) / number, 2) != round(100 * (right / number), 2)


def test_scoring_leaves_the_items_alone() -> None:
    answers = humans("The A", "b")
    TASKS["vqav2"].score([item("1", answers)], ["a"])
    assert answers == humans("The A", "b")


def write(data: Path, **change: Any) -> None:
    """Two questions and their annotations; `change` replaces a list or drops it with None."""
    questions = [
        {"image_id": 42, "question": "What color?", "question_id": 42000},
        {"image_id": 42, "question": "How many?", "question_id": 42001},
    ]
    annotations = [
        {
            "question_id": key,
            "image_id": 42,
            "question_type": "what",
            "answer_type": "other",
            "multiple_choice_answer": "red",
            "answers": humans(*["red"] * 10),
        }
        for key in (42001, 42000)
    ]
    lists = {"questions": questions, "annotations": annotations} | change
    (data / "vqav2").mkdir()
    names = {
        "questions": "v2_OpenEnded_mscoco_val2014_questions.json",
        "annotations": "v2_mscoco_val2014_annotations.json",
    }
    for key, name in names.items():
        content = {"info": {}} | ({} if lists[key] is None else {key: lists[key]})
        (data / "vqav2" / name).write_text(json.dumps(content))


def test_load(tmp_path: Path) -> None:
    write(tmp_path)
    items = TASKS["vqav2"].load(tmp_path)
    assert [i.id for i in items] == ["42000", "42001"]  # joined by id, in the questions' order
    assert items[0].image == tmp_path / "val2014" / "COCO_val2014_000000000042.jpg"
    assert items[0].question == "What color?\nAnswer the question using a single word or phrase."
    assert TASKS["vqav2"].truth(items[0]) == ["red"] * 10
    assert TASKS["vqav2"].score(items, ["red", "red"])["score"] == 1.0


QUESTION = {"image_id": 42, "question": "What?", "question_id": 1}
ANNOTATION = {"question_id": 1, "question_type": "what", "answer_type": "other", "answers": humans("red")}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"questions": None}, "field 'questions' is missing"),
        ({"questions": [QUESTION]}, "question 0: question_id 1 has no annotation"),
        ({"questions": []}, "holds no item"),
        ({"annotations": [ANNOTATION] * 2}, "annotation 1: question_id 1 occurs twice"),
        ({"annotations": [ANNOTATION | {"answers": []}]}, "no human answers"),
        ({"annotations": [ANNOTATION | {"answers": [{}]}]}, "answer 0: field 'answer' is missing"),
        ({"annotations": ["x"]}, "annotation 0: a str where an object should be"),
        ({"questions": [QUESTION] * 2, "annotations": [ANNOTATION]}, "id '1' occurs twice"),
        (
            {"questions": [QUESTION], "annotations": [ANNOTATION, ANNOTATION | {"question_id": 2}]},
            "question_id 2 is not in",
        ),
    ],
)
def test_wrong_files(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write(tmp_path, **change)
    with pytest.raises(InputError, match=message) as caught:
        vqav2.load(tmp_path)
    assert ".json" in str(caught.value)


def test_broken_json_names_line_and_column(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "vqav2" / "v2_mscoco_val2014_annotations.json").write_text('{"annotations": [\n  {]}')
    with pytest.raises(InputError, match=r"annotations\.json, line 2, column 4: not JSON"):
        vqav2.load(tmp_path)


@pytest.mark.parametrize(
    "value, message",
    [
        ("9" * 5000, "an integer with too many digits"),
        ("[" * 100_000 + "]" * 100_000, "JSON nested too deeply"),
    ],
)
@pytest.mark.parametrize("name", ["val2014_annotations.json", "validation.jsonl"])
def test_json_that_python_cannot_read(tmp_path: Path, value: str, message: str, name: str) -> None:
    path = tmp_path / name
    path.write_text(f'{{"question_id": 1}}\n{{"question_id": {value}}}' if name.endswith("l") else f'{{"a": {value}}}')
    line = 2 if name.endswith("l") else 1
    with pytest.raises(InputError, match=f"{name}, from line {line}: {message}") as caught:
        list(files.read_rows(path)) if name.endswith("l") else files.read_json(path)
    assert len(str(caught.value).splitlines()) == 2


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"annotations\.json: no such file"):
        vqav2.load(tmp_path)


# ---- both rules against the programs -----------------------------------------------------------------------

WORD = st.sampled_from(
    ["two", "2", "The dog.", "dog", "a dog", "Dog", "red,blue", "red - blue", "1,000", "don't", "dont", "none", "A",
     "yes", "Yes.", "o'clock", "3.5", "u.s.", " red\n", "red", "what?!", ""]
)  # fmt: skip
HUMANS = st.lists(
    st.fixed_dictionaries({"answer": WORD}, optional={"answer_id": st.integers(1, 10), "answer_confidence": WORD}),
    min_size=1,
    max_size=10,
)


@settings(max_examples=400, deadline=None)
@given(WORD, st.one_of(HUMANS, HUMANS.map(lambda own: own[:1] * 5)), st.booleans())
def test_equals_the_program(prediction: str, human: list[dict[str, Any]], always: bool) -> None:
    """The official accuracy, and lmms-eval's, on random answers with and without answer_id."""
    found = vqav2.accuracy(prediction, human, "lmms-eval" if always else "official")
    assert found == official.vqa(prediction, human, always)  # to the last bit


@pytest.mark.parametrize(
    "prediction, right", [("Black.", True), ("the black", True), ("black", True), ("white", False)]
)
def test_lmms_eval_normalizes_where_all_agree(prediction: str, right: bool) -> None:
    assert vqav2.accuracy(prediction, humans(*["black"] * 10), "lmms-eval") == float(right)
    found = TASKS["vqav2"].score([item("1", humans(*["black"] * 10))], [prediction], "lmms-eval")
    assert found["overall"] == 100.0 * right and found["rules"] == "lmms-eval"


def test_intervals_by_answer_type() -> None:
    items = [item(str(n), humans(*["red"] * 10), ("other", "number")[n % 2]) for n in range(40)]
    found = vqav2.measure(items, ["red", "red", "red", "blue"] * 10).with_intervals()
    assert found["overall"] == 75.0 and found["intervals"]["per_answer_type.other"] == [100.0, 100.0]
    low, high = found["intervals"]["overall"]
    assert 55 < low < 75 < high < 95


# ---- other layouts -----------------------------------------------------------------------------------------


def test_load_other_splits(tmp_path: Path) -> None:
    write(tmp_path)
    root = tmp_path / "vqav2"
    asked = {"questions": [{"image_id": 5, "question": "What?", "question_id": 5000}]}
    (root / "v2_OpenEnded_mscoco_test-dev2015_questions.json").write_text(json.dumps(asked))
    (only,) = vqav2.load(tmp_path, "test-dev2015")
    assert only.answer is None and vqav2.truth(only) == []
    assert only.image == tmp_path / "test2015" / "COCO_test2015_000000000005.jpg"
    found = vqav2.measure([only], ["red"]).with_intervals()
    assert found["score"] is None and "not public" in found["note"] and found["intervals"] == {}
    assert len(vqav2.load(tmp_path)) == len(vqav2.load(tmp_path, "val2014")) == 2
    with pytest.raises(InputError, match=r"no split 'val'(.|\n)*val2014, test-dev2015"):
        vqav2.load(tmp_path, "val")
    for folder, name in (
        ("Questions", "OpenEnded_mscoco_val2014_questions"),
        ("Annotations", "mscoco_val2014_annotations"),
    ):
        (root / folder).mkdir()
        (root / f"v2_{name}.json").rename(root / folder / f"v2_{name}.json")
    assert len(vqav2.load(tmp_path)) == 2


def test_load_rows(tmp_path: Path) -> None:
    (tmp_path / "vqav2").mkdir()
    row = ANNOTATION | {"image_id": 42, "question": "What?"}
    (tmp_path / "vqav2" / "validation.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "vqav2" / "testdev.jsonl").write_text(json.dumps(row | {"answers": None}) + "\n")
    (only,) = vqav2.load(tmp_path)
    assert only.id == "1" and only.image == tmp_path / "val2014" / "COCO_val2014_000000000042.jpg"
    assert vqav2.truth(only) == ["red"]
    assert vqav2.load(tmp_path, "testdev")[0].answer is None


# ---- prediction files --------------------------------------------------------------------------------------


def results(folder: Path, content: Any) -> list[Path]:
    (folder / "r.json").write_text(json.dumps(content))
    return [folder / "r.json"]


def answered(*keys: Any) -> list[dict[str, Any]]:
    return [{"question_id": key, "answer": "red"} for key in keys]


def test_join(tmp_path: Path) -> None:
    write(tmp_path)
    truth = [tmp_path / "vqav2" / "v2_mscoco_val2014_annotations.json"]
    found = vqav2.join(results(tmp_path, answered(42000, 42001)), truth)
    assert [item.id for item in found.items] == ["42001", "42000"] and found.absent == 0
    assert {item.unit for item in found.items} == {"42"}  # both are about one image
    part = vqav2.join(results(tmp_path, answered(42000)), truth, None, True)
    assert [item.id for item in part.items] == ["42000"] and part.absent == 1
    with pytest.raises(InputError, match="without --split"):
        vqav2.join(results(tmp_path, answered(42000)), truth, "val2014")
    with pytest.raises(InputError, match="2 files of annotations, not 1"):
        vqav2.join(results(tmp_path, answered(42000)), truth * 2)


@pytest.mark.parametrize(
    "content, message",
    [
        (answered(42000), "no prediction for question_id 42001 (1 of 2 are missing)"),
        (answered(42000, 42001, 7), "question_id 7 is not in the annotations (1 such"),
        (answered(42000, 42001, 42000), "entry 2: question_id 42000 occurs twice"),
        (answered("42000", 42001), "entry 0: field 'question_id' is '42000', not int"),
        (answered(42000.0), "is 42000.0, not int"),
        (answered(None), "is None, not int"),
        (answered(True), "is True, not int"),
        ([{"question_id": 42000, "answer": None}], "(question_id 42000): field 'answer' is None, not str"),
        ([{"question_id": 42000, "answer": 2}], "field 'answer' is 2, not str"),
        ([{"question_id": 42000}], "field 'answer' is missing"),
        ([], "no prediction for question_id 42001"),
        ({"a": 1}, "holds a dict, not a list"),
        ([[]], "entry 0: not a JSON object"),
    ],
)
def test_wrong_results(tmp_path: Path, content: Any, message: str) -> None:
    write(tmp_path)
    truth = [tmp_path / "vqav2" / "v2_mscoco_val2014_annotations.json"]
    with pytest.raises(InputError) as caught:
        vqav2.join(results(tmp_path, content), truth)
    assert message in str(caught.value) and len(str(caught.value).splitlines()) <= 3
    assert "r.json" in str(caught.value)


def test_an_empty_file(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "r.json").write_text("")
    with pytest.raises(InputError, match=r"r\.json: the file is empty"):
        vqav2.join([tmp_path / "r.json"], [tmp_path / "vqav2" / "v2_mscoco_val2014_annotations.json"])
    with pytest.raises(InputError, match="holds no prediction"):
        vqav2.join(results(tmp_path, []), [tmp_path / "vqav2" / "v2_mscoco_val2014_annotations.json"], None, True)
