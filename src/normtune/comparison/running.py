"""A comparison's folder: the same start for all, cells for variants and seeds, and what is finished stays finished.

Layout: `recipe.yaml`, `stage1/KEY` (a run for each different first stage), `cells/VARIANT/seed-N` (runs), `base`,
and the report. Not here: which variants there are (`variants`, `kinds`, `sweeps`), what they come to (`results`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from normtune.checkpoint import check_same, finished_first_stage
from normtune.comparison.cells import Cell, Exam
from normtune.comparison.engines import Engine, run_cells
from normtune.comparison.variants import Variant, evaluated
from normtune.data import Mixture
from normtune.data.skipping import policy
from normtune.errors import InputError, JobError
from normtune.evaluation import Settings
from normtune.evaluation.questions import Asked, ask
from normtune.pretrained import locate, read_config
from normtune.progress import say
from normtune.recipe import Evaluation, Recipe, to_yaml
from normtune.runlog import Run

Part = Literal["data", "dev"]
"""The questions of `evaluate.data`, or those for choosing of `evaluate.dev`."""
EXAM: dict[Part, str] = {"data": "test", "dev": "dev"}
BEFORE = "text"  # the benchmark that the untuned base is asked


@dataclass
class Place:
    """The folder of one comparison and the recipe that it is about."""

    folder: Path
    recipe: Recipe
    engine: Engine = "local"
    failed: dict[Path, str] = field(default_factory=dict)
    asked: dict[Part, list[Asked]] = field(default_factory=dict)
    before: Cell | None = None  # the untuned model
    checked: bool = False
    lock: IO[str] | None = None
    cells: dict[Path, Cell] = field(default_factory=dict)  # all that this comparison consists of

    def __enter__(self) -> Place:
        """Raises InputError where the folder holds something else, or the comparison of another recipe."""
        if Run(self.folder).recipe.is_file():
            check_same(self.recipe, Run(self.folder))
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise InputError(f"{self.folder} exists and is no comparison; choose another --out or remove it")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.lock is not None:
            self.lock.close()

    def claim(self) -> None:
        """Makes the folder, when it is sure that something will be run; nobody else works in it from now on.

        Raises:
            InputError: another process is at work in it.
        """
        if self.lock is not None:
            return
        if not Run(self.folder).recipe.is_file():
            Run.create(self.folder, to_yaml(self.recipe))
        self.lock = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"{self.folder}: another process is at work there; wait, or choose another --out"
            ) from None

    @property
    def evaluation(self) -> Evaluation:
        """The recipe's. InputError where it has none."""
        evaluated(self.recipe)
        assert self.recipe.evaluate is not None
        return self.recipe.evaluate

    def data(self, part: Part) -> str:
        """The folder with the questions. InputError where the recipe names none."""
        return evaluated(self.recipe, part)

    def questions(self, part: Part) -> list[Asked]:
        """What every cell is asked; read once, and with it whether all files are there. InputError for no benchmark
        with images."""
        if part not in self.asked:
            if not set(self.evaluation.benchmarks) - {BEFORE}:
                raise InputError(f"evaluate.benchmarks: {BEFORE} alone has no images; add a benchmark to compare by")
            self.asked[part] = ask(self.settings(), self.data(part))
        return self.asked[part]

    def settings(self, baseline: Any = "none", benchmarks: Sequence[str] | None = None) -> Settings:
        names = tuple(dict.fromkeys(benchmarks or self.evaluation.benchmarks))
        return Settings(names, self.evaluation.limit, baseline=baseline)

    @property
    def seconds(self) -> float:
        """The time spent on all cells, also by earlier processes."""
        return sum(cell.seconds for cell in self.cells.values())

    def exam(self, part: Part) -> Exam:
        return Exam(EXAM[part], self.settings(), self.data(part))

    def start(self, recipe: Recipe) -> Cell | None:
        """The first stage that variants with this recipe share; None where there is none, or the recipe names a run."""
        if len(recipe.stages) < 2 or recipe.start_from is not None:
            return None
        own = recipe.model_copy(
            update={"stages": recipe.stages[:1], "name": f"{recipe.name}-stage1", "seed": self.recipe.seed}
        )
        return Cell("stage 1", self.folder / "stage1" / key_of(own), own)

    def home(self, variant: Variant) -> Path:
        """The folder of a variant's cells: another one for every other training."""
        return self.folder / "cells" / f"{variant.folder}-{key_of(variant.recipe)}"

    def cell(self, variant: Variant, seed: int, part: Part, analyzed: bool = False) -> Cell:
        """A variant with a seed, asked the questions of `part`."""
        first = self.start(variant.recipe)
        exams = (self.exam(part), *(Exam(name, self.settings(name), self.data(part)) for name in variant.baselines))
        if not variant.trains:
            assert first is not None  # who makes such a variant has seen a stage 1
            return replace(first, title=variant.label, exams=exams)
        update: dict[str, Any] = {"seed": seed, "name": f"{variant.folder}-seed-{seed}"}
        if first is not None:
            update["start_from"] = str(first.folder)
        recipe = variant.recipe.model_copy(update=update)
        folder = self.home(variant) / f"seed-{seed}"
        return Cell(f"{variant.label}, seed {seed}", folder, recipe, exams, analyzed=analyzed)

    def base(self, variants: Sequence[Variant]) -> Cell:
        """The untuned model: what its LLM can do before anything is trained, where `text` is asked; and each image that
        any variant shows goes through its encoder, so that no row pays for that."""
        sources = {str(source): source for v in variants for source in v.recipe.stages[-1].data}
        recipe = next((v.recipe for v in variants if v.recipe.stages[-1].cache_features), variants[0].recipe)
        last = recipe.stages[-1].model_copy(update={"data": list(sources.values())})
        whole = recipe.model_copy(update={"stages": [*recipe.stages[:-1], last]})
        exams = []
        if BEFORE in self.evaluation.benchmarks:
            exams = [Exam("test", self.settings(benchmarks=[BEFORE]), self.data("data"))]
        key = digest(recipe.model.model_dump(), sorted(sources))
        return Cell("the base model", self.folder / "base" / key, whole, tuple(exams), trains=False)

    def run(
        self, variants: Sequence[Variant], seeds: Sequence[int], part: Part, analyzed: bool = False
    ) -> dict[str, dict[int, Cell]]:
        """Every variant with every seed, a seed at a time; the cells by label and seed.

        Why a cell failed is kept in `failed`, by its folder. A variant that trains nothing has the recipe's seed alone.

        Raises:
            InputError: what is wrong with questions, data or models, before anything is written.
            JobError: every first stage failed, so that nothing can follow.
        """
        self.questions(part)
        self.check(variants)
        self.claim()
        models = {str(v.recipe.model): v.recipe.model for v in variants}
        bases = [self.base([v for v in variants if str(v.recipe.model) == key]) for key in models]
        self.before = self.before or bases[0]
        starts = {first.folder: first for v in variants if (first := self.start(v.recipe)) is not None}
        self.do([*bases, *starts.values()])
        lost = {folder: f"stage 1 failed: {self.failed[folder]}" for folder in starts if folder in self.failed}
        if lost and len(lost) == len(starts):
            raise JobError(next(iter(lost.values())))
        table = {}
        for variant in variants:
            own = seeds if variant.trains else [self.recipe.seed]
            look = seeds[0] if analyzed and variant.trains else None
            table[variant.label] = {seed: self.cell(variant, seed, part, seed == look) for seed in own}
            first = self.start(variant.recipe)
            if first is not None and first.folder in lost:
                self.failed |= {cell.folder: lost[first.folder] for cell in table[variant.label].values()}
        order = dict.fromkeys([*seeds, self.recipe.seed])
        self.do([table[v.label][seed] for seed in order for v in variants if seed in table[v.label]])
        return table

    def check(self, variants: Sequence[Variant]) -> None:
        """Raises InputError for data, models or a finished run that cannot be read, while nothing is written."""
        if self.checked:
            return
        for sources in {str(stage.data): stage.data for v in variants for stage in v.recipe.stages}.values():
            Mixture(sources, policy(self.recipe))
        for model in {str(v.recipe.model): v.recipe.model for v in variants}.values():
            for source in filter(None, (model.path, model.llm, model.vision)):
                read_config(locate(source, "model"), "model")
        if self.recipe.start_from is not None:
            finished_first_stage(self.recipe, Path(self.recipe.start_from))
        self.checked = True

    def do(self, cells: Sequence[Cell]) -> None:
        """Does what is not finished yet and did not fail before, and says how far it is."""
        every = {cell.folder: cell for cell in cells}
        self.cells |= every
        todo = [cell for folder, cell in every.items() if not cell.finished and folder not in self.failed]
        began = time.monotonic()
        for number, (cell, error) in enumerate(run_cells(todo, self.engine), start=1):
            if error is not None:
                self.failed[cell.folder] = error
            minutes = (time.monotonic() - began) / number * (len(todo) - number) / 60
            state = f"failed: {error}" if error else "done"
            say(f"[{number} of {len(todo)}] {cell.title}: {state}; about {minutes:.0f} min left")

    def good(self, cells: Mapping[int, Cell]) -> dict[int, Cell]:
        """Those that did not fail, by seed."""
        return {seed: cell for seed, cell in cells.items() if cell.folder not in self.failed}


def key_of(recipe: Recipe) -> str:
    """Eight hexadecimal digits of what a training depends on, but for its seed and where it starts from."""
    data = recipe.model_dump(mode="json")
    return digest(data["model"], data["stages"])


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
