"""POPE: the official parser row by row, the official metrics, both published file versions, wrong files."""

from __future__ import annotations

import json
from pathlib import Path

import official
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normtune.errors import InputError
from normtune.tasks import TASKS, Item, Joined, pope, pope_predictions

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


# ---- both rules against the programs -----------------------------------------------------------------------

ANSWER = st.sampled_from([*NO, *YES, "yes", "Yes", "YES ", " no ", "No.", "y", "n", "maybe", "Yes, there is no doubt."])
ASKED = st.lists(st.tuples(ANSWER, st.sampled_from(["yes", "no"])), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(ASKED)
def test_equals_the_official_program(asked: list[tuple[str, str]]) -> None:
    answers, labels = [a for a, _ in asked], [b for _, b in asked]
    found = pope.measure(items("random", "".join(label[0] for label in labels)), answers).scores["splits"]["random"]
    try:
        assert {key: found[key] for key in METRICS} == pytest.approx(official.pope(answers, labels), abs=1e-12)
    except ZeroDivisionError:  # where the official program stops, F1 is 0
        assert found["f1"] == 0.0
    assert found["other"] == 0


@settings(max_examples=200, deadline=None)
@given(ASKED)
def test_equals_lmms_eval(asked: list[tuple[str, str]]) -> None:
    answers, labels = [a for a, _ in asked], [b for _, b in asked]
    found = pope.measure(items("random", "".join(label[0] for label in labels)), answers, "lmms-eval").scores
    expected = official.pope_lmms(answers, labels)
    assert {key: found["pooled"][key] for key in METRICS} == pytest.approx(expected, abs=1e-12)
    assert found["score"] == pytest.approx(expected["accuracy"]) and found["rules"] == "lmms-eval"
    neither = sum(a.lower().strip() not in ("yes", "no") for a in answers)
    assert found["splits"]["random"]["other"] == neither


METRICS = ["accuracy", "precision", "recall", "f1", "yes_ratio"]


def test_lmms_eval_pools_the_splits() -> None:
    asked = items("random", "yyyy") + items("popular", "nn")
    found = pope.measure(asked, ["yes"] * 6, "lmms-eval").scores
    assert found["score"] == found["pooled"]["accuracy"] == pytest.approx(4 / 6)
    assert found["pooled"]["yes_ratio"] == pytest.approx(4 / 6)  # of the labels, whatever was answered
    assert found["mean_f1"] == pytest.approx(0.5)


def test_unknown_rules() -> None:
    with pytest.raises(InputError, match=r"rules 'lmms' are unknown \(did you mean 'lmms-eval'"):
        TASKS["pope"].score([], [], "lmms")  # type: ignore[arg-type]


# ---- other layouts -----------------------------------------------------------------------------------------


def test_load_one_split(tmp_path: Path) -> None:
    write(tmp_path, "random", [record(1)])
    write(tmp_path, "popular", [record(1)])
    assert [item.group for item in pope.load(tmp_path, "popular")] == ["popular"]
    with pytest.raises(InputError, match=r"no split 'populair' \(did you mean 'popular'(.|\n)*random, popular"):
        pope.load(tmp_path, "populair")


LLAVA = "Is there an apple in the image?\nAnswer the question using a single word or phrase."


def llava(number: int, category: str, **change: object) -> dict[str, object]:
    image = "COCO_val2014_000000310196.jpg"
    return {"question_id": number, "image": image, "text": LLAVA, "category": category} | change


def write_llava(data: Path, records: list[dict[str, object]]) -> None:
    (data / "pope" / "llava_pope_test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def test_load_llava(tmp_path: Path) -> None:
    """LLaVA's wording, the official labels, joined by category and order: the ids differ."""
    write(tmp_path, "random", [record(1), record(2, label="yes")])
    write(tmp_path, "adversarial", [record(1, label="yes")])
    write_llava(tmp_path, [llava(1, "adversarial"), llava(10000001, "random"), llava(10000002, "random")])
    found = pope.load(tmp_path)
    assert [item.id for item in found] == ["adversarial/1", "random/10000001", "random/10000002"]
    assert [item.answer for item in found] == ["yes", "no", "yes"] and found[0].question == LLAVA
    assert found[0].image == tmp_path / "val2014" / "COCO_val2014_000000310196.jpg"


@pytest.mark.parametrize(
    "records, message",
    [
        ([llava(1, "popular")], "line 1: category 'popular' has no file"),
        (
            [llava(1, "random", image="b.jpg")],
            "line 1: question 1 of 'random', 'Is there an apple.*' about b.jpg, is not",
        ),
        ([llava(n, "random") for n in (1, 2, 3)], "line 3: question 3 of 'random'"),
        ([llava(1, "random")], "1 questions of 'random' for 2 labels"),
        ([llava(1, "random", text="Is there a dog?")], "line 1: question 1 of 'random', 'Is there a dog"),
        ([llava(1, "random")] * 2, "id 'random/1' occurs twice"),
    ],
)
def test_wrong_llava(tmp_path: Path, records: list[dict[str, object]], message: str) -> None:
    write(tmp_path, "random", [record(1), record(2)])
    write_llava(tmp_path, records)
    with pytest.raises(InputError, match=message):
        pope.load(tmp_path)


def test_llava_must_ask_every_labelled_split(tmp_path: Path) -> None:
    write(tmp_path, "random", [record(1)])
    write(tmp_path, "popular", [record(1)])
    write_llava(tmp_path, [llava(1, "random")])
    with pytest.raises(InputError, match="0 questions of 'popular' for 1 labels"):
        pope.load(tmp_path)
    assert [item.id for item in pope.load(tmp_path, "random")] == ["random/1"]


def test_load_rows(tmp_path: Path) -> None:
    """Hugging Face rows: one file with categories, or a file per split."""
    (tmp_path / "pope").mkdir()
    row = {"question_id": "1", "question": "Is it?", "answer": "Yes", "image_source": "COCO_val2014_000000310196"}
    rows = [row | {"category": "random"}, row | {"category": "popular", "answer": "no"}]
    (tmp_path / "pope" / "test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = pope.load(tmp_path)
    assert [(item.id, item.answer) for item in found] == [("random/1", "yes"), ("popular/1", "no")]
    assert found[0].image == tmp_path / "val2014" / "COCO_val2014_000000310196.jpg"
    assert found[0].question == "Is it?\nAnswer the question using a single word or phrase."
    (tmp_path / "pope" / "test.jsonl").unlink()
    (tmp_path / "pope" / "adversarial.json").write_text(json.dumps([row]))
    assert pope.load(tmp_path)[0].group == "adversarial"


# ---- prediction files --------------------------------------------------------------------------------------


def labels_of(folder: Path, **counts: int) -> list[Path]:
    """A label file for each split; question k of each is about thing k."""
    return [
        write(folder, split, [record(k + 1, text=f"thing {k}?", label="yes" if k % 2 else "no") for k in range(count)])
        for split, count in counts.items()
    ]


def answers_in(path: Path, *records: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def by_id(*ids: object) -> list[dict[str, object]]:
    return [{"question_id": key, "text": f"{key}", "answer_id": "x", "model_id": "m"} for key in ids]


def told(joined: Joined) -> list[tuple[str, str]]:
    return [(item.id, answer) for item, answer in zip(joined.items, joined.answers, strict=True)]


def test_join_by_position(tmp_path: Path) -> None:
    labels = labels_of(tmp_path, random=2)
    path = answers_in(tmp_path / "a.jsonl", *[{"question": f"thing {k}?", "answer": str(k)} for k in range(2)])
    found = pope_predictions.join([path], labels)
    assert told(found) == [("random/1", "0"), ("random/2", "1")] and found.join == "position" and found.absent == 0


@pytest.mark.parametrize(
    "answers, message",
    [
        ([{"answer": "no"}], "1 answers for 2 questions"),
        ([{"answer": "no"}] * 3, "3 answers for 2 questions"),
        ([], "holds no answer"),
        ([{"answer": "no", "question": "thing 1?"}] * 2, "line 1: answers 'thing 1\\?', but question 1 is another"),
        ([{"answer": None}] * 2, "line 1: field 'answer' is None"),
        ([{"answer": 1}] * 2, "line 1: field 'answer' is 1, not str"),
        ([{"question": "x"}] * 2, "line 1: field 'answer' is missing"),
        ([{"answer": "no"}, {"answer": "no", "question_id": 2}], "line 1: no question_id"),
    ],
)
def test_wrong_positions(tmp_path: Path, answers: list[dict[str, object]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pope_predictions.join([answers_in(tmp_path / "a.jsonl", *answers)], labels_of(tmp_path, random=2))


def test_missing_positions_may_be_allowed(tmp_path: Path) -> None:
    path = answers_in(tmp_path / "a.jsonl", {"answer": "no"})
    found = pope_predictions.join([path], labels_of(tmp_path, random=3), None, True)
    assert told(found) == [("random/1", "no")] and found.absent == 2
    with pytest.raises(InputError, match="4 answers for 3"):
        answers_in(path, *[{"answer": "no"}] * 4)
        pope_predictions.join([path], labels_of(tmp_path, random=3), None, True)


def test_join_by_the_labels_ids(tmp_path: Path) -> None:
    labels = labels_of(tmp_path, mine=3)
    found = pope_predictions.join([answers_in(tmp_path / "a.jsonl", *by_id(3, 1, 2))], labels)
    assert told(found) == [("coco_pope_mine/1", "1"), ("coco_pope_mine/2", "2"), ("coco_pope_mine/3", "3")]
    assert found.join == "question_id"
    part = pope_predictions.join([answers_in(tmp_path / "a.jsonl", *by_id(3))], labels, None, True)
    assert told(part) == [("coco_pope_mine/3", "3")] and part.absent == 2


def test_join_by_llavas_ids(tmp_path: Path) -> None:
    labels = labels_of(tmp_path, random=2, popular=1, adversarial=2)
    given = by_id(20000001, 1, 10000002, 2, 10000001)
    found = pope_predictions.join([answers_in(tmp_path / "a.jsonl", *given)], labels)
    assert told(found) == [
        ("random/1", "10000001"), ("random/2", "10000002"), ("popular/1", "20000001"),
        ("adversarial/1", "1"), ("adversarial/2", "2"),
    ]  # fmt: skip
    assert "LLaVA" in found.join
    folder = pope_predictions.join([tmp_path / "a.jsonl"], [tmp_path / "pope"])
    assert sorted(told(folder)) == sorted(told(found))
    part = pope_predictions.join([answers_in(tmp_path / "a.jsonl", *given[:2])], labels, None, True)
    assert told(part) == [("popular/1", "20000001"), ("adversarial/1", "1")] and part.absent == 3


@pytest.mark.parametrize("key", ["prompt", "question"])
@pytest.mark.parametrize("first", [1, 10000001])
def test_an_id_that_quotes_another_question(tmp_path: Path, first: int, key: str) -> None:
    """The published versions differ by a typo and by 90 questions: with the wrong one, ids are shifted."""
    (path,) = labels_of(tmp_path, random=2)
    path.write_text(path.read_text().replace("thing 0?", "an imange?"))
    asked = ["an image?\nAnswer the question using a single word or phrase.", " thing 1? Answer with yes or no."]
    given = [{key: text} | answer for text, answer in zip(asked, by_id(first, first + 1), strict=True)]
    assert len(pope_predictions.join([answers_in(tmp_path / "a.jsonl", *given)], [path]).items) == 2
    given[1][key] = "thing 2?"
    message = f"a.jsonl, line 2: question_id {first + 1} answers 'thing 2\\?'(.|\n)*version that was asked"
    with pytest.raises(InputError, match=message):
        pope_predictions.join([answers_in(tmp_path / "a.jsonl", *given)], [path])


@pytest.mark.parametrize(
    "splits, ids, message",
    [
        ({"random": 2}, (10000001, 10000002, 3), "question_id 3 and others are not the labels' ids, nor LLaVA's"),
        ({"random": 2, "popular": 2}, (1, 2), "question_id 1 and others"),
        ({"random": 2}, (1, 2, 3), "question_id 3 and others"),
        ({"adversarial": 2}, (2,), "no prediction for question_id '1'"),
        ({"random": 2}, (2,), "no prediction for question_id '1'"),
        ({"random": 2}, (10000001,), "no prediction for question_id '10000002'"),
        ({"mine": 2}, (1, 7), "nor LLaVA's (no split of its)"),
        ({"random": 2}, (1, 1), "line 2: question_id '1' occurs twice"),
        ({"random": 2}, ("1", "2"), "line 1: question_id is the text '1'"),
        ({"random": 2}, (1.0, 2.0), "question_id' is 1.0, not int or str"),
        ({"random": 2}, (None, 2), "question_id' is None"),
    ],
)
def test_ids_that_fit_nothing(tmp_path: Path, splits: dict[str, int], ids: tuple[object, ...], message: str) -> None:
    path = answers_in(tmp_path / "a.jsonl", *by_id(*ids))
    with pytest.raises(InputError) as caught:
        pope_predictions.join([path], labels_of(tmp_path, **splits))
    assert message in str(caught.value) and len(str(caught.value).splitlines()) <= 3


def test_one_file_of_answers_per_split(tmp_path: Path) -> None:
    labels = labels_of(tmp_path, random=1, popular=1)
    files = [answers_in(tmp_path / f"answers_{name}.json", {"answer": name}) for name in ("popular", "random")]
    found = pope_predictions.join(files, labels)
    assert told(found) == [("random/1", "random"), ("popular/1", "popular")] and found.join == "position"
    assert told(pope_predictions.join(files[:1], labels[1:])) == [("popular/1", "popular")]
    with pytest.raises(InputError, match="predictions of popular, random for labels of random"):
        pope_predictions.join(files, labels[:1])
    with pytest.raises(InputError, match="a second file of split 'random'"):
        pope_predictions.join(files, [labels[0], labels[0]])
    with pytest.raises(InputError, match="no file of random, popular or adversarial"):
        (tmp_path / "empty").mkdir()
        pope_predictions.join(files, [tmp_path / "empty"])
    assert told(pope_predictions.join([files[1]], labels[:1], "random")) == [("random/1", "random")]


def test_whole_splits_may_be_missing(tmp_path: Path) -> None:
    labels = labels_of(tmp_path, random=1, popular=2, adversarial=3)
    names = ("adversarial", "random")
    files = [answers_in(tmp_path / f"{n}.jsonl", *[{"answer": n}] * (3 if n == names[0] else 1)) for n in names]
    with pytest.raises(InputError, match="predictions of adversarial, random for labels of random, popular"):
        pope_predictions.join(files, labels)
    found = pope_predictions.join(files, labels, None, True)
    assert [item.group for item in found.items] == ["random", *["adversarial"] * 3] and found.absent == 2
    alone = pope_predictions.join([files[0]], labels, None, True)  # not the first labels there are
    assert [item.group for item in alone.items] == ["adversarial"] * 3 and alone.absent == 3
    with pytest.raises(InputError, match="predictions of adversarial, random"):
        pope_predictions.join(files, labels, "popular")
    with pytest.raises(InputError, match="holds no answers to split 'popular'"):
        pope_predictions.join(files, labels, "popular", True)
    assert told(pope_predictions.join(files, labels, "random")) == [("random/1", "random")]


def test_one_split_of_a_file_of_all(tmp_path: Path) -> None:
    """All labels are joined first: LLaVA's ids of another split are no ids of this one."""
    labels = labels_of(tmp_path, random=2, popular=2, adversarial=2)
    ids = (1, 2, 10000001, 10000002, 20000001, 20000002)
    path = answers_in(tmp_path / "a.jsonl", *by_id(*ids))
    for start, split in zip((0, 2, 4), ("adversarial", "random", "popular"), strict=True):
        expected = [(f"{split}/{k + 1}", str(ids[start + k])) for k in range(2)]
        assert told(pope_predictions.join([path], labels, split)) == expected
    answers_in(path, *by_id(1, 2, 10000001))
    with pytest.raises(InputError, match="no prediction for question 'random/2'"):
        pope_predictions.join([path], labels, "random")
    part = pope_predictions.join([path], labels, "random", True)
    assert told(part) == [("random/1", "10000001")] and part.absent == 1
    in_order = answers_in(tmp_path / "b.jsonl", *[{"answer": str(n)} for n in range(6)])
    assert told(pope_predictions.join([in_order], labels, "popular")) == [("popular/1", "2"), ("popular/2", "3")]
    own = answers_in(tmp_path / "popular.jsonl", *by_id(1, 2))  # the ids of the split's own labels
    assert told(pope_predictions.join([own], labels, "popular")) == [("popular/1", "1"), ("popular/2", "2")]
