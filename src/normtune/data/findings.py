"""What a look through the data found: counts, the first few of each kind, and how long samples are.

Scope: plain records that are added up, and the words for what is wrong. Non-scope: finding it (checking.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

FIRST = 5  # of each kind that are named

KINDS = (  # what a reason says -> what kind of fault that is; the first that fits
    ("no valid JSON", "no JSON"),
    ("no usable JSON", "no JSON"),
    ("not UTF-8", "no JSON"),
    ("there is no image", "missing image"),
    ("leads out of the images folder", "image outside its folder"),
    ("is no file: download", "image is an address"),
    ("names no folder", "no images folder"),
    ("is no text: half", "missing image"),
    ("than images:", "<image> and images do not match"),
    ("image tokens", "<image> and images do not match"),
    ("stands in the", "<image> in an answer"),
    ("has more than", "huge image"),
    ("is larger than", "huge image"),
    ("cannot be read:", "broken image"),
    ("unknown role", "unknown role"),
    ("(assistant): its text is empty", "empty answer"),
    ("its text is empty", "empty question"),
    ("expected the", "turns out of order"),
    ("its last turn", "turns out of order"),
)
"""The rest is "malformed"."""
DROPPED = "nothing to learn"
NOTES = ("duplicate", "image of the evaluation", "animated image", "longer than the limit", "image cut off")
"""What does not make a sample unusable."""


def kind_of(reason: str) -> str:
    return next((kind for words, kind in KINDS if words in reason), "malformed")


@dataclass
class Findings:
    """What was found in the data of a stage.

    Attributes:
        stage, max_length: of the recipe.
        entries: all that a file says are samples; `bad` of them cannot be trained on.
        images: distinct ones that were opened.
        tokens, supervised: of the samples as they are trained on; `full` before anything was cut.
        lengths: how many samples have so many tokens before cutting, by powers of two: 64 -> those of 33 to 64.
        cut: turns, tokens, images and samples that `max_length` cuts off.
        faults, notes: kind -> how many samples; what makes a sample unusable, and what does not.
        first: kind -> the first FIRST of them, as (which sample, why).
        named: every unusable sample, by where it stands -> its kind.
        unreadable: files of which the rest cannot be read, or from which nothing is left, as (file, why).
    """

    stage: str
    max_length: int
    entries: int = 0
    bad: int = 0
    images: int = 0
    tokens: int = 0
    supervised: int = 0
    full: int = 0
    longest: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    def fault(self, kind: str, where: str, why: str) -> None:
        self.bad += 1
        self.faults[kind] += 1
        self.named[where] = kind
        self._name(kind, where, why)

    def note(self, kind: str, where: str, why: str) -> None:
        self.notes[kind] += 1
        self._name(kind, where, why)

    def length(self, tokens: int) -> None:
        self.full += tokens
        self.longest = max(self.longest, tokens)
        self.lengths[1 << max(0, tokens - 1).bit_length()] += 1

    def _name(self, kind: str, where: str, why: str) -> None:
        first = self.first.setdefault(kind, [])
        if len(first) < FIRST:
            first.append((where, why))

    def document(self) -> dict[str, Any]:
        """All of it for JSON."""
        return {
            "stage": self.stage,
            "max_length": self.max_length,
            "entries": self.entries,
            "bad": self.bad,
            "images": self.images,
            "tokens": self.tokens,
            "supervised": self.supervised,
            "longest": self.longest,
            "lengths": {str(top): self.lengths[top] for top in sorted(self.lengths)},
            "cut": dict(self.cut),
            "faults": dict(self.faults),
            "notes": dict(self.notes),
            "first": {kind: [{"what": w, "why": why} for w, why in named] for kind, named in self.first.items()},
            "unreadable": [{"what": what, "why": why} for what, why in self.unreadable],
        }


def judge(found: Sequence[Findings], most: int | float) -> str:
    """What a training on these stages would come to, "" where it would run.

    Args:
        most: of the samples of all stages that may be bad: a number (int) or a share (float). As in a training
            (skipping.py), one of a file that several stages read counts once.
    """
    allowed = most if isinstance(most, int) else int(most * sum(one.entries for one in found))
    named = {where: kind for one in found for where, kind in one.named.items()}
    stopping = sum(kind != DROPPED for kind in named.values())  # the others it reads, and learns nothing
    if stopping > allowed or any(one.unreadable or one.bad == one.entries for one in found):
        return "a training would stop"
    return "that is too many" if len(named) > allowed else ""
