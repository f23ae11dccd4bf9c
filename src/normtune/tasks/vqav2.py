"""VQAv2: open questions with ten human answers each, scored by agreement with the humans.

Scope: the official validation files `vqav2/v2_OpenEnded_mscoco_val2014_questions.json` and
`vqav2/v2_mscoco_val2014_annotations.json` with images in `val2014/`, the prompt of LLaVA, and the official
normalization and accuracy to the letter, oddities included. Not here: the test splits, whose answers are
not public.
Source: GT-Vision-Lab/VQA, `vqaEval.py`; Goyal et al., arXiv 1612.00837.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normtune.errors import InputError
from normtune.tasks.items import Item, field, mean, paired, read_json, unique

PROMPT = "{question}\nAnswer the question using a single word or phrase."

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


def load(data: Path) -> list[Item]:
    """The validation questions, joined to their annotations by question id. `answer` is the annotation:
    `answers` (the official list of objects), `question_type`, `answer_type`. InputError when a file is missing or
    malformed, or when the ids of the two files are not the same set."""
    path = data / "vqav2" / "v2_OpenEnded_mscoco_val2014_questions.json"
    truth_path = data / "vqav2" / "v2_mscoco_val2014_annotations.json"
    annotations: dict[int | str, dict[str, Any]] = {}
    for place, record in enumerate(field(read_json(truth_path), "annotations", list, str(truth_path))):
        where = f"{truth_path}, annotation {place}"
        key = field(record, "question_id", (int, str), where)
        if key in annotations:
            raise InputError(f"{where}: question_id {key} occurs twice.\nRemove one of the two annotations.")
        annotations[key] = _annotation(record, f"{where} (question_id {key})")
    items = []
    for place, record in enumerate(field(read_json(path), "questions", list, str(path))):
        where = f"{path}, question {place}"
        key = field(record, "question_id", (int, str), where)
        if key not in annotations:
            raise InputError(f"{where}: question_id {key} has no annotation in {truth_path.name}.\nUse matching files.")
        image = data / "val2014" / f"COCO_val2014_{field(record, 'image_id', int, where):012d}.jpg"
        question = PROMPT.format(question=field(record, "question", str, where))
        items.append(Item(str(key), image, question, annotations[key]))
    unique(items, path)
    if len(items) != len(annotations):
        asked = {item.id for item in items}
        spare = next(key for key in annotations if str(key) not in asked)
        raise InputError(f"{truth_path}: question_id {spare} is not in {path.name}.\nUse matching files.")
    return items


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
    }


def truth(item: Item) -> list[str]:
    """The human answers, as written."""
    return [answer["answer"] for answer in item.answer["answers"]]


def strip_punctuation(text: str) -> str:
    """The official `processPunctuation`: each mark is deleted if it stands next to a blank anywhere in
    `text`, or if `text` has digit-comma-digit; else it becomes a blank. Then a full stop not followed by a
    digit is deleted, 32 times at most (officially a flag of value 32 is passed as the count)."""
    number = re.search(r"\d,\d", text) is not None
    table = {ord(p): "" if number or f"{p} " in text or f" {p}" in text else " " for p in _PUNCTUATION}
    return re.sub(r"\.(?!\d)", "", text.translate(table), count=32)


def plain_words(text: str) -> str:
    """The official `processDigitArticle`: lower case, number words as digits, no articles, contractions
    with their apostrophes, single blanks."""
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalize(text: str) -> str:
    """Punctuation, then words, in the official order. The answer "A" becomes ""."""
    return plain_words(strip_punctuation(text))


def accuracy(prediction: str, answers: Sequence[dict[str, Any]]) -> float:
    """The official accuracy, 0 to 1. For each human answer, the others are those whose whole object differs;
    min(1, matches among the others / 3), averaged. Normalization happens only when the stripped human answers
    are not all equal. One annotator, or equal answers without `answer_id`, give 0."""
    humans = [{**answer, "answer": _one_line(answer["answer"])} for answer in answers]
    guess = _one_line(prediction)
    if len({human["answer"] for human in humans}) > 1:
        guess = normalize(guess)
        humans = [{**human, "answer": normalize(human["answer"])} for human in humans]
    matching = [human for human in humans if human["answer"] == guess]
    return mean([min(1.0, (len(matching) - matching.count(human)) / 3) for human in humans])


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def score(items: Sequence[Item], answers: Sequence[str]) -> dict[str, Any]:
    """`overall`, `per_answer_type` and `per_question_type` in percent, rounded to two decimals as the official
    program does; the headline `score` is overall / 100. Nothing to score gives 0.0."""
    marks: list[float] = []
    by_answer: dict[str, list[float]] = {}
    by_question: dict[str, list[float]] = {}
    for item, answer in paired(items, answers):
        mark = accuracy(answer, item.answer["answers"])
        marks.append(mark)
        by_answer.setdefault(item.answer["answer_type"], []).append(mark)
        by_question.setdefault(item.answer["question_type"], []).append(mark)
    overall = _percent(marks)
    return {
        "score": overall / 100,
        "overall": overall,
        "per_answer_type": {name: _percent(values) for name, values in sorted(by_answer.items())},
        "per_question_type": {name: _percent(values) for name, values in sorted(by_question.items())},
        "rules": "official",
    }


def _percent(marks: Sequence[float]) -> float:
    return round(100 * mean(marks), 2)
