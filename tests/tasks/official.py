"""The official programs, and lmms-eval's, as plain loops written from the published rules: oracles for the scorers.

They share no code with normtune and keep the official shape (lists in parallel, pairs by adjacent lines). Where the
official program would stop with a division by zero they do, too.
"""

from __future__ import annotations

import copy
import re
from typing import Any


def pope(answers: list[str], labels: list[str]) -> dict[str, float]:
    """AoiDragon/POPE, evaluate.py."""
    predicted = []
    for text in answers:
        if text.find(".") != -1:
            text = text.split(".")[0]
        words = text.replace(",", "").split(" ")
        predicted.append(0 if "No" in words or "not" in words or "no" in words else 1)
    truth = [0 if label == "no" else 1 for label in labels]
    tp = fp = tn = fn = 0
    for guess, label in zip(predicted, truth, strict=True):
        if guess == 1 and label == 1:
            tp += 1
        elif guess == 1 and label == 0:
            fp += 1
        elif guess == 0 and label == 0:
            tn += 1
        else:
            fn += 1
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    return {
        "accuracy": (tp + tn) / (tp + tn + fp + fn),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall),
        "yes_ratio": predicted.count(1) / len(predicted),
    }


def pope_lmms(answers: list[str], labels: list[str]) -> dict[str, float]:
    """lmms-eval, tasks/pope: an answer is exactly yes or no, or neither; the yes ratio is that of the labels."""
    told = [text.lower().strip() for text in answers]
    both = list(zip(told, labels, strict=True))
    tp, fp = both.count(("yes", "yes")), both.count(("yes", "no"))
    fn = both.count(("no", "yes"))
    precision = tp / (tp + fp) if tp + fp > 0 else 0
    recall = tp / (tp + fn) if tp + fn > 0 else 0
    return {
        "accuracy": sum(a == b for a, b in both) / len(both),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0,
        "yes_ratio": labels.count("yes") / len(labels),
    }


def mme(lines: list[str], lmms: bool = False) -> float:
    """One subtask's score from the lines of a result file; MME's calculation.py. With `lmms` the answers are read as in
    lmms-eval's tasks/mme."""
    pairs = [lines[start : start + 2] for start in range(0, len(lines), 2)]
    right = both = 0
    for pair in pairs:
        marks = 0
        for line in pair:
            _, _, label, answer = line.split("\t")
            label, answer = label.lower(), answer.lower()
            if lmms:
                answer = answer.strip().replace(".", "")
            if answer in ("yes", "no"):
                guess = answer
            elif lmms and len(answer) == 1:
                guess = "yes" if answer == "y" else "no" if answer == "n" else "other"
            elif "yes" in answer[:4]:
                guess = "yes"
            elif "no" in answer[:4]:
                guess = "no"
            else:
                guess = "other"
            marks += guess == label
        right += marks
        both += marks == 2
    return 100 * right / (2 * len(pairs)) + 100 * both / len(pairs)


_MARKS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_NUMBER_OF = {"none": "0", **{word: str(value) for value, word in enumerate(_NUMBERS)}}
_CONTRACTIONS = {"dont": "don't", "cant": "can't", "wont": "won't", "isnt": "isn't", "hes": "he's", "oclock": "o'clock"}


def _punctuation(text: str) -> str:
    out = text
    for mark in _MARKS:
        if mark + " " in text or " " + mark in text or re.search(r"(\d)(,)(\d)", text) is not None:
            out = out.replace(mark, "")
        else:
            out = out.replace(mark, " ")
    return re.sub(r"(?!<=\d)(\.)(?!\d)", "", out, count=32)


def _words(text: str) -> str:
    out = []
    for word in text.lower().split():
        word = _NUMBER_OF.get(word, word)
        if word not in ("a", "an", "the"):
            out.append(_CONTRACTIONS.get(word, word))
    return " ".join(out)


def vqa(prediction: str, human: list[dict[str, Any]], always: bool = False) -> float:
    """GT-Vision-Lab/VQA, vqaEval.py, one question; `always` normalizes as lmms-eval does since its PR 794."""
    human = copy.deepcopy(human)
    prediction = prediction.replace("\n", " ").replace("\t", " ").strip()
    for answer in human:
        answer["answer"] = answer["answer"].replace("\n", " ").replace("\t", " ").strip()
    if always or len({answer["answer"] for answer in human}) > 1:
        for answer in human:
            answer["answer"] = _words(_punctuation(answer["answer"]))
        prediction = _words(_punctuation(prediction))
    marks = []
    for answer in human:
        others = [other for other in human if other != answer]
        matching = [other for other in others if other["answer"] == prediction]
        marks.append(min(1, len(matching) / 3))
    return sum(marks) / len(marks)
