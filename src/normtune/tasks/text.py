"""Text-only questions: does the model still do what its LLM could before it learned to see?

Scope: `text/questions.jsonl`, one object {question_id, text, answer} per line, asked without an image and scored
by exact match after normalization. This is normtune's own format, no published benchmark.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normtune.tasks.items import Item, field, mean, paired, read_json_lines, unique


def load(data: Path) -> list[Item]:
    """The questions of `text/questions.jsonl`, without images. InputError for a missing file or a bad line."""
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


def score(items: Sequence[Item], answers: Sequence[str]) -> dict[str, Any]:
    """The headline `score`, 0 to 1, is the share of answers equal to the truth after normalization. Nothing to
    score gives 0.0."""
    right = [normalize(answer) == normalize(item.answer) for item, answer in paired(items, answers)]
    return {"score": mean(right), "rules": "exact match"}
