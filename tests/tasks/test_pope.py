"""POPE: the official parser row by row, the official metrics, both published file versions, wrong files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from normtune.errors import InputError
from normtune.tasks import TASKS, Item, pope

NO = ["no", "No", "not", "not sure", "no. There is", "There is no dog", "No, there is not", "no,", "I see , no"]
YES = ["NO", "no!", "no\n", "\tno", "none", "isn't", "cannot", "**No**", '"No"', "", "Yes. No, wait", "1. No", "nope"]


@pytest.mark.parametrize("answer", NO)
def test_reads_no(answer: str) -> None:
    assert pope.parse(answer) == "no"


@pytest.mark.parametrize("answer", YES)
def test_reads_everything_else_as_yes(answer: str) -> None:
    assert pope.parse(answer) == "yes"


def items(split: str, labels: str) -> list[Item]:
    """Items from letters, y or n."""
    return [Item(f"{split}/{n}", None, "?", {"y": "yes", "n": "no"}[x], split) for n, x in enumerate(labels)]


def test_metrics_of_a_split() -> None:
    found = TASKS["pope"].score(items("random", "yyynnn"), ["yes", "yes", "no", "yes", "no", "no"])
    split = found["splits"]["random"]
    assert split["accuracy"] == pytest.approx(4 / 6)
    assert split["precision"] == split["recall"] == split["f1"] == pytest.approx(2 / 3)
    assert split["yes_ratio"] == 0.5 and split["n"] == 6
    assert found["score"] == split["accuracy"] and found["rules"] == "official"


def test_yes_ratio_counts_predictions_not_labels() -> None:
    assert TASKS["pope"].score(items("random", "yn"), ["yes", "yes"])["splits"]["random"]["yes_ratio"] == 1.0


def test_headline_is_the_mean_over_splits_not_the_pool() -> None:
    found = TASKS["pope"].score(items("random", "yyyy") + items("popular", "nn"), ["yes"] * 6)
    assert found["score"] == pytest.approx((1.0 + 0.0) / 2)
    assert found["f1"] == pytest.approx((1.0 + 0.0) / 2)


@pytest.mark.parametrize("labels, answer", [("yn", "no"), ("nn", "no"), ("nn", "yes")])
def test_no_division_by_zero(labels: str, answer: str) -> None:
    split = TASKS["pope"].score(items("random", labels), [answer] * 2)["splits"]["random"]
    assert split["f1"] == 0.0 and (split["precision"] == 0.0 or split["recall"] == 0.0)


def test_nothing_to_score() -> None:
    assert TASKS["pope"].score([], [])["score"] == 0.0


def test_a_missing_answer_is_an_error_and_not_a_shorter_file() -> None:
    with pytest.raises(InputError, match="1 answers for 2 items"):
        TASKS["pope"].score(items("random", "yn"), ["yes"])


def write(data: Path, split: str, records: list[dict[str, object]]) -> Path:
    path = data / "pope" / f"coco_pope_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def record(number: int, **change: object) -> dict[str, object]:
    # the first published version of the files has this typo
    text = "Is there an apple in the imange?"
    return {"question_id": number, "image": "COCO_val2014_000000310196.jpg", "text": text, "label": "no"} | change


def test_load(tmp_path: Path) -> None:
    write(tmp_path, "random", [record(1), record(2, label="yes")])
    write(tmp_path, "popular", [record(1)])
    loaded = TASKS["pope"].load(tmp_path)
    assert [item.id for item in loaded] == ["random/1", "random/2", "popular/1"]  # ids restart in every file
    assert loaded[0].image == tmp_path / "val2014" / "COCO_val2014_000000310196.jpg"
    assert loaded[0].question == "Is there an apple in the imange?"
    assert [item.answer for item in loaded] == ["no", "yes", "no"]
    assert [item.group for item in loaded] == ["random", "random", "popular"]


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"question_id": 1,\n', "line 1, column"),
        ("[]\n", "line 1: not a JSON object"),
        (json.dumps(record(1)) + "\n" + json.dumps(record(2, label="maybe")), "line 2: label is 'maybe'"),
        (json.dumps(record(1, text=3)), "line 1: field 'text' is 3"),
        (json.dumps({"question_id": 1, "label": "no"}), "line 1: field 'image' is missing"),
        (json.dumps(record(7)) + "\n" + json.dumps(record(7)), "id 'random/7' occurs twice"),
        ("\n", "holds no item"),
    ],
)
def test_wrong_file(tmp_path: Path, content: str, message: str) -> None:
    write(tmp_path, "random", []).write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        pope.load(tmp_path)
    assert "coco_pope_random.json" in str(caught.value) and len(str(caught.value).splitlines()) <= 3


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"coco_pope_random\.json"):
        pope.load(tmp_path)


def test_not_text(tmp_path: Path) -> None:
    write(tmp_path, "random", []).write_bytes(b"\xff\xfe{")
    with pytest.raises(InputError, match="not UTF-8"):
        pope.load(tmp_path)
