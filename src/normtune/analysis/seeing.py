"""What the image contributes: scores with a question's image, without it, and with another's.

Scope: the benchmarks of the recipe that have images, whole or in part; results that the run's `evaluations` hold are
taken where they are of this model and about these very questions and images. Nothing is written. Not here: asking and
scoring (`evaluation`).
"""

from __future__ import annotations

from pathlib import Path

from normtune.errors import InputError
from normtune.evaluation import BASELINES, Baseline, evaluate_model, stored_features
from normtune.evaluation.questions import Settings, ask
from normtune.evaluation.results import FORMAT, fingerprint
from normtune.progress import Bar
from normtune.recipe import Evaluation, Recipe
from normtune.runlog import read_json
from normtune.tuned import Tuned

Stored = dict[tuple[str, str], float]  # (benchmark, SHA-256 of its questions with the images shown) -> headline
Scores = dict[str, dict[str, float]]


def image_contribution(
    folder: Path | None, tuned: Tuned, recipe: Recipe, section: Evaluation, limit: int | None, quiet: bool
) -> tuple[Scores | None, dict[str, int], list[str]]:
    """({"none", "blind", "shuffled": {benchmark: headline}} or None without such a benchmark, questions asked by
    benchmark, notes). `folder` is the run whose results may be taken; `section` the recipe's `evaluate`.

    Raises:
        InputError: missing or wrong files.
    """
    stored = stored_scores(folder, tuned) if folder is not None else {}
    scores: Scores = {baseline: {} for baseline in BASELINES}
    questions: dict[str, int] = {}
    notes: list[str] = []
    names = list(dict.fromkeys(section.benchmarks))
    with Bar("scores with and without the image", len(names), quiet=quiet) as bar:
        for number, name in enumerate(names, 1):
            if any(ask(Settings((name,), 1), section.data)[0].images):
                try:
                    chosen = choose(name, section, limit, stored)
                except InputError as error:  # too few images to exchange them
                    notes.append(f"{name}: not asked: {str(error).splitlines()[0]}")
                    continue
                for baseline, (size, known, settings) in chosen.items():
                    questions[name] = size
                    scores[baseline][name] = ask_it(tuned, recipe, settings, section.data) if known is None else known
            bar.update(number)
    return (scores if questions else None), questions, notes


def choose(
    name: str, section: Evaluation, limit: int | None, stored: Stored
) -> dict[Baseline, tuple[int, float | None, Settings]]:
    """By baseline: how many questions, their score if it is stored, how they are asked. With the limit under which all
    is stored, whichever it is; else with the first that works of the one asked for, the recipe's, and none."""
    first: dict[Baseline, tuple[int, float | None, Settings]] = {}
    problem: InputError | None = None
    for size in dict.fromkeys((limit, section.limit, None)):
        option: dict[Baseline, tuple[int, float | None, Settings]] = {}
        try:
            for baseline in BASELINES:
                settings = Settings((name,), size, baseline=baseline)
                (asked,) = ask(settings, section.data)
                option[baseline] = len(asked), stored.get((name, asked.fingerprint())), settings
        except InputError as error:  # so few images that none can be exchanged
            problem = problem or error
            continue
        if all(known is not None for _, known, _ in option.values()):
            return option
        first = first or option
    if problem is not None and not first:
        raise problem
    return first


def stored_scores(folder: Path, tuned: Tuned) -> Stored:
    """Headlines of the results in `evaluations` that are of this very model, answered and read in the usual way."""
    found: Stored = {}
    own = fingerprint(tuned.model)
    for path in sorted((folder / "evaluations").glob("*.json")):
        result = read_json(path, "result")
        if not isinstance(result, dict) or result.get("format") != FORMAT or result["model"].get("fingerprint") != own:
            continue
        if (result["settings"]["rules"], result["settings"]["mode"]) == ("official", "generate"):
            for name, facts in result["scores"].items():
                found[name, result["data"][name]["questions_sha256"]] = facts["score"]
    return found


def ask_it(tuned: Tuned, recipe: Recipe, settings: Settings, data: str) -> float:
    (name,) = settings.benchmarks
    store = None
    if recipe.stages[-1].cache_features:
        store = stored_features(recipe.model, tuned.model, tuned.processor, ask(settings, data))
    result = evaluate_model(
        tuned.model, tuned.processor, [name], data, limit=settings.limit, baseline=settings.baseline, store=store
    )
    return float(result[name]["score"])
