"""VQAv2: open questions with ten human answers each, scored by agreement with the humans.

Scope: the official files `vqav2/v2_OpenEnded_mscoco_SPLIT_questions.json` and
`vqav2/v2_mscoco_SPLIT_annotations.json` (the test splits have no annotations, so answers can be given and not
scored), rows of the Hugging Face data set, and the official results files; the prompt of LLaVA; the official
normalization and accuracy to the letter, oddities included. The rules `lmms-eval` normalize always, not only where
the humans differ. Source: GT-Vision-Lab/VQA, `vqaEval.py`; Goyal et al., arXiv 1612.00837; lmms-eval,
`tasks/vqav2/utils.py`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from normtune.errors import InputError
from normtune.tasks.bootstrap import Statistics, share
from normtune.tasks.files import (
    add_prediction,
    field,
    first_existing,
    read_json,
    read_list,
    read_rows,
    row_files,
    single,
    stored_image,
    unique,
)
from normtune.tasks.items import Item, Joined, Measured, Rules, check_rules, joined, no_split, paired

PROMPT = "{question}\nAnswer the question using a single word or phrase."
SPLITS = ("val2014", "train2014", "test-dev2015", "test2015")

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = {"a", "an", "the"}
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(value) for value, word in enumerate(_WORDS)}

# The official table restores apostrophes: its keys are these words with any one apostrophe left out.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
    he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
    must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
    something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas
    wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've
    who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd
    you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, letter in enumerate(word)
    if letter == "'"
}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # the official table's own slip


def load(data: Path, split: str | None = None) -> list[Item]:
    """The questions of `split` (by default val2014, or the one that is there), joined to their annotations by
    question id. `answer` is the annotation: `answers` (the official list of objects), `question_type`, `answer_type`;
    None on the test splits. InputError when a file is missing or malformed, or when the ids of the two files are not
    the same set."""
    root = data / "vqav2"
    rows = row_files(root, ("validation", "testdev", "test"))
    present = [name for name in SPLITS if _questions(root, name).exists()]
    name = split or next(iter([*present, *rows]), SPLITS[0])
    if name in rows and name not in present:
        return unique([item for path in rows[name] for item in _rows(path, name, data)], root)
    if name not in SPLITS or (present and name not in present):
        raise no_split(name, [*present, *rows] or SPLITS, root)
    path = _questions(root, name)
    truth_path = first_existing(*(root / place / f"v2_mscoco_{name}_annotations.json" for place in ("", "Annotations")))
    annotations = None if name.startswith("test") else read_annotations(truth_path)
    images = "test2015" if name.startswith("test") else name
    items = []
    for place, record in enumerate(field(read_json(path), "questions", list, str(path))):
        where = f"{path}, question {place}"
        key = field(record, "question_id", (int, str), where)
        if annotations is not None and key not in annotations:
            raise InputError(f"{where}: question_id {key} has no annotation in {truth_path.name}.\nUse matching files.")
        image = data / images / f"COCO_{images}_{field(record, 'image_id', int, where):012d}.jpg"
        question = PROMPT.format(question=field(record, "question", str, where))
        items.append(Item(str(key), image, question, annotations and annotations[key]))
    unique(items, path)
    if annotations is not None and len(items) != len(annotations):
        asked = {item.id for item in items}
        spare = next(key for key in annotations if str(key) not in asked)
        raise InputError(f"{truth_path}: question_id {spare} is not in {path.name}.\nUse matching files.")
    return items


def _questions(root: Path, split: str) -> Path:
    name = f"v2_OpenEnded_mscoco_{split}_questions.json"
    return first_existing(root / name, root / "Questions" / name)


def read_annotations(path: Path) -> dict[int | str, dict[str, Any]]:
    """The official annotations by question id: `answers`, `question_type`, `answer_type` and `image_id` where given.
    InputError for a malformed file or an id that occurs twice."""
    annotations: dict[int | str, dict[str, Any]] = {}
    for place, record in enumerate(field(read_json(path), "annotations", list, str(path))):
        where = f"{path}, annotation {place}"
        key = field(record, "question_id", (int, str), where)
        if key in annotations:
            raise InputError(f"{where}: question_id {key} occurs twice.\nRemove one of the two annotations.")
        annotations[key] = _annotation(record, f"{where} (question_id {key})")
    return annotations


def _annotation(record: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields that scoring needs, checked."""
    answers = field(record, "answers", list, where)
    if not answers:
        raise InputError(f"{where}: no human answers.\nUse the official annotation file.")
    for place, answer in enumerate(answers):
        field(answer, "answer", str, f"{where}, answer {place}")
    return {
        "answers": answers,
        "question_type": field(record, "question_type", str, where),
        "answer_type": field(record, "answer_type", str, where),
        **({"image_id": record["image_id"]} if "image_id" in record else {}),
    }


def _rows(path: Path, name: str, data: Path) -> Iterator[Item]:
    """Rows of the Hugging Face data set: an annotation with its question and image."""
    images = {"validation": "val2014"}.get(name, "test2015")
    for where, row in read_rows(path):
        file = f"COCO_{images}_{field(row, 'image_id', int, where):012d}.jpg"
        image = stored_image(row, file, (data / images, data / "vqav2" / "images"), where)
        question = PROMPT.format(question=field(row, "question", str, where))
        answer = _annotation(row, where) if row.get("answers") else None
        yield Item(str(field(row, "question_id", (int, str), where)), image, question, answer)


def join(
    predictions: Sequence[Path], annotations: Sequence[Path], split: str | None = None, allow_missing: bool = False
) -> Joined:
    """An official results file, a list of {question_id: int, answer: str}, joined to an official annotation file.
    InputError for missing, extra or repeated ids, and for ids or answers of another type."""
    if split is not None:
        raise InputError("VQAv2 has one split per annotation file.\nGive the file of that split, without --split.")
    path = single(predictions, "predictions")
    truth = read_annotations(single(annotations, "annotations"))
    kinds = tuple({type(key) for key in truth}) or int  # official ids are numbers
    given: dict[Any, str] = {}
    for where, record in read_list(path):
        key = field(record, "question_id", kinds, where)
        add_prediction(given, key, field(record, "answer", str, f"{where} (question_id {key})"), "question_id", where)
    items = [
        Item(str(key), Path(str(entry["image_id"])) if "image_id" in entry else None, "", entry)
        for key, entry in truth.items()
    ]
    return joined(items, given, list(truth), path, by="question_id", allow_missing=allow_missing)


def truth(item: Item) -> list[str]:
    """The human answers, as written; none on the test splits."""
    return [answer["answer"] for answer in item.answer["answers"]] if item.answer else []


def strip_punctuation(text: str) -> str:
    """The official `processPunctuation`: each mark is deleted if it stands next to a blank anywhere in
    `text`, or if `text` has digit-comma-digit; else it becomes a blank. Then a full stop not followed by a
    digit is deleted, 32 times at most (officially a flag of value 32 is passed as the count)."""
    number = re.search(r"\d,\d", text) is not None
    table = {ord(p): "" if number or f"{p} " in text or f" {p}" in text else " " for p in _PUNCTUATION if p in text}
    return re.sub(r"\.(?!\d)", "", text.translate(table) if table else text, count=32)


def plain_words(text: str) -> str:
    """The official `processDigitArticle`: lower case, number words as digits, no articles, contractions
    with their apostrophes, single blanks."""
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


@functools.lru_cache(maxsize=65536)
def normalize(text: str) -> str:
    """Punctuation, then words, in the official order. The answer "A" becomes ""."""
    return plain_words(strip_punctuation(text))


def accuracy(prediction: str, answers: Sequence[dict[str, Any]], rules: Rules = "official") -> float:
    """The official accuracy, 0 to 1. For each human answer, the others are those whose whole object differs;
    min(1, matches among the others / 3), averaged. Normalization happens only when the stripped human answers
    are not all equal; under lmms-eval's rules always. One annotator, or equal answers without `answer_id`, give 0."""
    texts = [_one_line(answer["answer"]) for answer in answers]
    guess = _one_line(prediction)
    if rules == "lmms-eval" or len(set(texts)) > 1:
        guess, texts = normalize(guess), [normalize(text) for text in texts]
    matching = [{**answer, "answer": guess} for answer, text in zip(answers, texts, strict=True) if text == guess]
    # a human whose answer is another one sees all matches; one that matches sees those whose object differs
    own = iter(matching)
    seen = [len(matching) - (matching.count(next(own)) if text == guess else 0) for text in texts]
    # added up in the official order: in another one the last bits, and so a rounded percentage, may differ
    return sum(min(1.0, count / 3) for count in seen) / len(seen)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def measure(items: Sequence[Item], answers: Sequence[str], rules: Rules = "official") -> Measured:
    """`overall`, `per_answer_type` and `per_question_type` in percent, rounded to two decimals as the official
    program does; the headline `score` is overall / 100. Nothing to score gives 0.0; on the test splits, whose answers
    are not public, `score` is None."""
    check_rules(rules)
    pairs = [(item, answer) for item, answer in paired(items, answers) if item.answer is not None]
    marks = [accuracy(answer, item.answer["answers"], rules) for item, answer in pairs]
    kinds = sorted({item.answer["answer_type"] for item, _ in pairs})
    rows = np.zeros((len(pairs), 1 + len(kinds), 2))  # accuracy, questions
    for place, ((item, _), mark) in enumerate(zip(pairs, marks, strict=True)):
        rows[place, [0, 1 + kinds.index(item.answer["answer_type"])]] = (mark, 1)

    def figures(totals: np.ndarray) -> dict[str, np.ndarray]:
        sums, counts = np.moveaxis(totals.reshape(len(totals), 1 + len(kinds), 2), 2, 0)
        percent = 100 * share(sums, counts)
        found = {f"per_answer_type.{kind}": percent[:, 1 + place] for place, kind in enumerate(kinds)}
        return {"overall": percent[:, 0], "score": percent[:, 0] / 100} | found

    units = [item.unit for item, _ in pairs]
    statistics = Statistics.gather(units, [""] * len(pairs), rows, 2 + 2 * len(kinds), figures)
    overall = _percent(marks)
    scores: dict[str, Any] = {"score": overall / 100, "overall": overall}
    for name, kind in (("per_answer_type", "answer_type"), ("per_question_type", "question_type")):
        groups: dict[str, list[float]] = {}
        for (item, _), mark in zip(pairs, marks, strict=True):
            groups.setdefault(item.answer[kind], []).append(mark)
        scores[name] = {key: _percent(values) for key, values in sorted(groups.items())}
    if items and not pairs:
        scores |= {"score": None, "overall": None, "note": "the answers of the test splits are not public"}
    return Measured({**scores, "rules": rules}, statistics)


def _percent(marks: Sequence[float]) -> float:
    """The official rounding: 100 times the sum over the number, 100 times first. 0 for no question."""
    return round(100 * float(sum(marks)) / len(marks), 2) if marks else 0.0
