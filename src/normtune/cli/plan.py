"""`normtune plan`: memory, trained parameters and work of a training step, from configs alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from normtune.cli.plan_adapters import plan_adapters
from normtune.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from normtune.memory import Job, Plan
    from normtune.recipe import Lora, Recipe

COMPARED = "full,lora,layernorm,layernorm-simple"
LENGTH = 2048
ALONE = "plan"  # the stage of a strategy that is planned without a recipe
ONE = "a step of one micro-batch; where it takes several, gradients stay in memory between them"
Kinds: TypeAlias = Literal["linear", "mlp"]
Dtypes: TypeAlias = Literal["float32", "bfloat16", "nf4", "int8"]
BESIDE = f"Strategies by comma, or all, each in place of the recipe's last stage (without a recipe: {COMPARED})."
TOKENS = f"Tokens of a sample, image tokens included (default {LENGTH}, or the recipe's)."


def plan(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe; or give --llm.")] = None,
    llm: Annotated[str | None, typer.Option(help="Folder or hub id of the LLM; only its config is read.")] = None,
    vision: Annotated[
        str | None, typer.Option(help="Folder or hub id of the vision encoder; without it, text alone.")
    ] = None,
    connector: Annotated[Kinds | None, typer.Option(help="Kind of the connector (default mlp).")] = None,
    strategy: Annotated[str | None, typer.Option(help="One strategy; parts of a list joined by +.")] = None,
    compare: Annotated[str | None, typer.Option(help=BESIDE)] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples in a micro-batch (default 1, or recipe's).")] = None,
    length: Annotated[int | None, typer.Option(min=2, help=TOKENS)] = None,
    supervised: Annotated[
        int | None, typer.Option(min=1, help="Supervised tokens of a sample (default 100, at most half of all).")
    ] = None,
    dtype: Annotated[
        Dtypes | None, typer.Option(help="Of the frozen weights (default bfloat16, or the recipe's).")
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(min=1, help="Rank of LoRA (default 64, or the recipe's).")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Find the largest micro-batch for it, e.g. 24GB.")] = None,
    rate: Annotated[float | None, typer.Option(min=0.001, help="TFLOP/s reached, for an estimate of time.")] = None,
    parameters: Annotated[bool, typer.Option("--parameters", help="Count what trains, and plan nothing.")] = False,
    adapters: Annotated[int | None, typer.Option(min=1, help="Memory of a bank of so many; plans nothing.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what a training step would take, before anything is downloaded or rented: peak memory by cause, FLOPs.

    Options replace what the recipe says.

    Example: normtune plan --llm meta-llama/Llama-2-13b-hf --vision openai/clip-vit-large-patch14 --length 776
    """
    size = {"--batch": batch, "--length": length, "--supervised": supervised, "--dtype": dtype}
    more = {"--gpu-memory": gpu_memory, "--rate": rate}
    if (recipe is None) == (llm is None):
        raise InputError("give either a recipe, or --llm (with --vision for a multimodal model)")
    if strategy is not None and compare is not None:
        raise InputError("give either --strategy or --compare")
    if recipe is not None:
        refuse({"--vision": vision, "--connector": connector}, "the recipe names the whole model; change it there")
    elif vision is None:
        refuse({"--connector": connector}, "without --vision there is none")
    if parameters or adapters:
        which = "--parameters" if parameters else "--adapters"
        refuse({**size, **more}, f"{which} plans no step; leave it out, or these")
    names = names_of(strategy if compare is None else compare)
    memory = None if gpu_memory is None else parse_memory(gpu_memory)
    asked = Asked(names, compare == "all", batch, length, supervised, dtype, lora_rank)
    own, build = model_of(recipe, llm, vision, connector or "mlp")
    if adapters:
        plan_adapters(build(), adapters, json)
    elif parameters:
        count_parameters(build(), own, asked, json)
    else:
        plan_steps(own, build, asked, memory, rate, json)


@dataclass(frozen=True)
class Asked:
    """What the options ask for; None where they do not. `every`: all strategies, those that can be."""

    names: list[str | list[str]] | None
    every: bool
    batch: int | None
    length: int | None
    supervised: int | None
    dtype: str | None
    rank: int | None

    def lora(self, given: Lora) -> Lora:
        return given if self.rank is None else given.model_copy(update={"rank": self.rank})


def refuse(options: dict[str, Any], why: str) -> None:
    """Raises InputError where one of the options is given."""
    if given := [name for name, value in options.items() if value is not None]:
        raise InputError(f"{', '.join(given)}: {why}")


def names_of(text: str | None) -> list[str | list[str]] | None:
    """Strategies by comma, parts joined by + as lists.

    Raises:
        InputError: an unknown or empty name.
    """
    from normtune.recipe.schema import PARTS, STRATEGIES, check_name

    if text is None:
        return None
    found: list[str | list[str]] = []
    try:
        for name in STRATEGIES if text == "all" else [n.strip() for n in text.split(",")]:
            parts = name.split("+")
            if parts == [name] and name not in PARTS and not name.startswith("regex:"):
                check_name(name, STRATEGIES, "strategy", hint="or parts joined by +")
            elif name not in STRATEGIES:
                for part in [part for part in parts if not part.startswith("regex:")]:
                    check_name(part, PARTS, "part")
            found.append(name if name in STRATEGIES else parts)
    except ValueError as error:
        raise InputError(str(error)) from None
    return found


def parse_memory(text: str) -> float:
    """`24GB` -> 24e9 bytes, `24GiB` -> 24 * 2^30; a number alone is in GB.

    Raises:
        InputError: for anything else.
    """
    units = {"gib": 2.0**30, "gb": 1e9, "mib": 2.0**20, "mb": 1e6, "": 1e9}
    lower = text.strip().lower()
    unit = next(unit for unit in units if lower.endswith(unit))
    try:
        found = float(lower.removesuffix(unit)) * units[unit]
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise InputError(f"memory {text!r} is not known; give for example 24GB or 80GiB")
    return found


def model_of(
    recipe: Path | None, llm: str | None, vision: str | None, connector: Kinds
) -> tuple[Recipe | None, Callable[[], nn.Module]]:
    """The recipe, if there is one, and what makes its model, or that of the options, on the meta device."""
    from normtune.recipe import ModelRecipe, load_recipe
    from normtune.world import resolve

    own = None if recipe is None else resolve(load_recipe(recipe))

    from normtune.cli.output import quiet_libraries
    from normtune.skeletons import assembled_skeleton, skeleton

    quiet_libraries()
    if own is not None:
        return own, lambda: assembled_skeleton(own.model)
    if vision is None:
        return None, lambda: skeleton(str(llm))
    model = ModelRecipe(llm=llm, vision=vision, connector=connector)
    return None, lambda: assembled_skeleton(model)


def plan_steps(
    own: Recipe | None,
    build: Callable[[], nn.Module],
    asked: Asked,
    memory: float | None,
    rate: float | None,
    json: bool,
) -> None:
    """Plans what is asked for and prints it."""
    from normtune.accounting import denominator
    from normtune.cli.output import print_json

    ready = [build()]  # the first plan takes it once its parameters are counted
    parts = denominator(ready[0])
    jobs = jobs_of(own, lambda: ready.pop() if ready else build(), asked)
    skip = asked.every or (own is None and asked.names is None)
    rows, refused = plan_all(jobs, skip, memory, rate)
    if json:
        print_json({"denominator": parts, "plans": rows, "refused": refused})
    else:
        print_plans(rows, memory)
        print_totals(parts, refused)


def jobs_of(recipe: Recipe | None, build: Callable[[], nn.Module], asked: Asked) -> list[Job]:
    """What to plan: the recipe's own stages, or strategies in place of its last one, or on their own."""
    from normtune.memory import job_of
    from normtune.recipe import DataSource, Stage

    dtype, device = "bfloat16", "auto"
    alone = Stage(
        name=ALONE,
        strategy="full",
        data=[DataSource(path="none")],
        learning_rate=1e-3,
        batch_size=asked.batch or 1,
        max_length=LENGTH,
        packing=False,
    )
    stages = [alone]
    if recipe is not None:
        stages, dtype, device = recipe.stages, recipe.model.dtype, recipe.device
    names = asked.names or (names_of(COMPARED) if recipe is None else None)
    if names is not None:
        plain: dict[str, Any] = {"learning_rates": {}, "weight_decays": {}}  # of parts that others do not train
        stages = [stages[-1].model_copy(update={"strategy": name, **plain}) for name in names]
    jobs = []
    for stage in stages:
        options = {"lora": asked.lora(stage.lora), "max_length": asked.length or stage.max_length}
        one = stage.model_copy(update=options)
        jobs.append(job_of(build, one, asked.dtype or dtype, device, asked.batch, asked.supervised))
    return jobs if recipe is not None else [replace(job, notes=(*job.notes, ONE)) for job in jobs]


def plan_all(
    jobs: list[Job], skip: bool, memory: float | None, rate: float | None
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row per job, and why the model cannot take the others (with `skip`, and unless it can take none)."""
    from normtune.progress import Bar

    rows: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    with Bar("plan", len(jobs)) as bar:
        for number, job in enumerate(jobs):
            named = job.stage.strategy
            name = named if isinstance(named, str) else "+".join(named)
            try:
                found = job.plan()
            except InputError as error:
                refused[name] = str(error)
                if not skip or len(refused) == len(jobs):
                    raise
            else:
                rows.append({"stage": job.stage.name, **found.to_dict(), **estimates(job, found, memory, rate)})
            bar.update(number + 1, name)
    for row in rows:
        row["ratio"] = row["peak_bytes"] / rows[0]["peak_bytes"]
    return rows, refused


def estimates(job: Job, found: Plan, memory: float | None, rate: float | None) -> dict[str, Any]:
    """The largest batch for a memory; at a rate the seconds of a micro-batch and of a recipe's step, and tokens/s."""
    more: dict[str, Any] = {}
    if memory is not None:
        more["largest_batch"] = job.largest_batch(memory)
    if rate is not None:
        more["seconds"] = found.step_flops / (rate * 1e12)
        if job.stage.name != ALONE:
            more["step_seconds"] = more["seconds"] * job.stage.batch_size / found.shape.batch
        more["tokens_per_second"] = rate * 1e12 / found.flops_per_token
    return more


def print_plans(rows: list[dict[str, Any]], memory: float | None) -> None:
    from normtune.cli.output import human_bytes, print_table
    from normtune.memory import USABLE

    shapes = dict.fromkeys(f"{row['batch']} x {row['length']} tokens ({row['supervised']} supervised)" for row in rows)
    about = f"a micro-batch of {', then '.join(shapes)}; base in {rows[0]['dtype']}; sizes in {unit(rows)[0]}"
    print_table(*table(rows), about)
    peaks = {row["strategy"]: row["peak_bytes"] for row in rows}
    if {"layernorm", "lora"} <= peaks.keys():
        print(f"layernorm / lora: {peaks['layernorm'] / peaks['lora']:.3f} of the peak")
    for row in rows:
        kept = ", ".join(f"{kind} {human_bytes(size)}" for kind, size in row["by_cause"]["activations"].items() if size)
        print(f"{label(row)} keeps for backward at its peak: {kept or 'nothing'}")
    for note in dict.fromkeys(note for row in rows for note in row["notes"]):
        print(f"note: {note}")
    if memory is not None:
        most = human_bytes(USABLE * memory)
        print(f"largest: samples of that length whose peak stays within {most} ({USABLE:.0%}); 0: not even one")


def print_totals(parts: dict[str, int], refused: dict[str, str]) -> None:
    total = " + ".join(f"{name} {number:,}" for name, number in parts.items())
    print(f"total: {total}; for LoRA its matrices, too")
    for name, reason in refused.items():
        print(f"{name}: not here: {reason.splitlines()[0]}")


def label(row: dict[str, Any]) -> str:
    name = row["strategy"] if row["lora_rank"] is None else f"{row['strategy']} (r = {row['lora_rank']})"
    return name if row["stage"] == ALONE else f"{row['stage']}: {name}"


def unit(rows: list[dict[str, Any]]) -> tuple[str, int]:
    return ("GiB", 2**30) if max(row["peak_bytes"] for row in rows) > 2**29 else ("MiB", 2**20)


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and cells; sizes in GiB, or MiB where all is small."""
    from normtune.cli.output import human_count

    size = unit(rows)[1]
    first = rows[0]["strategy"] if rows[0]["stage"] == ALONE else rows[0]["stage"]
    causes = {"optimizer": "AdamW", "activations": "kept", "head_and_loss": "head"}
    causes |= {"trainable": "trained", "gradients": "grads", "workspace": "work"}
    columns = ["strategy", "peak", f"of {first}", *(causes.get(key, key) for key in rows[0]["by_cause"])]
    columns += ["params", "GF/token"]
    extra = {"largest_batch": "largest", "seconds": "s/micro-batch", "step_seconds": "s/step"}
    extra["tokens_per_second"] = "tokens/s"
    columns += [title for key, title in extra.items() if key in rows[0]]
    cells = []
    for row in rows:
        by = [sum(v.values()) if isinstance(v, dict) else v for v in row["by_cause"].values()]
        numbers = [row["peak_bytes"] / size, row["ratio"], *(v / size for v in by)]
        more = [round(row[key]) if key == "tokens_per_second" else row[key] for key in extra if key in row]
        trained = human_count(row["trainable_parameters"])
        cells.append([label(row), *numbers, trained, row["flops_per_token"] / 1e9, *more])
    return columns, cells


def count_parameters(model: nn.Module, own: Recipe | None, asked: Asked, json: bool) -> None:
    """Prints what each strategy would train, and of how many parameters."""
    from normtune.accounting import denominator, shares
    from normtune.cli.output import human_bytes, print_json, print_table
    from normtune.recipe import Lora

    parts = denominator(model)
    names = asked.names or names_of("all") or []
    lora = asked.lora(Lora() if own is None else own.stages[-1].lora)
    found, refused = shares(model, names, lora.rank, asked.every or asked.names is None, lora.targets)
    if json:
        keys = ("strategy", "trainable_parameters", "total_parameters", "percent", "trainable_bytes", "skipped")
        rows = [(s.strategy, s.trainable, s.total, s.percent, s.bytes, s.skipped) for s in found]
        plans = [dict(zip(keys, row, strict=True)) for row in rows]
        print_json({"denominator": parts, "plans": plans, "refused": refused})
        return
    print_table(
        ["strategy", "trainable", "% of total", "total", "fp32 bytes"],
        [[s.strategy, s.trainable, f"{s.percent:.4g}", s.total, human_bytes(s.bytes)] for s in found],
        type(model).__name__,
    )
    print_totals(parts, refused)
