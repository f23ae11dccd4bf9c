"""What is asked: settings, the questions of each benchmark with the images shown, and what they come to as a hash.

Scope: everything that is known before the model is. Items are kept, requests made when a batch needs them. Not here:
which items and images (`selection`), answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, overload

from normtune.chat import PLACEHOLDER, Turn
from normtune.errors import InputError, did_you_mean
from normtune.evaluation.answering import CHOICES, MODES, Mode
from normtune.evaluation.engines import Request
from normtune.evaluation.selection import BASELINES, Baseline, images_shown, select
from normtune.tasks import RULES, TASKS, Item, Rules, Task

YES_NO = ("pope", "mme")  # benchmarks whose answers can be scored by likelihood


@dataclass(frozen=True)
class Settings:
    """What is asked and how answers are read: what a result depends on beside the model and the files.

    `split` by benchmark, where it is not the usual one. InputError for values that no evaluation could use."""

    benchmarks: tuple[str, ...]
    limit: int | None = None
    split: Mapping[str, str] = field(default_factory=dict)
    baseline: Baseline = "none"
    rules: Rules = "official"
    mode: Mode = "generate"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.benchmarks:
            one_of("benchmark", name, TASKS)
            if self.mode == "likelihood" and name not in YES_NO:
                raise InputError(
                    f"mode likelihood: the answers of {name} are not {' or '.join(CHOICES)}.\n"
                    f"Score {' and '.join(YES_NO)} so, and the others with --mode generate."
                )
        one_of("baseline", self.baseline, BASELINES)
        one_of("rules", self.rules, RULES)
        one_of("mode", self.mode, MODES)
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit is {self.limit}.\nGive 1 or more, or no limit.")
        for name in self.split:
            if name not in self.benchmarks:
                raise InputError(f"split: benchmark '{name}' is not asked.\nAsked are {', '.join(self.benchmarks)}.")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "benchmarks": list(self.benchmarks), "split": dict(self.split)}

    @property
    def name(self) -> str:
        """A file's name: the benchmarks, and what is not as usual."""
        usual = Settings(self.benchmarks)
        parts = [f"{key}-{value}" for key, value in self.split.items()]
        parts += [f"limit{self.limit}"] if self.limit else []
        parts += [
            value for key in ("baseline", "rules", "mode") if (value := getattr(self, key)) != getattr(usual, key)
        ]
        parts += [f"seed{self.seed}"] if self.seed else []
        return "-".join([*self.benchmarks, *parts])


def one_of(what: str, name: str, known: Sequence[str] | Mapping[str, Any]) -> None:
    """InputError unless `name` is one of `known`."""
    if name not in known:
        raise InputError(f"{what} '{name}' is unknown{did_you_mean(name, known)}.\nThere are {', '.join(known)}.")


def splits_of(split: str | Mapping[str, str] | None, benchmarks: Sequence[str]) -> dict[str, str]:
    """By benchmark, from one split for all of them or from text such as "pope=random,coco=val2017"."""
    if split is None or isinstance(split, Mapping):
        return dict(split or {})
    if "=" not in split:
        return dict.fromkeys(benchmarks, split)
    pairs = (part.partition("=") for part in split.split(","))
    return {name.strip(): value.strip() for name, _, value in pairs}


class Asked(Sequence[Request]):
    """The questions of one benchmark and the image that each is shown (None: no image), as requests."""

    def __init__(self, name: str, items: list[Item], images: list[Path | None]) -> None:
        self.name, self.items, self.images = name, items, images

    @property
    def task(self) -> Task:
        return TASKS[self.name]

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, place: int) -> Request: ...
    @overload
    def __getitem__(self, place: slice) -> list[Request]: ...
    def __getitem__(self, place: int | slice) -> Request | list[Request]:
        if isinstance(place, slice):
            return [self[n] for n in range(*place.indices(len(self)))]
        item, image = self.items[place], self.images[place]
        text = item.question if image is None else f"{PLACEHOLDER}\n{item.question}"
        return Request((Turn("user", text),), () if image is None else (image,), f"{self.name}, item '{item.id}'")

    def fingerprint(self) -> str:
        """SHA-256 of ids, prompts, references, strata, and of the names of the images shown (a broken one may be
        replaced before an evaluation goes on)."""
        digest = hashlib.sha256()
        for item, image in zip(self.items, self.images, strict=True):
            record = (item.id, item.question, item.answer, item.group, image and image.name)
            digest.update(json.dumps(record, sort_keys=True, default=str).encode())
        return digest.hexdigest()


def data_folder(data: str | Path) -> Path:
    """The folder of the benchmarks. InputError where there is none."""
    root = Path(data)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder.\nGive the folder that holds the benchmarks' files.")
    return root


def ask(settings: Settings, data: str | Path) -> list[Asked]:
    """The questions of every benchmark below the folder `data`, in the files' order.

    InputError for missing or wrong files, an unknown split and missing images: all are looked at, none is opened."""
    root = data_folder(data)
    asked = []
    for name in dict.fromkeys(settings.benchmarks):
        items = select(TASKS[name].load(root, settings.split.get(name)), settings.limit, settings.seed)
        paths: dict[Path, Path] = {}  # one object per image, however many questions it has
        items = [
            replace(item, image=paths.setdefault(item.image, item.image)) if item.image else item for item in items
        ]
        asked.append(Asked(name, items, images_shown(name, items, settings.baseline, settings.seed)))
    return asked
