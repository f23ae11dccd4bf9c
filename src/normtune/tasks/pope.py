"""POPE: does the model see objects that are not there? Yes/no questions in up to three splits.

Scope: the official files `pope/coco_pope_{random,popular,adversarial}.json` (JSON Lines) with images in
`val2014/`, the official parser of answers and the official metrics. Both published versions of the files
load (3,000 questions a split, or 2,910 in `random`). Not here: LLaVA's variant of the question file.
Source: AoiDragon/POPE, `evaluate.py`; Li et al., arXiv 2305.10355.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normtune.errors import InputError
from normtune.tasks.items import Item, field, mean, paired, ratio, read_json_lines, unique

SPLITS = ("random", "popular", "adversarial")


def load(data: Path) -> list[Item]:
    """The questions of every split file present, `group` = split, id = "SPLIT/QUESTION_ID" (the files all
    count from 1). InputError when there is no file, or for a bad line."""
    files = {split: data / "pope" / f"coco_pope_{split}.json" for split in SPLITS}
    present = {split: path for split, path in files.items() if path.exists()}
    if not present:
        raise InputError(
            f"{data / 'pope'}: no coco_pope_random.json, coco_pope_popular.json or coco_pope_adversarial.json.\n"
            "Copy them from output/coco of the POPE repository."
        )
    items: list[Item] = []
    for split, path in present.items():
        items += unique([_item(data, split, where, record) for where, record in read_json_lines(path)], path)
    return items


def _item(data: Path, split: str, where: str, record: dict[str, Any]) -> Item:
    label = field(record, "label", str, where).strip().lower()
    if label not in ("yes", "no"):
        raise InputError(f"{where}: label is '{label:.40}', not 'yes' or 'no'.\nCorrect the label.")
    return Item(
        id=f"{split}/{field(record, 'question_id', (int, str), where)}",
        image=data / "val2014" / field(record, "image", str, where),
        question=field(record, "text", str, where),
        answer=label,
        group=split,
    )


def parse(answer: str) -> str:
    """The official reading: "no" if the text before the first full stop, without commas and split at
    blanks, has a token `No`, `not` or `no`; everything else, the empty answer too, is "yes"."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def score(items: Sequence[Item], answers: Sequence[str]) -> dict[str, Any]:
    """Accuracy, precision, recall, F1 and yes ratio of each split present, all 0 to 1, with yes as the
    positive class; `score` is the mean accuracy and `f1` the mean F1 of the splits. A precision, recall or F1
    whose denominator is 0 (the model never says yes) is 0.0; the official program stops there."""
    outcomes: dict[str, Counter[tuple[str, str]]] = {}
    for item, answer in paired(items, answers):
        outcomes.setdefault(item.group, Counter())[parse(answer), item.answer] += 1
    splits = {split: _metrics(counts) for split, counts in outcomes.items()}
    return {
        "score": mean([split["accuracy"] for split in splits.values()]),
        "f1": mean([split["f1"] for split in splits.values()]),
        "splits": splits,
        "rules": "official",
    }


def _metrics(counts: Counter[tuple[str, str]]) -> dict[str, float]:
    """Figures of one split from counts of (answer, label)."""
    tp, fp = counts["yes", "yes"], counts["yes", "no"]
    tn, fn = counts["no", "no"], counts["no", "yes"]
    precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
    total = tp + fp + tn + fn
    return {
        "accuracy": ratio(tp + tn, total),
        "precision": precision,
        "recall": recall,
        "f1": ratio(2 * precision * recall, precision + recall),
        "yes_ratio": ratio(tp + fp, total),
        "n": total,
    }
