"""POPE: does the model see objects that are not there? Yes/no questions in up to three splits.

Scope: the official files `pope/coco_pope_{random,popular,adversarial}.json` (JSON Lines; both published versions,
3,000 questions a split or 2,910 in `random`), LLaVA's `pope/llava_pope_test.jsonl` beside them, and rows of the
Hugging Face data set; images in `val2014/`. Two rules: `official` reads every answer as yes or no; under `lmms-eval`
an answer that is not exactly one of the two is neither. Reading prediction files is `pope_predictions`'. Source:
AoiDragon/POPE, `evaluate.py`; Li et al., arXiv 2305.10355; lmms-eval, `tasks/pope/utils.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from normtune.errors import InputError
from normtune.tasks.bootstrap import Statistics, share
from normtune.tasks.files import (
    field,
    first_existing,
    read_json_lines,
    read_rows,
    row_files,
    stored_image,
    unique,
    within,
)
from normtune.tasks.items import Item, Measured, Rules, check_rules, chosen, paired

SPLITS = ("random", "popular", "adversarial")
PROMPT = "{question}\nAnswer the question using a single word or phrase."
_OUTCOMES = ("yes yes", "yes no", "no no", "no yes", "other yes", "other no")  # answer, label


def load(data: Path, split: str | None = None) -> list[Item]:
    """The questions of every split there is, or of `split`; `group` = split, id = "SPLIT/QUESTION_ID" (the official
    files all count from 1). LLaVA's file, where there is one, gives the questions and the official files the labels.
    InputError when there is no file or no such split, or for a bad line."""
    root = data / "pope"
    labels = {
        name: first_existing(*(root / place / f"coco_pope_{name}.json" for place in ("", "coco"))) for name in SPLITS
    }
    labels = {name: path for name, path in labels.items() if path.exists()}
    rows = row_files(root, ("test", *SPLITS))
    if labels:
        items = [item for name, path in labels.items() for item in read_labels(path, name, data / "val2014")]
        if (root / "llava_pope_test.jsonl").exists():
            items = _llava(root / "llava_pope_test.jsonl", items, split)
    elif rows:
        items = [item for name, files in rows.items() for path in files for item in _rows(path, name, data)]
        unique(items, root)
    else:
        raise InputError(
            f"{root}: no coco_pope_random.json, coco_pope_popular.json or coco_pope_adversarial.json.\n"
            "Copy them from output/coco of the POPE repository."
        )
    return chosen(items, split, root)


def read_labels(path: Path, split: str, images: Path = Path()) -> list[Item]:
    """The questions of one official file. InputError for a bad line or an id that occurs twice."""
    items = [
        Item(
            id=f"{split}/{field(record, 'question_id', (int, str), where)}",
            image=within(images, field(record, "image", str, where), where),
            question=field(record, "text", str, where),
            answer=_label(field(record, "label", str, where), where),
            group=split,
        )
        for where, record in read_json_lines(path)
    ]
    return unique(items, path)


def _label(text: str, where: str) -> str:
    label = text.strip().lower()
    if label not in ("yes", "no"):
        raise InputError(f"{where}: label is '{label:.40}', not 'yes' or 'no'.\nCorrect the label.")
    return label


def wording(question: str) -> str:
    """A question without LLaVA's request for one word and without the typo of the first published version."""
    return question.strip().removesuffix(PROMPT.removeprefix("{question}\n")).strip().replace("imange", "image")


def _llava(path: Path, labelled: list[Item], asked: str | None) -> list[Item]:
    """LLaVA's questions with the official labels, joined by category and order: the ids of the files differ. Every
    labelled split, or the one that is `asked`, must be there."""
    waiting = {split: [item for item in labelled if item.group == split] for split in SPLITS}
    used = dict.fromkeys(SPLITS, 0)
    items = []
    for where, record in read_json_lines(path):
        split = field(record, "category", str, where)
        if not waiting.get(split):
            raise InputError(f"{where}: category '{split:.40}' has no file coco_pope_{split:.40}.json.\nPut it there.")
        text = field(record, "text", str, where)
        own = waiting[split][min(used[split], len(waiting[split]) - 1)]
        image = field(record, "image", str, where)
        used[split] += 1
        same = own.image is not None and own.image.name == image and wording(text) == wording(own.question)
        if used[split] > len(waiting[split]) or not same:
            raise InputError(
                f"{where}: question {used[split]} of '{split}', '{wording(text):.60}' about {image}, "
                "is not the label file's.\n"
                "Use the label files of the version that LLaVA's questions were made from (e3e3926)."
            )
        key = f"{split}/{field(record, 'question_id', (int, str), where)}"
        items.append(Item(key, own.image, text, own.answer, split))
    short = next((s for s in SPLITS if asked in (None, s) and used[s] != len(waiting[s])), None)
    if short:
        raise InputError(
            f"{path}: {used[short]} questions of '{short}' for {len(waiting[short])} labels.\nUse matching files."
        )
    return unique(items, path)


def _rows(path: Path, name: str, data: Path) -> list[Item]:
    """Rows of the Hugging Face data set; `name` is the split where a row has no category."""
    items = []
    for where, row in read_rows(path):
        split = row.get("category") or name
        source = row.get("image_source") or row.get("image")
        key = field(row, "question_id", (int, str), where)
        image = source if isinstance(source, str) else f"{split}-{key}"
        image += "" if Path(image).suffix else ".jpg"
        items.append(
            Item(
                id=f"{split}/{key}",
                image=stored_image(row, image, (data / "val2014", data / "pope" / "images"), where),
                question=PROMPT.format(question=field(row, "question", str, where).strip()),
                answer=_label(field(row, "answer", str, where), where),
                group=split,
            )
        )
    return items


def parse(answer: str, rules: Rules = "official") -> str:
    """The official reading: "no" if the text before the first full stop, without commas and split at blanks, has a
    token `No`, `not` or `no`; everything else, the empty answer too, is "yes". lmms-eval's: exactly yes or no after
    lower-casing and stripping; else "other"."""
    if rules == "lmms-eval":
        word = answer.lower().strip()
        return word if word in ("yes", "no") else "other"
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def measure(items: Sequence[Item], answers: Sequence[str], rules: Rules = "official") -> Measured:
    """Accuracy, precision, recall, F1, yes ratio and the number of `other` answers of each split present, with yes as
    the positive class; `mean_f1` (and `f1`, the same) is the mean F1 of the splits, `score` their mean accuracy. A
    precision, recall or F1 whose denominator is 0 is 0.0; the official program stops there. lmms-eval takes the yes
    ratio from the labels and adds all splits as one, `pooled`, whose accuracy is then the `score`."""
    check_rules(rules)
    splits = list(dict.fromkeys(item.group for item in items))
    width = len(_OUTCOMES)
    rows = np.zeros((len(items), len(splits) * width))
    for place, (item, answer) in enumerate(paired(items, answers)):
        outcome = _OUTCOMES.index(f"{parse(answer, rules)} {item.answer}")
        rows[place, splits.index(item.group) * width + outcome] = 1

    def figures(totals: np.ndarray) -> dict[str, np.ndarray]:
        counts = totals.reshape(len(totals), len(splits), width)
        named = {name: _metrics(counts[:, place], rules) for place, name in enumerate(splits)}
        found = {f"{name}.{metric}": value for name, part in named.items() for metric, value in part.items()}
        pooled = _metrics(counts.sum(axis=1), rules)
        zero = np.zeros(len(totals))
        found["mean_f1"] = sum((part["f1"] for part in named.values()), zero) / max(1, len(splits))
        mean_accuracy = sum((part["accuracy"] for part in named.values()), zero) / max(1, len(splits))
        found["score"] = pooled["accuracy"] if rules == "lmms-eval" else mean_accuracy
        return found | ({f"pooled.{k}": v for k, v in pooled.items()} if rules == "lmms-eval" else {})

    statistics = Statistics.gather([i.unit for i in items], [""] * len(items), rows, rows.shape[1], figures)
    totals = statistics.totals()
    counts = rows.sum(axis=0).reshape(len(splits), width)
    scores: dict[str, Any] = {"score": totals["score"], "mean_f1": totals["mean_f1"], "f1": totals["mean_f1"]}
    scores["splits"] = {
        name: _named(totals, name) | {"other": int(own[4:].sum()), "n": int(own.sum())}
        for name, own in zip(splits, counts, strict=True)
    }
    if rules == "lmms-eval":
        scores["pooled"] = _named(totals, "pooled")
    return Measured({**scores, "rules": rules}, statistics)


def _named(totals: dict[str, float], name: str) -> dict[str, Any]:
    return {key.removeprefix(f"{name}."): value for key, value in totals.items() if key.startswith(f"{name}.")}


def _metrics(counts: np.ndarray, rules: Rules) -> dict[str, np.ndarray]:
    """Figures from counts of outcomes [R, 6]."""
    tp, fp, tn, fn, other_yes, _ = counts.T
    total = counts.sum(axis=1)
    precision, recall = share(tp, tp + fp), share(tp, tp + fn)
    said_yes = tp + fn + other_yes if rules == "lmms-eval" else tp + fp
    return {
        "accuracy": share(tp + tn, total),
        "precision": precision,
        "recall": recall,
        "f1": share(2 * precision * recall, precision + recall),
        "yes_ratio": share(said_yes, total),
    }
