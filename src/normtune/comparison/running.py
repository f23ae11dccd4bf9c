"""A comparison's folder: the same start for all, cells for variants and seeds, and what is finished stays finished.

Layout: `recipe.yaml`, `stage1/KEY` (a run for each different first stage), `cells/VARIANT/seed-N` (runs), `base`,
and the report. Not here: which variants there are (`variants`, `kinds`, `sweeps`), what they come to (`results`).
"""

from __future__ import annotations

import fcntl
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from normtune.checkpoint import check_same
from normtune.comparison.cells import Cell, Exam
from normtune.comparison.engines import Engine, run_cells
from normtune.comparison.variants import Variant, evaluated
from normtune.errors import InputError, JobError
from normtune.evaluation import Settings
from normtune.evaluation.questions import Asked, ask
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
    lock: IO[str] | None = None
    cells: dict[Path, Cell] = field(default_factory=dict)  # all that this comparison consists of

    def __enter__(self) -> Place:
        """Raises InputError where the folder holds something else, or the comparison of another recipe."""
        if Run(self.folder).recipe.is_file():
            check_same(self.recipe, Run(self.folder))
        else:
            Run.refuse_existing(self.folder)
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
        """What every cell is asked; read once, and with it whether all files are there."""
        if part not in self.asked:
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
        same = hashlib.sha256(repr((own.model, own.stages, own.seed)).encode()).hexdigest()[:8]
        return Cell("stage 1", self.folder / "stage1" / same, own)

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
        folder = self.folder / "cells" / variant.folder / f"seed-{seed}"
        return Cell(f"{variant.label}, seed {seed}", folder, recipe, exams, analyzed=analyzed)

    def base(self) -> Cell | None:
        """The untuned model and the questions without an image: what its LLM can do before anything is trained."""
        if BEFORE not in self.evaluation.benchmarks:
            return None
        exam = Exam("test", self.settings(benchmarks=[BEFORE]), self.data("data"))
        return Cell("the base model", self.folder / "base", self.recipe, (exam,), trains=False)

    def run(
        self, variants: Sequence[Variant], seeds: Sequence[int], part: Part, analyzed: bool = False
    ) -> dict[str, dict[int, Cell]]:
        """Every variant with every seed, a seed at a time; by label and seed the cells that are complete.

        Why a cell failed is kept in `failed`, by its folder. A variant that trains nothing has the recipe's seed alone.

        Raises:
            JobError: the first stage failed, so that nothing can follow.
        """
        self.questions(part)  # wrong files are to be told now
        self.claim()
        starts = {first.folder: first for v in variants if (first := self.start(v.recipe)) is not None}
        base = self.base()
        self.do([*starts.values(), *([base] if base is not None else [])])
        for cell in starts.values():
            if cell.folder in self.failed:
                raise JobError(f"{cell.title} failed: {self.failed[cell.folder]}")
        table: dict[str, dict[int, Cell]] = {v.label: {} for v in variants}
        for number, seed in enumerate(seeds):
            for variant in variants:
                if variant.trains or number == 0:
                    look = analyzed and variant.trains and number == 0
                    table[variant.label][seed if variant.trains else self.recipe.seed] = self.cell(
                        variant, seed, part, look
                    )
        by_seed = [table[v.label][s] for s in (*seeds, self.recipe.seed) for v in variants if s in table[v.label]]
        self.do(list({cell.folder: cell for cell in by_seed}.values()))
        return {
            label: {seed: cell for seed, cell in cells.items() if cell.folder not in self.failed}
            for label, cells in table.items()
        }

    def do(self, cells: Sequence[Cell]) -> None:
        """Does what is not finished yet, and says how far it is."""
        self.cells |= {cell.folder: cell for cell in cells}
        todo = [cell for cell in cells if not cell.finished]
        began = time.monotonic()
        for cell in cells:
            self.failed.pop(cell.folder, None)
        for number, (cell, error) in enumerate(run_cells(todo, self.engine), start=1):
            if error is not None:
                self.failed[cell.folder] = error
            minutes = (time.monotonic() - began) / number * (len(todo) - number) / 60
            state = f"failed: {error}" if error else "done"
            say(f"[{number} of {len(todo)}] {cell.title}: {state}; about {minutes:.0f} min left")
