"""Text-only questions: exact match after normalization, wrong files; and the table of tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from normtune.errors import InputError
from normtune.tasks import TASKS, Item, text


@pytest.mark.parametrize(
    "answer, truth, right",
    [
        ("red", "red", True),
        ("The  Red.", "red", True),
        ("red circle", "red", False),
        ("", "red", False),
        ("blue-green", "blue green", True),
    ],
)
def test_match(answer: str, truth: str, right: bool) -> None:
    assert TASKS["text"].score([Item("1", None, "?", truth)], [answer])["score"] == float(right)


def test_nothing_to_score() -> None:
    assert TASKS["text"].score([], [])["score"] == 0.0


def write(data: Path, content: str) -> None:
    (data / "text").mkdir()
    (data / "text" / "questions.jsonl").write_text(content)


def test_load(tmp_path: Path) -> None:
    write(tmp_path, json.dumps({"question_id": 3, "text": "What is red?", "answer": "blood"}) + "\n\n")
    (item,) = TASKS["text"].load(tmp_path)
    assert item == Item("3", None, "What is red?", "blood")


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"question_id": 1, "text": "?"}', "line 1: field 'answer' is missing"),
        ('\n{"question_id": 1', "line 2, column"),
        ("", "holds no item"),
    ],
)
def test_wrong_file(tmp_path: Path, content: str, message: str) -> None:
    write(tmp_path, content)
    with pytest.raises(InputError, match=message):
        text.load(tmp_path)


def test_table_of_tasks() -> None:
    assert list(TASKS) == ["pope", "mme", "vqav2", "coco", "flickr30k", "text"]
