"""A cell of a comparison: one training from one start, and the questions that its end is asked.

Scope: the record of a cell, and doing it in this process. What a cell has finished is on disk and is not done again.
Not here: which cells there are (`running`), in which processes they run (`engines`), what a training cost (`costs`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from normtune.analysis import analyze_run
from normtune.comparison.costs import costs
from normtune.data import Mixture
from normtune.data.skipping import policy
from normtune.evaluation import Settings, ask, evaluate_into, identity, stored_features
from normtune.features import fill_store
from normtune.progress import Bars
from normtune.recipe import Recipe, load_recipe, recipe_hash, to_yaml
from normtune.runlog import Run, append_line, read_json, read_lines, write_json, write_text
from normtune.training import train
from normtune.tuned import Tuned, build, open_tuned, place

FORMAT = 1
TIMES = "times.jsonl"  # how long each process worked on a cell
BATCH = 128  # questions answered together


@dataclass(frozen=True)
class Exam:
    """Questions for the end of a training: the result's `name` in the run's `evaluations`, and the files' folder."""

    name: str
    settings: Settings
    data: str


@dataclass(frozen=True)
class Cell:
    """A training with its exams, in a run folder; where `trains` is false the recipe's model as it comes.

    Attributes:
        title: what people read.
        analyzed: also measure what `normtune analyze` shows.
    """

    title: str
    folder: Path
    recipe: Recipe
    exams: tuple[Exam, ...] = ()
    trains: bool = True
    analyzed: bool = False

    @property
    def record(self) -> Path:
        """What the training cost; without a training, how many images were looked at."""
        return self.folder / "cell.json"

    @property
    def analysis(self) -> Path:
        return self.folder / "analysis.json"

    def result(self, exam: str) -> Path:
        """The result of an exam, written when its last question is answered."""
        return self.folder / "evaluations" / f"{exam}.json"

    @property
    def finished(self) -> bool:
        """Whether all of it is on disk."""
        wanted = [self.record, *(self.result(exam.name) for exam in self.exams)]
        wanted += [self.analysis] if self.analyzed else []
        return all(path.is_file() for path in wanted)

    @property
    def seconds(self) -> float:
        """All the time that was spent on it, by processes that could say so."""
        return float(sum(line["seconds"] for line in read_lines(self.folder / TIMES)))

    def cost(self) -> dict[str, Any] | None:
        """What its training cost, as `costs` says; None where nothing is trained."""
        return read_json(self.record, "record of a cell")["trained"] if self.trains else None


def do(cell: Cell) -> None:
    """Whatever of the cell is not on disk yet, in this process.

    Raises:
        InputError, JobError, Interrupted: as `train`, `evaluate_into` and `analyze_run`.
    """
    began = time.monotonic()
    if cell.recipe.threads:
        torch.set_num_threads(cell.recipe.threads)
    try:
        do_parts(cell)
    finally:
        if cell.folder.is_dir():
            append_line(cell.folder / TIMES, {"seconds": round(time.monotonic() - began, 2)})


def do_parts(cell: Cell) -> None:
    """Training, exams, analysis: each where it is not on disk."""
    tuned = None
    if cell.trains and not cell.record.is_file():
        tuned = do_training(cell)
    todo = [exam for exam in cell.exams if not cell.result(exam.name).is_file()]
    if todo:
        tuned = tuned or opened(cell)
        for exam in todo:
            do_exam(cell, exam, tuned)
    if not cell.trains and not cell.record.is_file():
        tuned = tuned or opened(cell)
        images = fill(cell.recipe, tuned)
        write_json(cell.record, {"format": FORMAT, "title": cell.title, "images": images})
    if cell.analyzed and not cell.analysis.is_file():
        write_json(cell.analysis, analyze_run(cell.folder, reuse=False))


def opened(cell: Cell) -> Tuned:
    """The model that the cell's training left, or where nothing is trained the recipe's, on the recipe's device."""
    tuned = open_tuned(cell.folder) if cell.trains else Tuned(*build(cell.recipe.model, cell.recipe.seed))
    place(tuned.model, cell.recipe.device)
    return tuned


def do_training(cell: Cell) -> Tuned:
    """Trains, or goes on with an interrupted training, and writes down what it cost."""
    run = Run(cell.folder)
    resume = run.recipe.is_file()
    if resume:  # the comparison may have been moved, and its stage 1 with it
        before = load_recipe(run.recipe)
        if before.model_copy(update={"start_from": cell.recipe.start_from}) == cell.recipe:
            write_text(run.recipe, to_yaml(cell.recipe))
    trained = train(cell.recipe, out=cell.folder, resume=resume)
    place(trained.model, cell.recipe.device)
    found = costs(cell.recipe, trained.folder, trained.model, trained.processor)
    write_json(cell.record, {"format": FORMAT, "title": cell.title, "trained": found})
    return Tuned(trained.model, trained.processor, cell.recipe)


def fill(recipe: Recipe, tuned: Tuned) -> int:
    """Puts what the encoder makes of the images of the stages with `cache_features` on disk; how many there are."""
    cached = [stage for stage in recipe.stages if stage.cache_features]
    on_bad = policy(recipe)
    wanted = {path: where for stage in cached for path, where in Mixture(stage.data, on_bad).images()}
    if wanted:
        fill_store(recipe.model, tuned.model, tuned.processor, wanted, skip=on_bad is not None)
    return len(wanted)


def do_exam(cell: Cell, exam: Exam, tuned: Tuned) -> None:
    """Asks the questions of an exam, or those that an interruption left; only its first exam encodes an image."""
    about = identity(cell.folder.name, recipe_hash(cell.recipe), tuned.record, None)
    asked = ask(exam.settings, exam.data)
    store = stored_features(cell.recipe.model, tuned.model, tuned.processor, asked, quiet=False)
    with Bars(exam.name) as bars:
        evaluate_into(
            cell.result(exam.name),
            tuned.model,
            tuned.processor,
            exam.settings,
            exam.data,
            about=about,
            batch_size=BATCH,
            store=store,
            progress=bars.update,
        )
