"""VQAv2: the official normalization and accuracy row by row, the joined files, wrong files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from normtune.errors import InputError
from normtune.tasks import TASKS, Item, vqav2


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


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"annotations\.json: no such file"):
        vqav2.load(tmp_path)
