"""Captions: ROUGE-L against figures worked out by hand, both file formats, wrong files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from normtune.errors import InputError
from normtune.tasks import TASKS, Item, captions


@pytest.mark.parametrize(
    "candidate, references, expected",
    [
        ("a cat on a mat", ["a cat on a mat"], 1.0),
        ("A cat, on a MAT.", ["a cat on a mat"], 1.0),
        ("", ["a cat"], 0.0),
        ("...", ["a cat"], 0.0),
        ("dog", ["a cat"], 0.0),
        ("a cat", ["..."], 0.0),
        ("a b x y z w", ["a b c q"], (1 + 1.44) * (2 / 6) * (2 / 4) / (2 / 4 + 1.44 * (2 / 6))),
        # recall 3/4 from the first reference, precision 4/6 from the second: each maximum on its own
        ("a b c d e f", ["a b c x", "a b c d d d d d d d"], (1 + 1.44) * (4 / 6) * 0.75 / (0.75 + 1.44 * (4 / 6))),
        # a subsequence, not a set: "cat sits mat" in order
        ("mat cat sits", ["cat sits mat"], 2 / 3),
    ],
)
def test_rouge_l(candidate: str, references: list[str], expected: float) -> None:
    assert captions.rouge_l(candidate, references) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("A man's T-shirt, 5.00 dollars.", ["a", "man's", "t-shirt", "5.00", "dollars"]),
        ("'quoted' (words) -- and ... dots", ["quoted", "words", "and", "dots"]),
        ("snow_board\ncafé", ["snow", "board", "café"]),
    ],
)
def test_tokens(text: str, expected: list[str]) -> None:
    assert captions.tokens(text) == expected


def test_score_is_the_mean_over_images() -> None:
    items = [Item("1", None, "", ["a cat"]), Item("2", None, "", ["a dog", "one dog"])]
    found = captions.score(items, ["a cat", "horses"])
    assert found["score"] == found["rouge_l"] == 0.5 and found["words"] == 1.5
    assert captions.score([], [])["score"] == 0.0


def write_coco(data: Path, images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> None:
    (data / "coco").mkdir()
    content = {"info": {}, "images": images, "annotations": annotations}
    (data / "coco" / "captions_val2014.json").write_text(json.dumps(content))


IMAGES = [{"id": 7, "file_name": "COCO_val2014_000000000007.jpg"}, {"id": 9, "file_name": "b.jpg"}]
NOTES = [
    {"id": 1, "image_id": 9, "caption": "A dog\nruns. "},
    {"id": 2, "image_id": 7, "caption": "A cat."},
    {"id": 3, "image_id": 7, "caption": "One cat."},
]


def test_load_coco(tmp_path: Path) -> None:
    write_coco(tmp_path, IMAGES, NOTES)
    items = TASKS["coco"].load(tmp_path)
    assert [(item.id, item.answer) for item in items] == [("7", ["A cat.", "One cat."]), ("9", ["A dog runs."])]
    assert items[0].image == tmp_path / "val2014" / "COCO_val2014_000000000007.jpg"
    assert items[0].question == "Provide a one-sentence caption for the provided image."


@pytest.mark.parametrize(
    "images, notes, message",
    [
        (IMAGES, NOTES[1:], "image 9 has no caption"),
        (IMAGES[:1], NOTES, "annotation 0: image_id 9 is not among the images"),
        (IMAGES + IMAGES[:1], NOTES, "image 2: id 7 occurs twice"),
        (IMAGES, [{"image_id": 7}], "annotation 0: field 'caption' is missing"),
        ([], [], "holds no item"),
    ],
)
def test_wrong_coco(tmp_path: Path, images: list[Any], notes: list[Any], message: str) -> None:
    write_coco(tmp_path, images, notes)
    with pytest.raises(InputError, match=message):
        captions.load_coco(tmp_path)


def write_flickr(data: Path, content: Any) -> None:
    (data / "flickr30k").mkdir()
    (data / "flickr30k" / "dataset_flickr30k.json").write_text(json.dumps(content))


def test_load_flickr30k(tmp_path: Path) -> None:
    sentences = [{"raw": "A rock .", "tokens": ["a", "rock"]}]
    images = [
        {"split": split, "filename": f"{split}.jpg", "sentences": sentences, "imgid": 1}
        for split in ("train", "test", "val")
    ]
    write_flickr(tmp_path, {"dataset": "flickr30k", "images": images})
    (item,) = TASKS["flickr30k"].load(tmp_path)
    assert (item.id, item.answer) == ("test.jpg", ["A rock ."])
    assert item.image == tmp_path / "flickr30k" / "flickr30k-images" / "test.jpg"


@pytest.mark.parametrize(
    "content, message",
    [
        ({"images": [{"split": "train", "filename": "a.jpg", "sentences": []}]}, "no image of split 'test'"),
        ({"images": [{"split": "test", "filename": "a.jpg", "sentences": []}]}, r"image 0 \(a.jpg\): no sentences"),
        ({"images": [{"split": "test", "filename": "a.jpg", "sentences": [{}]}]}, "field 'raw' is missing"),
        ({"images": {}}, "field 'images' is {}, not list"),
        ([], "holds a list, not an object"),
    ],
)
def test_wrong_flickr30k(tmp_path: Path, content: Any, message: str) -> None:
    write_flickr(tmp_path, content)
    with pytest.raises(InputError, match=message):
        captions.load_flickr30k(tmp_path)


@pytest.mark.parametrize("name", ["coco", "flickr30k"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="no such file"):
        TASKS[name].load(tmp_path)
