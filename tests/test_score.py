"""`normtune score`: the JSON of each task as documented, tables, wrong input with exit code 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from command import run
from normtune.tasks import caption_scores, mme

pytestmark = pytest.mark.heavy

needs_library = pytest.mark.skipif(caption_scores.library() is None, reason="needs pycocoevalcap")


def lines(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def whole(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def score(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run("score", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def pope_files(folder: Path, count: int = 4) -> list[str]:
    files = []
    for split in ("random", "popular", "adversarial"):
        labels = [
            {"question_id": n + 1, "image": f"{n // 2}.jpg", "text": f"{split} {n}?", "label": ("yes", "no")[n % 2]}
            for n in range(count)
        ]
        files += ["--annotations", lines(folder / f"coco_pope_{split}.json", *labels)]
    return files


def test_pope(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = pope_files(tmp_path)
    first = {"adversarial": 1, "random": 10000001, "popular": 20000001}
    answers = [{"question_id": start + n, "text": "Yes"} for start in first.values() for n in range(4)]
    given = lines(tmp_path / "answers.jsonl", *answers)
    found = score(capsys, "pope", "--predictions", given, *labels)
    assert found["mean_f1"] == pytest.approx(2 / 3) and found["n"] == 12 and found["absent"] == 0
    expected = {"accuracy": 0.5, "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "yes_ratio": 1.0}
    assert list(found["splits"]) == ["random", "popular", "adversarial"]
    for split in found["splits"].values():
        assert {key: split[key] for key in expected} == expected
    assert "LLaVA" in found["join"] and found["rules"] == "official"
    assert found["intervals"]["mean_f1"] == pytest.approx([2 / 3, 2 / 3])
    folder = score(capsys, "pope", "--predictions", given, "--annotations", str(tmp_path), "--rules", "lmms-eval")
    assert folder["pooled"]["yes_ratio"] == 0.5 and folder["rules"] == "lmms-eval"
    one = score(capsys, "pope", "--predictions", lines(tmp_path / "one", *[{"answer": "no"}] * 4), *labels[:2])
    assert list(one["splits"]) == ["random"] and one["join"] == "position"


def test_mme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for subtask in mme.SUBTASKS:
        (tmp_path / f"{subtask}.txt").write_text("1.png\tIs it?\tYes\tyes\n1.png\tIs it not?\tNo\tyes\n")
    found = score(capsys, "mme", "--predictions", str(tmp_path))
    assert (found["perception"], found["cognition"]) == (500.0, 200.0)
    assert found["subtasks"] == dict.fromkeys(mme.SUBTASKS, 50.0)


def vqa_files(folder: Path) -> list[str]:
    humans = [{"answer": "red", "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)]
    notes = [
        {"question_id": n, "image_id": n, "question_type": "what is", "answer_type": "other", "answers": humans}
        for n in range(4)
    ]
    return ["--annotations", whole(folder / "annotations.json", {"annotations": notes})]


def test_vqav2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = whole(tmp_path / "r.json", [{"question_id": n, "answer": ("red", "Red.")[n % 2]} for n in range(4)])
    arguments = ("vqav2", "--predictions", given, *vqa_files(tmp_path))
    found = score(capsys, *arguments)
    assert (found["overall"], found["per_answer_type"], found["per_question_type"]) == (
        50.0, {"other": 50.0}, {"what is": 50.0},
    )  # fmt: skip
    assert score(capsys, *arguments, "--rules", "lmms-eval")["overall"] == 100.0


@needs_library
@pytest.mark.parametrize("task", ["coco", "flickr30k"])
def test_captions(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(caption_scores, "meteor", lambda *_: 0.25)  # the jar takes ten seconds to start
    truth = {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in range(3)],
        "annotations": [{"image_id": n, "id": n, "caption": f"Thing {n} is on a red table."} for n in range(3)],
    }
    if task == "flickr30k":
        notes = zip(truth["images"], truth["annotations"], strict=True)
        images = [
            {"filename": f"{image['id']}.jpg", "split": "test", "sentences": [{"raw": note["caption"]}]}
            for image, note in notes
        ]
        truth = {"dataset": "flickr30k", "images": images}
    given = whole(tmp_path / "r.json", [{"image_id": n, "caption": f"thing {n} is on a red table"} for n in range(3)])
    found = score(capsys, task, "--predictions", given, "--annotations", whole(tmp_path / "a.json", truth))
    assert found["CIDEr"] == pytest.approx(10.0) and found["ROUGE_L"] == pytest.approx(1.0)
    assert all(found[f"Bleu_{n}"] == pytest.approx(1.0) for n in (1, 2, 3, 4)) and found["METEOR"] == 0.25
    assert set(found["intervals"]) >= {"CIDEr", "Bleu_4", "ROUGE_L"}


def test_the_table_shows_intervals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = whole(tmp_path / "r.json", [{"question_id": n, "answer": "red"} for n in range(3)])
    assert run("score", "vqav2", "--predictions", given, *vqa_files(tmp_path), "--allow-missing") == 0
    told = capsys.readouterr()
    assert "overall" in told.out and "100.000 to 100.000" in told.out and "official" in told.out
    assert "1 of 4 had no prediction and were left out" in told.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["popes", "--predictions", "x", "--annotations", "y"], "task 'popes' is unknown (did you mean 'pope'?)"),
        (["text", "--predictions", "x", "--annotations", "y"], "task 'text' is unknown"),
        (["vqav2", "--predictions", "x", "--annotations", "y", "--rules", "oficial"], "rules 'oficial' are unknown"),
        (["vqav2", "--predictions", "x"], "vqav2: no annotations"),
        (["vqav2", "--predictions", "nowhere.json"], "ANNOTATIONS"),
        (["mme", "--predictions", "nowhere"], "nowhere: not a folder"),
        (["mme", "--predictions", "a", "--predictions", "b"], "2 files of predictions, not 1"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    files = vqa_files(tmp_path) if message == "ANNOTATIONS" else []
    assert run("score", *arguments, *files) == 2
    told = capsys.readouterr().err
    assert ("nowhere.json: no such file" if files else message) in told and len(told.strip().splitlines()) <= 3


def test_missing_predictions_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = whole(tmp_path / "r.json", [{"question_id": 2, "answer": "red"}])
    assert run("score", "vqav2", "--predictions", given, *vqa_files(tmp_path)) == 2
    told = capsys.readouterr()
    assert "no prediction for question_id 0 (3 of 4 are missing)" in told.err and "--allow-missing" in told.err
    found = score(capsys, "vqav2", "--predictions", given, *vqa_files(tmp_path), "--allow-missing")
    assert (found["n"], found["absent"], found["overall"]) == (1, 3, 100.0)
