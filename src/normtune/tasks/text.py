"""Text-only questions: does the model still do what its LLM could before it learned to see?

Scope: `text/questions.jsonl`, one object {question_id, text, answer} per line, asked without an image and scored
by exact match after normalization. This is normtune's own format, no published benchmark.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from normtune.errors import InputError
from normtune.tasks.bootstrap import Statistics, share
from normtune.tasks.files import field, read_json_lines, unique
from normtune.tasks.items import Item, Measured, Rules, paired


def load(data: Path, split: str | None = None) -> list[Item]:
    """The questions of `text/questions.jsonl`, without images. InputError for a missing file, a bad line or a split."""
    if split is not None:
        raise InputError(f"text: no split '{split}'.\nThe text questions have none.")
    path = data / "text" / "questions.jsonl"
    items = [
        Item(
            id=str(field(record, "question_id", (int, str), where)),
            image=None,
            question=field(record, "text", str, where),
            answer=field(record, "answer", str, where),
        )
        for where, record in read_json_lines(path)
    ]
    return unique(items, path)


def normalize(text: str) -> str:
    """Lower case, punctuation as blanks, no articles, single blanks."""
    words = re.sub(r"[^\w\s]|_", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def measure(items: Sequence[Item], answers: Sequence[str], rules: Rules = "official") -> Measured:
    """The headline `score`, 0 to 1, is the share of answers equal to the truth after normalization, whatever the
    rules. Nothing to score gives 0.0."""
    right = [[normalize(answer) == normalize(item.answer), 1] for item, answer in paired(items, answers)]

    def figures(totals: np.ndarray) -> dict[str, np.ndarray]:
        return {"score": share(totals[:, 0], totals[:, 1])}

    statistics = Statistics.gather([item.unit for item in items], [""] * len(right), right, 2, figures)
    return Measured({**statistics.totals(), "rules": "exact match"}, statistics)
