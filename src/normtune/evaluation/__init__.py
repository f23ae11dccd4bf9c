"""Ask a model the questions of the benchmarks and score its answers, with the baselines that keep scores honest.

Scope: benchmarks whole or in part (`limit`), with the image, without it (`blind`) or with another item's
(`shuffled`). The way of a question: `selection` and `questions` (what is asked and shown), `engines` (inputs in
batches), `answering` (the model), `journal` and `formats` (disk), `results` (scores with all that they depend on).
`during` evaluates while a model trains, `spreading` shares the questions among processes. Not here: scoring rules
(`tasks`), tables of results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from normtune.errors import InputError
from normtune.evaluation.answering import MODES, Mode, answer, generate, likelihoods
from normtune.evaluation.engines import Request, takes_features
from normtune.evaluation.formats import Predictions
from normtune.evaluation.journal import NAME as JOURNAL
from normtune.evaluation.journal import Given, Journal, wrong_place
from normtune.evaluation.questions import Asked, Settings, ask, data_folder, splits_of
from normtune.evaluation.results import FORMAT, conditions, describe, identity, read_measured, scores_of
from normtune.evaluation.selection import BASELINES, Baseline, select, shuffled_images
from normtune.evaluation.spreading import Answers, from_first, processes, spread
from normtune.features import Store, fill_store
from normtune.recipe import ModelRecipe
from normtune.runlog import write_json
from normtune.tasks import Rules, difference

__all__ = [
    "BASELINES",
    "MODES",
    "Asked",
    "Baseline",
    "Mode",
    "Settings",
    "answer",
    "ask",
    "data_folder",
    "evaluate_into",
    "evaluate_model",
    "identity",
    "read_measured",
    "select",
    "shuffled_images",
    "splits_of",
    "stored_features",
]

Progress = Callable[[str, int, int], None]
BATCH = 32


def evaluate_model(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    benchmarks: Sequence[str],
    data: str | Path,
    *,
    limit: int | None = None,
    split: str | Mapping[str, str] | None = None,
    baseline: Baseline = "none",
    rules: Rules = "official",
    mode: Mode = "generate",
    batch_size: int = BATCH,
    seed: int = 0,
    progress: Progress | None = None,
    predictions: bool = False,
    store: Store | None = None,
) -> dict[str, dict[str, Any]]:
    """Scores of `model` on each of `benchmarks` (names of `tasks.TASKS`) whose official files lie below `data`.

    `limit` asks at least that many questions per benchmark, whole images at a time (see `select`); `split` takes
    another split than the usual one. `baseline` takes the image away (`blind`) or gives every question another item's
    image (`shuffled`); questions without an image stay as they are. `mode` `likelihood` compares the likelihoods of
    "Yes" and "No" on POPE and MME. `progress(benchmark, answered, total)` is called after each batch. Images that are
    in `store` (see `stored_features`) are not encoded again; a model whose encoder was tuned makes no use of it.

    Returns {benchmark: {"score": headline 0 to 1, figures of the task ..., "intervals": 95 % of each figure, "n":
    questions asked, "baseline": ..., "ties": answers within 1e-4 of another one}} and, with `predictions`, a list
    [{id, question, answer, truth}] in the files' order. The model is left in the modes (training or not, module by
    module) and with the generation settings that it came with.

    InputError for an unknown name, and for missing or wrong files: all are read, and the images' existence checked,
    before the first question is asked."""
    settings = Settings(
        tuple(dict.fromkeys(benchmarks)), limit, splits_of(split, benchmarks), baseline, rules, mode, seed
    )
    _check_size(batch_size)
    results: dict[str, dict[str, Any]] = {}
    for one in ask(settings, data):
        given = Given(len(one))
        collect(model, processor, settings, one, given, batch_size, progress=progress, store=store)
        measured = one.task.measure(one.items, given.complete(), rules)
        results[one.name] = scores_of(one, given, measured, settings)
        if predictions:
            results[one.name]["predictions"] = [
                {"id": item.id, "question": item.question, "answer": text, "truth": one.task.truth(item)}
                for item, text in zip(one.items, given.complete(), strict=True)
            ]
    return results


def evaluate_into(
    target: Path,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    settings: Settings,
    data: str | Path,
    *,
    about: Mapping[str, Any] | None = None,
    batch_size: int = BATCH,
    against: Path | None = None,
    progress: Progress | None = None,
    store: Store | None = None,
    together: bool = False,
) -> dict[str, Any]:
    """Writes the result to the file `target` and the answers, as they come, to the folder of that name without .json;
    returns the result. Called again after an interruption it goes on after the last batch that was answered.

    Args:
        about: the identity of the model, for the record (see `identity`).
        against: another result's file: paired differences of all figures (this - other), its answers read by this
            one's rules.
        store: as in `evaluate_model`; an evaluation that was interrupted may go on with one or without.
        together: every process of torch.distributed calls this; each asks its share, the first one writes.

    Raises:
        InputError: as `evaluate_model`; answers in that folder under other settings; `against` about other questions.
        JobError: the disk is full."""
    _check_size(batch_size)
    began, started = time.monotonic(), time.strftime("%Y-%m-%dT%H:%M:%S%z")
    asked = ask(settings, data)
    others = read_measured(against, asked, rules=settings.rules) if against is not None else {}
    folder = target.with_suffix("")
    with wrong_place(target):
        if target.suffix != ".json" or target.is_dir():
            raise InputError(f"{target} is no file of JSON.\nGive --out a file NAME.json, or a folder to write into.")
        if target.exists() and not (folder / JOURNAL).exists():
            raise InputError(f"{target} exists already, and it is no result with its answers.\nChoose another --out.")
    facts = describe(model, processor, settings, asked, Path(data), store)
    document: dict[str, Any] = {"format": FORMAT, **facts, "predictions": folder.name, "scores": {}}
    document["model"] = {**(about or {}), **facts["model"]}
    document["generation"]["batch_size"] = batch_size
    document["against"] = {"path": str(against), "differences": {}} if others else None
    rank, ranks = processes(model) if together else (0, 1)
    held = Journal.open(folder, conditions(model, processor, settings, asked), asked) if rank == 0 else nullcontext()
    with held as journal:
        known = journal.given if journal is not None else {}
        known = from_first(known) if ranks > 1 else known
        for one in asked:
            given = journal.given[one.name] if journal is not None else known[one.name]
            files = Predictions(folder / one.name, one, given) if rank == 0 else None
            collect(model, processor, settings, one, given, batch_size, journal, files, progress, store, together)
            if files is not None:
                files.finish()
            measured = one.task.measure(one.items, given.complete(), settings.rules)
            document["scores"][one.name] = scores_of(one, given, measured, settings)
            if others:  # None for a benchmark that the other result lacks
                other = others.get(one.name)
                found = difference(measured.statistics, other.statistics) if other else None
                document["against"]["differences"][one.name] = found
        document["time"] = {"started": started, "seconds": round(time.monotonic() - began, 2)}
        if rank == 0:
            write_json(target, document)
    return document


def collect(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    settings: Settings,
    asked: Asked,
    given: Given,
    batch_size: int,
    journal: Journal | None = None,
    files: Predictions | None = None,
    progress: Progress | None = None,
    store: Store | None = None,
    together: bool = False,
) -> None:
    """Asks what is not in `given` yet and puts it there, into the journal and into the files of predictions.

    Args:
        together: every process calls this, with the same in `given`; each asks its share and gets all answers.
    """

    def answers(requests: Sequence[Request], known: Given | tuple[()] = ()) -> Generator[Answers]:
        if settings.mode == "likelihood":
            return likelihoods(model, processor, requests, batch_size, known, store)
        return generate(model, processor, requests, asked.task.max_new_tokens, batch_size, known, store)

    rank, ranks = processes(model) if together else (0, 1)
    left = [place for place in range(len(asked)) if place not in given] if ranks > 1 else []
    stream = spread(asked, left, batch_size, rank, ranks, answers) if ranks > 1 else answers(asked, given)
    done = len(given)
    with closing(stream) if done < len(asked) else nullcontext(()) as batches:
        for batch in batches:
            for place, found in batch:
                given.add(place, found)
            if journal is not None:
                journal.add(asked.name, batch)
            if files is not None:
                files.append(place for place, _ in batch)
            done += len(batch)
            if progress is not None:
                progress(asked.name, done, len(asked))


def stored_features(
    recipe: ModelRecipe,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    asked: Sequence[Asked],
    *,
    quiet: bool = True,
) -> Store | None:
    """The `store` of an evaluation: features of all images that are asked about, in the cache that trainings from this
    `recipe` use; `model`, built from it, encodes what is missing.

    None where the model's encoder has to run for each evaluation: it was tuned, or the model is asked through a
    processor of its own. Raises as `features.fill_store`."""
    if not takes_features(model, processor):
        return None
    wanted = {
        image: f"{one.name}, item '{item.id}'"
        for one in asked
        for item, image in zip(one.items, one.images, strict=True)
        if image
    }
    return fill_store(recipe, model, processor, wanted, quiet=quiet)


def _check_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}.\nGive 1 or more.")
