"""Several strategies, kinds of data or settings through one training and one evaluation: one table, one report.

`compare(recipe, request)` is fair by construction: one stage 1, the same batches in the same order, the same questions,
the same number of learning-rate candidates, chosen on other questions than those that are reported. `variants`, `kinds`
and `sweeps` say what is run, `experiments` in which phases; `running`, `cells` and `engines` run it; `statistics` and
`results` say what came out, `claims` what that says about the paper; `report` shows it. Not here: training, questions,
analysis of one run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normtune.comparison.claims import claims
from normtune.comparison.engines import Engine
from normtune.comparison.experiments import SWEEPS, Found, Request, by_kind, by_strategy
from normtune.comparison.report import write_report
from normtune.comparison.results import examples_of
from normtune.comparison.running import BEFORE, EXAM, Place
from normtune.errors import InputError, did_you_mean
from normtune.recipe import Recipe, recipe_hash, to_yaml
from normtune.runlog import provenance, read_json, write_json

__all__ = ["SWEEPS", "Compared", "Request", "compare"]

FORMAT = 1


@dataclass(frozen=True)
class Compared:
    """A finished comparison: its folder and what `report.json` in it holds."""

    folder: Path
    document: dict[str, Any]

    @property
    def failed(self) -> list[str]:
        """What failed and why, a line each."""
        return [f"{one['title']}: {one['error']}" for one in self.document["failed"]]


def compare(
    recipe: Recipe,
    request: Request,
    out: Path | None = None,
    *,
    engine: Engine = "local",
    source: Recipe | None = None,
    command: str = "",
) -> Compared:
    """Runs a comparison, or goes on with one, and writes `report.json`, `report.html` and `report.md`.

    Args:
        request: `strategies`, or `kinds` (with one strategy at most), or a `sweep`, over `seeds`.
        out: the folder (default: `runs/NAME-EXPERIMENT`).
        source: the recipe as the report shows it, where paths in `recipe` have been filled in.
        command: the command line that does this.

    Raises:
        InputError: wrong recipe or request, before anything is trained; a folder of another comparison.
        JobError: the first stage failed. Interrupted: the same call goes on.
    """
    name = experiment_of(request)
    equal = f"-{request.equal}" if request.kinds else ""
    folder = out if out is not None else Path("runs") / f"{recipe.name}-{name.replace(' ', '-')}{equal}"
    if len(set(request.seeds)) != len(request.seeds) or not request.seeds:
        raise InputError("a comparison needs one seed or more, each once")
    with Place(folder, recipe, engine) as place:
        run = SWEEPS[request.sweep] if request.sweep else by_kind if request.kinds else by_strategy
        found = run(place, request)
        document = document_of(place, request, found, name, source or recipe, command)
        document["claims"] = claims(document)
        write_json(folder / "report.json", document)
    write_report(folder, document)
    return Compared(folder, document)


def experiment_of(request: Request) -> str:
    """What the request is about. InputError where it is about nothing, or about two things."""
    if request.sweep is not None:
        if request.sweep not in SWEEPS:
            hint = did_you_mean(request.sweep, SWEEPS)
            raise InputError(f"sweep {request.sweep!r} is unknown{hint}; there are {', '.join(SWEEPS)}")
        if request.kinds:
            raise InputError("--kinds and --sweep are two comparisons; ask for one of them")
        return f"sweep {request.sweep}"
    if request.kinds:
        return "kinds"
    if not request.strategies:
        raise InputError("nothing to compare: give --strategies, --kinds or --sweep")
    return "strategies"


def document_of(
    place: Place, request: Request, found: Found, name: str, source: Recipe, command: str
) -> dict[str, Any]:
    """All of `report.json` but the claims."""
    asked = place.questions(found.part)
    cells = list({cell.folder: cell for by in found.cells.values() for cell in by.values()}.values())
    analysis = {
        label: without_paths(read_json(cell.analysis, "analysis"), cell.folder.relative_to(place.folder))
        for label, by in found.cells.items()
        for cell in by.values()
        if cell.analyzed and cell.analysis.is_file()
    }
    results = [read_json(cell.result(EXAM[found.part]), "result") for cell in cells]
    return {
        "format": FORMAT,
        "experiment": name,
        "title": f"{source.name}: {name}",
        "command": command,
        "request": {key: value for key, value in vars(request).items() if value not in (None, (), "")},
        "recipe": to_yaml(source),
        "recipe_hash": recipe_hash(source),
        "asked_on": found.part,
        "benchmarks": [one.name for one in asked if one.name != BEFORE],
        "questions": {one.name: len(one) for one in asked},
        "seeds": list(request.seeds),
        "rows": found.rows,
        "winners": found.winners,
        "search": found.search,
        "curves": found.curves,
        "axis": found.axis,
        "findings": found.findings,
        "failed": [{"title": place.cells[folder].title, "error": error} for folder, error in place.failed.items()],
        "analysis": analysis,
        "examples": examples_of(asked, found.cells, EXAM[found.part]),
        "provenance": provenance(),
        "seconds": round(place.seconds, 1),
        "started": min((result["time"]["started"] for result in results), default=None),
    }


def without_paths(analysis: dict[str, Any], folder: Path) -> dict[str, Any]:
    """An analysis as a report that leaves this machine has it: the run below the comparison, no paths of the model."""
    return {**analysis, "run": str(folder), "model": None}
