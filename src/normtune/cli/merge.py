"""`normtune merge`: one adapter into its base; several into adapters of their own (a weighted sum, or between two).

With `--benchmarks` the sources and what was made of them are scored side by side on one base. Not here: the arithmetic
(adapter/arithmetic.py), folding (adapter/merging.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from normtune.cli.export import DtypeOption, ForceOption, JsonOption, OutOption, prepare, write_merged
from normtune.errors import InputError

if TYPE_CHECKING:
    from normtune.adapter import Adapter

SHARES = "0,0.25,0.5,0.75,1"
RunsArgument = Annotated[list[str], typer.Argument(help="One run or adapter folder, or several of one base.")]


def merge(
    runs: RunsArgument,
    out: OutOption,
    weights: Annotated[str | None, typer.Option(help="Of each adapter's change, as 0.5,0.5 (default: equal).")] = None,
    interpolate: Annotated[bool, typer.Option("--interpolate", help="Between two adapters, at --shares.")] = False,
    shares: Annotated[str, typer.Option(help="Of the second adapter: 0 is the first, 1 the second.")] = SHARES,
    keep_rest: Annotated[
        bool, typer.Option("--keep-rest", help="Tensors whose base is unknown and that cannot be mixed: the first's.")
    ] = False,
    benchmarks: Annotated[str | None, typer.Option(help="Score sources and results: pope,mme,...")] = None,
    data: Annotated[
        str | None, typer.Option(help="Folder of the benchmarks (default: the first run's recipe's).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=0, help="Items per benchmark; 0: all.")] = None,
    dtype: DtypeOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Fold one adapter into its base: a plain model that loads without normtune. Several adapters of one base become
    one: base + weight x change, summed; or, with --interpolate, adapters between two.

    Example: normtune merge runs/a runs/b --weights 0.5,0.5 --out runs/mixed --benchmarks pope
    """
    from normtune.cli.output import print_json

    refuse_idle(interpolate, weights, shares, benchmarks, data, limit)
    if len(runs) == 1 and not interpolate and weights is None:
        if benchmarks is not None:
            raise InputError("--benchmarks compares several adapters; score one with `normtune evaluate`")
        facts, lines = write_merged(runs[0], out, dtype, force)
        print_json({"out": str(out), **facts}) if json else print("\n".join(lines))
        return
    if dtype is not None:
        raise InputError("--dtype is of merged weights; an adapter made of others is float32, leave it out")
    prepare(out)
    sources = {run: read(run) for run in dict.fromkeys(runs)}
    if len(sources) != len(runs):
        raise InputError("the same adapter is named twice; give each once, with the sum of its weights")
    made = between(sources, shares, keep_rest) if interpolate else summed(sources, weights, keep_rest)
    asked = questions(runs[0], benchmarks, data, limit) if benchmarks is not None else None
    folders = write_all(made, out, single=not interpolate)
    found = {}
    if asked is not None:
        from normtune.adapter import adapter_folder

        adapters = {**{run: adapter_folder(run) for run in runs}, **folders}
        found = score(runs[0], adapters, *asked, limit, force)
    note, gates = rest_note(list(sources.values()), list(made.values())), gates_of(sources)
    if json:
        paths = {name: str(folder) for name, folder in folders.items()}
        print_json({"out": str(out), "made": paths, "rest": note, "gate": next(iter(gates.values())), "scores": found})
    else:
        show(folders, note, found, gates)


def refuse_idle(
    interpolate: bool, weights: str | None, shares: str, benchmarks: str | None, data: str | None, limit: int | None
) -> None:
    """Raises InputError for an option that the others leave without effect."""
    if interpolate and weights is not None:
        raise InputError("--weights are of a sum; --interpolate goes by --shares, leave one of them out")
    if shares != SHARES and not interpolate:
        raise InputError("--shares go with --interpolate; a sum goes by --weights")
    if benchmarks is None and (data is not None or limit is not None):
        raise InputError("--data and --limit are of the scores; name the --benchmarks, too")


def read(run: str) -> Adapter:
    from normtune.adapter import Adapter, adapter_folder

    return Adapter.read(adapter_folder(run))


def numbers(text: str, what: str) -> list[float]:
    """Comma-separated numbers. Raises InputError, naming the option, where one is none."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{what} {text}: give numbers with commas between, such as 0.5,0.5") from None


def summed(sources: Mapping[str, Adapter], weights: str | None, keep_rest: bool) -> dict[str, Adapter]:
    from normtune.adapter import weighted_sum

    shares = numbers(weights, "--weights") if weights is not None else [1 / len(sources)] * len(sources)
    label = " + ".join(f"{weight:g} {name}" for weight, name in zip(shares, sources, strict=False))
    return {label: weighted_sum(list(sources.values()), shares, keep_rest=keep_rest)}


def between(sources: Mapping[str, Adapter], shares: str, keep_rest: bool) -> dict[str, Adapter]:
    if len(sources) != 2:
        raise InputError(f"--interpolate is between two adapters, and {len(sources)} are given")
    first, second = sources.values()
    wanted = numbers(shares, "--shares")
    return {f"share {share:g}": first.interpolate(second, share, keep_rest=keep_rest) for share in wanted}


def write_all(made: Mapping[str, Adapter], out: Path, single: bool) -> dict[str, Path]:
    """Name -> adapter folder: `out` itself, or one per share below it; all of them or none."""
    from normtune.runlog import atomic_folder

    if single:
        ((label, adapter),) = made.items()
        return {label: adapter.write(out)}
    with atomic_folder(out) as temporary:
        for label, adapter in made.items():
            adapter.write(temporary / label.replace(" ", "-"))
    return {label: out / label.replace(" ", "-") for label in made}


def rest_note(sources: Sequence[Adapter], made: Sequence[Adapter]) -> str:
    """What became of the tensors whose base no adapter holds; empty where there are none."""
    rest = [name for name in made[0].tensors if name not in made[0].base]
    if not rest:
        return ""
    kinds = [fate(name, sources, made) for name in rest]
    parts = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)]
    return f"{len(rest)} tensors without a known base (first {rest[0]}): {', '.join(parts)}"


def fate(name: str, sources: Sequence[Adapter], made: Sequence[Adapter]) -> str:
    """What became of one of them."""
    held = [a.tensors[name] for a in sources if name in a.tensors]
    if len(held) < len(sources):
        return "of only some, kept as they are"
    if all(bool((one == held[0]).all()) for one in held):
        return "the same in all"
    kept = all(bool((one.tensors[name] == held[0]).all()) for one in made)
    return "different, kept as the first's" if kept else "different, mixed by value"


def questions(run: str, benchmarks: str, data: str | None, limit: int | None) -> tuple[list[str], str]:
    """Names of benchmarks and their folder. Raises InputError for unknown names and missing files."""
    from normtune.evaluation import Settings, ask, splits_of
    from normtune.recipe import load_recipe
    from normtune.world import resolve_path

    if data is None and (Path(run) / "recipe.yaml").is_file():
        evaluation = load_recipe(Path(run) / "recipe.yaml").evaluate
        data = evaluation.data if evaluation else None
    if data is None:
        raise InputError(f"{run} names no benchmark files in a recipe; give --data")
    names = list(dict.fromkeys(name.strip() for name in benchmarks.split(",")))
    folder = resolve_path(data)
    ask(Settings(tuple(names), limit or None, splits_of(None, names)), folder)
    return names, folder


def score(
    run: str, adapters: Mapping[str, Path], names: list[str], folder: str, limit: int | None, force: bool
) -> dict[str, Any]:
    """Scores of each adapter on one base: name -> benchmark -> score, 95 % interval, items."""
    from normtune.adapter import load_adapter, remove_adapter
    from normtune.evaluation import evaluate_model
    from normtune.progress import Bars
    from normtune.tuned import open_tuned, place

    tuned = open_tuned(run, force=force)
    place(tuned.model)
    remove_adapter(tuned.model)
    found: dict[str, Any] = {}
    for label, adapter in adapters.items():
        load_adapter(tuned.model, adapter, "default", force=force)
        with Bars() as bars:
            results = evaluate_model(
                tuned.model,
                tuned.processor,
                names,
                folder,
                limit=limit or None,
                progress=bars.update,
            )
        found[label] = {
            name: {"score": facts["score"], "interval": facts["intervals"].get("score"), "items": facts["n"]}
            for name, facts in results.items()
        }
    return found


def gates_of(sources: Mapping[str, Adapter]) -> dict[str, str]:
    """Name -> gate; that of the first holds for what is made of them."""
    return {name: adapter.record.get("gate") or "none" for name, adapter in sources.items()}


def show(folders: Mapping[str, Path], note: str, found: Mapping[str, Any], gates: Mapping[str, str]) -> None:
    from normtune.cli.evaluate import span
    from normtune.cli.output import print_table

    for label, folder in folders.items():
        print(f"{folder}: {label}")
    if note:
        print(note)
    if len(set(gates.values())) > 1:
        held = ", ".join(f"{gate} of {name}" for name, gate in gates.items())
        print(f"the gates differ ({held}): the first's holds")
    if found:
        names = list(next(iter(found.values())))
        rows = [
            [label, *(c for n in names for c in (scores[n]["score"], span(scores[n]["interval"])))]
            for label, scores in found.items()
        ]
        print_table(["adapter", *(column for name in names for column in (name, "95 % interval"))], rows)
