"""Captions: figures equal to pycocoevalcap's on the same tokens and captions, every file format, wrong files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normtune.errors import InputError, JobError
from normtune.tasks import TASKS, Item, caption_scores, captions

installed = pytest.mark.skipif(caption_scores.library() is None, reason="needs pycocoevalcap")
java = pytest.mark.skipif(not caption_scores.has_java(), reason="needs Java and pycocoevalcap")
NAMES = ["CIDEr", "Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L"]


def theirs(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """pycocoevalcap's scorers on tokenized captions."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    truth = {n: list(own) for n, own in enumerate(references)}
    found = {n: [own] for n, own in enumerate(candidates)}
    bleu = Bleu(4).compute_score(truth, found, verbose=0)[0]
    return dict(
        zip(NAMES, [Cider().compute_score(truth, found)[0], *bleu, Rouge().compute_score(truth, found)[0]], strict=True)
    )


def ours(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    rows = caption_scores.statistics(candidates, references)
    found = caption_scores.figures(rows.sum(axis=0, keepdims=True))
    return {name: float(found[name][0]) for name in NAMES}


def of(references: Sequence[Sequence[str]]) -> list[Item]:
    return [Item(str(n), None, "", list(own)) for n, own in enumerate(references)]


# ---- scores of tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "candidate, references, expected",
    [
        ("a cat on a mat", ["a cat on a mat"], 1.0),
        ("", ["a cat"], 0.0),
        ("dog", ["a cat"], 0.0),
        ("a cat", [""], 0.0),
        ("a b x y z w", ["a b c q"], (1 + 1.44) * (2 / 6) * (2 / 4) / (2 / 4 + 1.44 * (2 / 6))),
        # recall 3/4 from the first reference, precision 4/6 from the second: each maximum on its own
        ("a b c d e f", ["a b c x", "a b c d d d d d d d"], (1 + 1.44) * (4 / 6) * 0.75 / (0.75 + 1.44 * (4 / 6))),
        # a subsequence, not a set: "cat sits mat" in order
        ("mat cat sits", ["cat sits mat"], 2 / 3),
    ],
)
def test_rouge_l(candidate: str, references: list[str], expected: float) -> None:
    assert caption_scores.rouge_l(candidate, references) == pytest.approx(expected, abs=1e-12)


WORDS = st.sampled_from(["a", "the", "dog", "cat", "runs", "on", "red", "mat", "22\u00a03/4"])
CAPTION = st.lists(WORDS, max_size=9).map(" ".join)
CORPUS = st.lists(st.tuples(CAPTION, st.lists(CAPTION, min_size=1, max_size=4)), min_size=1, max_size=6)


@installed
@settings(max_examples=150, deadline=None)
@given(CORPUS.filter(lambda corpus: any(own.split() for _, others in corpus for own in others)))
def test_equals_pycocoevalcap_on_the_same_tokens(corpus: list[tuple[str, list[str]]]) -> None:
    candidates, references = [own for own, _ in corpus], [others for _, others in corpus]
    assert ours(candidates, references) == pytest.approx(theirs(candidates, references), abs=1e-9)


@installed
def test_cider_by_hand() -> None:
    """CIDEr-D with one reference each, both words in one image alone: idf log 2."""
    found = ours(["dog", "a"], [["dog"], ["cat a"]])
    # image 0: cosine 1 for n = 1; image 1: "a" against (cat, a): 1 / sqrt 2, one bigram fewer: exp(-1 / 72)
    second = 1 / math.sqrt(2) * math.exp(-1 / 72)
    assert found["CIDEr"] == pytest.approx(10 * (1 + second) / 4 / 2, abs=1e-12)


@installed
def test_one_image_has_no_cider_and_an_empty_corpus_no_score() -> None:
    alone = TASKS["coco"].score(of([["a cat on a mat"]]), ["a cat on a mat"])
    assert alone["CIDEr"] == 0.0 and alone["Bleu_4"] == pytest.approx(1.0, abs=1e-6) and alone["ROUGE_L"] == 1.0
    nothing = captions.measure([], [])
    assert {nothing.scores[name] for name in NAMES} == {0.0} and nothing.with_intervals()["intervals"] == {}
    mute = TASKS["coco"].score(of([["..."], ["!"]]), ["a cat", "?"])  # no word in any reference: the library raises
    assert mute["CIDEr"] == 0.0


@installed
def test_long_captions_have_no_cider() -> None:
    """Why answers in LLaVA's long style score nothing: the Gaussian in the difference of lengths."""
    short = [["a red circle on the left", "a circle"], ["two blue squares", "squares of blue"]]
    long = ["a red circle on the left " * 12, "two blue squares " * 20]
    assert ours(long, short)["CIDEr"] < 1e-8 < ours(["a red circle", "two blue squares"], short)["CIDEr"]


def test_without_the_library_there_is_rouge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_scores, "library", lambda: None)
    found = captions.measure(of([["a cat"], ["a dog", "one dog"]]), ["A cat.", "horses"])
    assert found.scores["ROUGE_L"] == found.scores["score"] == 0.5 and found.scores["words"] == 1.5
    assert "CIDEr" not in found.scores and "pip install" in found.scores["missing"]
    assert set(found.with_intervals()["intervals"]) == {"score", "ROUGE_L", "words"}
    with pytest.raises(InputError, match=r"pip install 'normtune\[eval\]'"):
        captions.join([Path("p")], [Path("a")])


# ---- tokens ------------------------------------------------------------------------------------------------

# caption -> tokens of CoreNLP 3.4.1 after coco-caption's punctuation list; the test with the jar checks these rows too
TOKENS = {
    "A man's T-shirt, 5.00 dollars.": "a man 's t-shirt 5.00 dollars",
    "'quoted' (words) -- and ... dots; more: end!": "quoted -lrb- words -rrb- and dots more end",
    "It costs $5.00 or $ 5, 50% off": "it costs $ 5.00 or $ 5 50 % off",
    "He doesn't, can't and cannot; they're dogs'": "he does n't ca n't and can not they 're dogs",
    "in the U.S.A. at 5 p.m. near St. Louis": "in the u.s.a. at 5 p.m. near st. louis",
    "the end. next end.Next one": "the end next end.next one",
    "black/white and/or w/ his": "black/white and/or w / his",
    "22 3/4 miles": "22\u00a03/4 miles",
    "2½ hours": "2 1/2 hours",
    "a 5'10\" man at 8:25 on 1,000 acres": "a 5 10 man at 8:25 on 1,000 acres",
    "rock 'n' roll at 7 o'clock in the '90s": "rock 'n' roll at 7 o'clock in the '90s",
    "“quoted” – it’s a café…": "quoted it 's a café",
    "a dog 😀 on grass ☺": "a dog on grass ☺",
    "wow!! really?": "wow !! really",
    "[sic] {x} <b>bold</b>": "-lsb- sic -rsb- -lcb- x -rcb- <b> bold </b>",
    "No. 5 is no. 1, no.": "no. 5 is no. 1 no",
    "dog's,cat dog-cat - dog": "dog 's cat dog-cat dog",
    "": "",
    " . ": "",
    "&amp; AT&T a&b": "& at&t a & b",
    "UPPER Case Ñandú": "upper case ñandú",
    "gonna wanna 'tis 'em": "gon na wan na 't is 'em",
    "#1 #hashtag @user": "# 1 #hashtag @user",
}


@pytest.mark.parametrize("caption", TOKENS)
def test_tokens_without_java(caption: str) -> None:
    assert caption_scores.tokenize([caption], java=False) == [TOKENS[caption]]


@java
def test_tokens_of_the_jar() -> None:
    assert dict(zip(TOKENS, caption_scores.tokenize(list(TOKENS), java=True), strict=True)) == TOKENS


@pytest.mark.parametrize("java", [False, pytest.param(True, marks=java)])
def test_line_separators_shift_nothing(java: bool) -> None:
    """A vertical tab or U+2028 makes the official program give every later caption its neighbour's tokens."""
    given = [f"one{separator}two" for separator in "\n\r\v\f\x1c\x1d\x1e\u2028\u2029"] + ["", "last one", ""]
    assert caption_scores.tokenize(given, java=java) == ["one two"] * 9 + ["", "last one", ""]
    assert caption_scores.tokenize(["a\x85b", "c\ud83dd", "e\0f"], java=java)[1:] in (["c d", "e f"], ["c d", "ef"])


def test_known_captions_are_not_tokenized_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(caption_scores, "_tokenized", {})
    monkeypatch.setattr(caption_scores, "_java_tokens", lambda lines: asked.append(list(lines)) or list(lines))
    assert caption_scores.tokenize(["a", "b", "a"], java=True) == ["a", "b", "a"]
    assert caption_scores.tokenize(["b", "c"], java=True) == ["b", "c"]
    assert asked == [["a", "b"], ["c"]]


@java
def test_a_java_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "java").write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(JobError, match=r"gave 0 lines for 1 captions \(broken\)"):
        caption_scores.tokenize(["never seen before"], java=True)


# ---- whole corpora -----------------------------------------------------------------------------------------

METEOR_OF_REAL = 0.2601957805105968
REAL = Path(__file__).parents[3] / "shared" / "data" / "coco-mini" / "captions_val2017.json"


def one_against_the_others(path: Path) -> tuple[list[str], list[list[str]]]:
    """The first human caption of each image as the prediction, the others as references."""
    every = [references for _, _, references in captions.read_coco(path)]
    return [own[0] for own in every], [own[1:] for own in every]


def world() -> tuple[list[str], list[list[str]]]:
    """Captions of the embedded world."""
    from normtune.world import scenes, text

    generator = np.random.default_rng(0)
    every = [text.references(generator, scenes.sample(generator, "eval")) for _ in range(60)]
    return [own[0] for own in every], [list(own[1:]) for own in every]


def nasty() -> tuple[list[str], list[list[str]]]:
    return [*TOKENS], [[b, a, "a man on a dog"] for a, b in zip(TOKENS, reversed(TOKENS), strict=True)]


def corpus(name: str) -> tuple[list[str], list[list[str]]]:
    if name == "real" and not REAL.exists():
        pytest.skip("no real captions here")
    return one_against_the_others(REAL) if name == "real" else {"world": world, "nasty": nasty}[name]()


@java
@pytest.mark.parametrize("name", ["real", "world", "nasty"])
def test_the_jar_is_not_missed(name: str) -> None:
    """|CIDEr without Java - with Java| <= 5e-4."""
    answers, references = corpus(name)
    found = [captions.measure(of(references), answers, java=java).scores for java in (True, False)]
    assert abs(found[0]["CIDEr"] - found[1]["CIDEr"]) <= 5e-4 and found[0]["CIDEr"] > 0.3
    assert all(abs(found[0][name] - found[1][name]) <= 5e-4 for name in NAMES)
    assert found[0]["tokenizer"] != found[1]["tokenizer"]


@java
@pytest.mark.parametrize("name", ["real", "nasty"])
def test_equals_pycocoevalcap_as_a_whole(name: str) -> None:
    """Their tokenizer and scorers against ours, on the same captions: to 1e-9."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    answers, references = corpus(name)
    for place, own in enumerate(references):
        references[place] = [caption for caption in own if caption.strip()] or ["a"]
    truth = {n: [{"caption": caption} for caption in own] for n, own in enumerate(references)}
    found = {n: [{"caption": caption}] for n, caption in enumerate(answers)}
    cutter = ptbtokenizer.PTBTokenizer()
    cut = [cutter.tokenize(captions) for captions in (truth, found)]
    expected = theirs([cut[1][n][0] for n in found], [cut[0][n] for n in truth])
    measured = captions.measure(of(references), answers, java=True).scores
    assert {key: measured[key] for key in expected} == pytest.approx(expected, abs=1e-9)


@java
@pytest.mark.slow
def test_meteor_of_real_captions() -> None:
    """The figure is pycocoevalcap's COCOEvalCap on these captions: the first of each image against the others."""
    answers, references = corpus("real")
    assert captions.measure(of(references), answers, meteor=True).scores["METEOR"] == pytest.approx(
        METEOR_OF_REAL, abs=1e-9
    )


def test_meteor_needs_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_scores, "has_java", lambda: False)
    found = captions.measure(of([["a cat"]]), ["a cat"], meteor=True).scores
    assert "METEOR" not in found and found["tokenizer"] == "normtune's, without Java"


# ---- files -------------------------------------------------------------------------------------------------


def write_coco(data: Path, images: list[Any], annotations: list[Any], name: str = "captions_val2014.json") -> Path:
    path = data / "coco" / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    return path


IMAGES = [{"id": 7, "file_name": "COCO_val2014_000000000007.jpg"}, {"id": 9, "file_name": "b.jpg"}]
NOTES = [
    {"id": 1, "image_id": 9, "caption": "A dog\nruns. "},
    {"id": 2, "image_id": 7, "caption": "A cat."},
    {"id": 3, "image_id": 7, "caption": "One cat."},
]


@pytest.mark.parametrize(
    "name, split, folder",
    [
        ("captions_val2014.json", None, "val2014"),
        ("captions_val2017.json", None, "val2017"),
        ("annotations/captions_val2017.json", "val2017", "val2017"),
    ],
)
def test_load_coco(tmp_path: Path, name: str, split: str | None, folder: str) -> None:
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    write_coco(tmp_path, IMAGES, NOTES, name)
    items = TASKS["coco"].load(tmp_path, split)
    assert [(item.id, item.answer) for item in items] == [("7", ["A cat.", "One cat."]), ("9", ["A dog runs."])]
    assert items[0].image == tmp_path / folder / "COCO_val2014_000000000007.jpg"
    assert items[0].question == "Provide a one-sentence caption for the provided image."
    with pytest.raises(InputError, match=r"no split 'val'(.|\n)*There are val201"):
        TASKS["coco"].load(tmp_path, "val")


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


def karpathy(dataset: str = "flickr30k") -> dict[str, Any]:
    images = []
    for number, split in enumerate(("train", "test", "val", "restval")):
        entry = {"split": split, "filename": f"{100 + number}.jpg", "imgid": number}
        entry |= {"filepath": "val2014", "cocoid": 500 + number} if dataset == "coco" else {}
        images.append(entry | {"sentences": [{"raw": f"A rock in {split} .", "tokens": ["a", "rock"]}]})
    return {"dataset": dataset, "images": images}


def write_flickr(data: Path, content: Any) -> Path:
    (data / "flickr30k").mkdir()
    path = data / "flickr30k" / "dataset_flickr30k.json"
    path.write_text(json.dumps(content))
    return path


def test_load_karpathy(tmp_path: Path) -> None:
    write_flickr(tmp_path, karpathy())
    (item,) = TASKS["flickr30k"].load(tmp_path)
    assert (item.id, item.answer) == ("101.jpg", ["A rock in test ."])
    assert item.image == tmp_path / "flickr30k" / "flickr30k-images" / "101.jpg"
    assert TASKS["flickr30k"].load(tmp_path, "val")[0].id == "102.jpg"
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco" / "dataset_coco.json").write_text(json.dumps(karpathy("coco")))
    (item,) = TASKS["coco"].load(tmp_path)
    assert (item.id, item.image) == ("501", tmp_path / "val2014" / "101.jpg")
    assert TASKS["coco"].load(tmp_path, "restval")[0].id == "503"


TOKEN_FILE = "100.jpg#0\tA dog runs .\n100.jpg#1\tOne dog .\n200.jpg#0\tA cat .\n"


def test_load_flickr_tokens(tmp_path: Path) -> None:
    root = tmp_path / "flickr30k"
    root.mkdir()
    (root / captions.TOKEN_FILE).write_text(TOKEN_FILE)
    assert [item.id for item in TASKS["flickr30k"].load(tmp_path)] == ["100.jpg", "200.jpg"]
    (root / "test.txt").write_text("200\n")
    (item,) = TASKS["flickr30k"].load(tmp_path)
    assert (item.id, item.answer, item.image) == ("200.jpg", ["A cat ."], root / "flickr30k-images" / "200.jpg")
    with pytest.raises(InputError, match=r"no split 'val'.*\n.*test"):
        TASKS["flickr30k"].load(tmp_path, "val")
    (root / "test.txt").write_text("300\n")
    with pytest.raises(InputError, match="image 300 has no caption"):
        TASKS["flickr30k"].load(tmp_path)
    (root / captions.TOKEN_FILE).write_text("100.jpg A dog\n")
    with pytest.raises(InputError, match="line 1: not"):
        TASKS["flickr30k"].load(tmp_path)


def test_load_rows(tmp_path: Path) -> None:
    """The Hugging Face layouts: COCO-Caption, coco-karpathy, flickr30k."""
    (tmp_path / "coco").mkdir()
    row = {"question_id": "COCO_val2014_000000000042.jpg", "answer": ["A cat."], "id": 3}
    (tmp_path / "coco" / "val.jsonl").write_text(json.dumps(row) + "\n")
    (item,) = TASKS["coco"].load(tmp_path)
    assert (item.id, item.answer) == ("42", ["A cat."])
    assert item.image == tmp_path / "val2014" / "COCO_val2014_000000000042.jpg"
    rows = [{"filename": "COCO_val2014_000000000009.jpg", "sentences": ["A dog.", "Dog."], "imgid": 0}]
    (tmp_path / "coco" / "test.json").write_text(json.dumps(rows))
    assert TASKS["coco"].load(tmp_path, "test")[0].answer == ["A dog.", "Dog."]
    (tmp_path / "flickr30k").mkdir()
    row = {"img_id": "0", "filename": "1000.jpg", "caption": ["A rock ."]}
    (tmp_path / "flickr30k" / "test.jsonl").write_text(json.dumps(row))
    assert TASKS["flickr30k"].load(tmp_path)[0].id == "1000.jpg"
    (tmp_path / "flickr30k" / "test.jsonl").write_text(json.dumps(row | {"caption": [3]}))
    with pytest.raises(InputError, match="line 1: field 'caption' is not a list of captions"):
        TASKS["flickr30k"].load(tmp_path)


def test_load_parquet(tmp_path: Path) -> None:
    """Images inside a parquet file are written out once."""
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    root = tmp_path / "flickr30k"
    root.mkdir()
    rows = [{"image": {"bytes": b"jpeg", "path": None}, "filename": "1.jpg", "caption": ["A rock ."], "img_id": "0"}]
    parquet.write_table(Table.from_pylist(rows), root / "test-00000-of-00001.parquet")
    (item,) = TASKS["flickr30k"].load(tmp_path)
    assert item.image == root / "flickr30k-images" / "1.jpg" and item.image.read_bytes() == b"jpeg"
    item.image.write_bytes(b"mine")
    assert TASKS["flickr30k"].load(tmp_path)[0].image.read_bytes() == b"mine"
    (root / "test-00000-of-00001.parquet").write_bytes(b"PAR?")
    with pytest.raises(InputError, match="not a readable parquet file"):
        TASKS["flickr30k"].load(tmp_path)


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


# ---- prediction files --------------------------------------------------------------------------------------


def results(path: Path, **captions: str) -> Path:
    path.write_text(json.dumps([{"image_id": int(k.lstrip("_")), "caption": v} for k, v in captions.items()]))
    return path


@installed
def test_join_coco(tmp_path: Path) -> None:
    truth = write_coco(tmp_path, IMAGES, NOTES)
    found = captions.join([results(tmp_path / "r.json", _9="dog", _7="cat")], [truth])
    assert [(item.id, answer) for item, answer in zip(found.items, found.answers, strict=True)] == [
        ("7", "cat"),
        ("9", "dog"),
    ]
    part = captions.join([results(tmp_path / "r.json", _9="dog")], [truth], allow_missing=True)
    assert part.answers == ["dog"] and part.absent == 1


@installed
@pytest.mark.parametrize(
    "content, message",
    [
        ([{"image_id": 7, "caption": "x"}], "no prediction for image_id 9 (1 of 2 are missing)"),
        ([{"image_id": i, "caption": "x"} for i in (7, 9, 11)], "image_id 11 is not in the annotations"),
        ([{"image_id": i, "caption": "x"} for i in (7, 9, 7)], "entry 2: image_id 7 occurs twice"),
        ([{"image_id": str(i), "caption": "x"} for i in (7, 9)], "image_id is the text '7'"),
        ([{"image_id": 7.0, "caption": "x"}], "entry 0: field 'image_id' is 7.0, not int or str"),
        ([{"image_id": True, "caption": "x"}], "field 'image_id' is True"),
        ([{"image_id": 7, "caption": None}], "entry 0 (image_id 7): field 'caption' is None, not str"),
        ([{"image_id": 7, "caption": 3}], "field 'caption' is 3, not str"),
        ([{"image_id": 7}], "field 'caption' is missing"),
        ([], "no prediction for image_id 7"),
        ({}, "holds a dict, not a list"),
        (["x"], "entry 0: not a JSON object"),
    ],
)
def test_wrong_results(tmp_path: Path, content: Any, message: str) -> None:
    truth = write_coco(tmp_path, IMAGES, NOTES)
    (tmp_path / "r.json").write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        captions.join([tmp_path / "r.json"], [truth])
    assert message in str(caught.value) and len(str(caught.value).splitlines()) <= 3


@installed
@pytest.mark.parametrize("key", ["101.jpg", 101, "101", 1])
def test_join_flickr(tmp_path: Path, key: Any) -> None:
    """Flickr30k has no official ids: the file name, its number or Karpathy's imgid."""
    truth = write_flickr(tmp_path, karpathy())
    (tmp_path / "r.json").write_text(json.dumps([{"image_id": key, "caption": "a rock"}]))
    found = captions.join([tmp_path / "r.json"], [truth])
    assert found.answers == ["a rock"] and found.items[0].answer == ["A rock in test ."]
    assert captions.join([tmp_path / "r.json"], [truth], None, True).absent == 0
    with pytest.raises(InputError, match="no image of split 'dev'"):
        captions.join([tmp_path / "r.json"], [truth], "dev")


@installed
def test_join_tokens_and_karpathy_coco(tmp_path: Path) -> None:
    (tmp_path / "results.token").write_text(TOKEN_FILE)
    (tmp_path / "ids.txt").write_text("200\n")
    found = captions.join(
        [results(tmp_path / "r.json", _200="cat")], [tmp_path / "results.token", tmp_path / "ids.txt"]
    )
    assert found.items[0].answer == ["A cat ."]
    (tmp_path / "k.json").write_text(json.dumps(karpathy("coco")))
    assert captions.join([results(tmp_path / "r.json", _501="a")], [tmp_path / "k.json"]).items[0].id == "501"
    with pytest.raises(InputError, match="2 files of annotations"):
        captions.join([tmp_path / "r.json"], [tmp_path / "k.json"] * 2)
