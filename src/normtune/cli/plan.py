"""`normtune plan`: memory, trained parameters and work of a training step, from configs alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from normtune.memory import Job, Plan
    from normtune.recipe import Recipe

COMPARED = "full,lora,layernorm,layernorm-simple"
ALONE = "plan"  # the stage of a strategy that is planned without a recipe


def plan(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe; or give --llm and --vision.")] = None,
    llm: Annotated[str | None, typer.Option(help="Folder or hub id of the LLM; only its config is read.")] = None,
    vision: Annotated[str | None, typer.Option(help="The same of the vision encoder.")] = None,
    connector: Annotated[Literal["linear", "mlp"], typer.Option(help="Kind of the connector.")] = "mlp",
    strategy: Annotated[str | None, typer.Option(help="One strategy; parts of a list joined by +.")] = None,
    compare: Annotated[str | None, typer.Option(help="Strategies by comma, side by side; all: every one.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Samples in a micro-batch (default 1).")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens of a sample, image tokens included.")] = None,
    supervised: Annotated[int | None, typer.Option(min=1, help="Supervised tokens of a sample (default 100).")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "nf4", "int8"] | None, typer.Option(help="Of the frozen weights.")
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(min=1, help="Rank of LoRA (default 64).")] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Find the largest micro-batch for it, e.g. 24GB.")] = None,
    rate: Annotated[float | None, typer.Option(min=0.001, help="TFLOP/s reached, for an estimate of time.")] = None,
    parameters: Annotated[bool, typer.Option("--parameters", help="Count parameters only.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what a training step would take, before anything is downloaded or rented: peak memory by cause, FLOPs.

    Example: normtune plan --llm meta-llama/Llama-2-13b-hf --vision openai/clip-vit-large-patch14 --length 776
    """
    from normtune.cli.output import print_json, quiet_libraries
    from normtune.errors import InputError
    from normtune.memory import parse_memory

    if (recipe is None) == (llm is None):
        raise InputError("give either a recipe, or --llm (with --vision for a multimodal model)")
    if strategy is not None and compare is not None:
        raise InputError("give either --strategy or --compare")
    quiet_libraries()
    options = {"batch": batch, "length": length, "supervised": supervised}
    memory = None if gpu_memory is None else parse_memory(gpu_memory)
    asked = Asked(strategy or compare, dtype, lora_rank, {k: v for k, v in options.items() if v is not None})
    own, build = model_of(recipe, llm, vision, connector)
    from normtune.accounting import denominator

    parts = denominator(build())
    if parameters:
        count_parameters(build(), parts, asked, json)
        return
    rows, refused = plan_all(jobs_of(own, build, asked), asked.skips, memory, rate)
    if json:
        print_json({"denominator": parts, "plans": rows, "refused": refused})
        return
    print_plans(rows, parts, refused, gpu_memory)


@dataclass(frozen=True)
class Asked:
    """What the options ask for; None where they do not."""

    strategies: str | None
    dtype: str | None
    rank: int | None
    shape: dict[str, int]

    @property
    def skips(self) -> bool:
        """Whether strategies that the model cannot take are left out instead of being an error."""
        return self.strategies == "all"

    def names(self, default: str) -> list[str | list[str]]:
        """What is asked for, or the `default`, parts joined by + as lists; raises InputError for unknown names."""
        from normtune.recipe.schema import PARTS, STRATEGIES
        from normtune.strategy import resolve

        text = self.strategies or default
        wanted = list(STRATEGIES) if text == "all" else [name.strip() for name in text.split(",")]
        found = [n if n in STRATEGIES or (n not in PARTS and "+" not in n) else n.split("+") for n in wanted]
        for name in found:
            resolve(name)
        return found


def model_of(
    recipe: Path | None, llm: str | None, vision: str | None, connector: Literal["linear", "mlp"]
) -> tuple[Recipe | None, Callable[[], nn.Module]]:
    """The recipe, if there is one, and what makes its model, or that of the options, on the meta device."""
    from normtune.recipe import ModelRecipe, load_recipe
    from normtune.skeletons import assembled_skeleton, skeleton

    if recipe is not None:
        from normtune.world import resolve

        own = resolve(load_recipe(recipe))
        return own, lambda: assembled_skeleton(own.model)
    if vision is None:
        return None, lambda: skeleton(str(llm))
    model = ModelRecipe(llm=llm, vision=vision, connector=connector)
    return None, lambda: assembled_skeleton(model)


def jobs_of(recipe: Recipe | None, build: Callable[[], nn.Module], asked: Asked) -> list[Job]:
    """What to plan: the recipe's own stages, or strategies in place of its last one's, or on their own."""
    from normtune.memory import Job, Shape, shape_of
    from normtune.recipe import DataSource, Lora, Stage

    if recipe is not None:
        dtype = asked.dtype or recipe.model.dtype
        last = recipe.stages[-1]
        stages = list(recipe.stages)
        if asked.strategies is not None:
            plain: dict[str, Any] = {"learning_rates": {}, "weight_decays": {}}  # of parts that others do not train
            stages = [last.model_copy(update={"strategy": s, **plain}) for s in asked.names("")]
        shapes = [replace(shape_of(stage, recipe.device), **asked.shape) for stage in stages]
    else:
        dtype = asked.dtype or "bfloat16"
        source = DataSource(path="none")
        stages = [Stage(name=ALONE, strategy=s, data=[source], learning_rate=1e-3) for s in asked.names(COMPARED)]
        shapes = [replace(Shape(), **asked.shape)] * len(stages)
    if asked.rank is not None:
        lora = Lora(rank=asked.rank, alpha=2.0 * asked.rank)
        stages = [stage.model_copy(update={"lora": lora}) for stage in stages]
    return [Job(build, stage, shape, dtype) for stage, shape in zip(stages, shapes, strict=True)]


def plan_all(
    jobs: list[Job], skip: bool, memory: float | None, rate: float | None
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row per job, and why the model cannot take the others (with `skip`)."""
    from normtune.errors import InputError
    from normtune.progress import Bar

    rows: list[dict[str, Any]] = []
    refused: dict[str, str] = {}
    with Bar("plan", len(jobs)) as bar:
        for number, job in enumerate(jobs):
            try:
                found = job.plan()
            except InputError as error:
                if not skip:
                    raise
                refused[str(job.stage.strategy)] = str(error)
                continue
            rows.append({"stage": job.stage.name, **found.to_dict(), **estimates(job, found, memory, rate)})
            bar.update(number + 1, found.strategy)
    for row in rows:
        row["ratio"] = row["peak_bytes"] / rows[0]["peak_bytes"]
    return rows, refused


def estimates(job: Job, found: Plan, memory: float | None, rate: float | None) -> dict[str, Any]:
    """The largest batch for a memory, time and tokens/s at a rate; what was not asked for is left out."""
    more: dict[str, Any] = {}
    if memory is not None:
        more["largest_batch"] = job.largest_batch(memory)
    if rate is not None:
        more["seconds"] = found.step_flops / (rate * 1e12)
        more["tokens_per_second"] = rate * 1e12 / found.flops_per_token
    return more


def print_plans(rows: list[dict[str, Any]], parts: dict[str, int], refused: dict[str, str], memory: str | None) -> None:
    from normtune.cli.output import human_bytes, print_table
    from normtune.memory import USABLE

    shapes = dict.fromkeys(f"{row['batch']} x {row['length']} tokens" for row in rows)
    if rows:
        print_table(*table(rows), f"a micro-batch of {', then '.join(shapes)} on a base in {rows[0]['dtype']}")
    for row in rows:
        kept = ", ".join(f"{kind} {human_bytes(size)}" for kind, size in row["by_cause"]["activations"].items() if size)
        print(f"{label(row)} keeps for backward at its peak: {kept or 'nothing'}")
    for note in dict.fromkeys(note for row in rows for note in row["notes"]):
        print(f"note: {note}")
    if memory is not None:
        print(f"largest: samples of that length whose peak stays within {USABLE:.0%} of {memory}; 0: not even one")
    print_totals(parts, refused)


def print_totals(parts: dict[str, int], refused: dict[str, str]) -> None:
    total = " + ".join(f"{name} {number:,}" for name, number in parts.items())
    print(f"total: {total}; for LoRA its matrices, too")
    for name, reason in refused.items():
        print(f"{name}: not here: {reason.splitlines()[0]}")


def label(row: dict[str, Any]) -> str:
    name = row["strategy"] if row["lora_rank"] is None else f"{row['strategy']} (r = {row['lora_rank']})"
    return name if row["stage"] == ALONE else f"{row['stage']}: {name}"


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and cells; sizes in GiB, or MiB where all is small."""
    unit, size = ("GiB", 2**30) if max(row["peak_bytes"] for row in rows) > 2**29 else ("MiB", 2**20)
    causes = {key: key.replace("_and_", ", ") for key in rows[0]["by_cause"]}
    columns = ["strategy", f"peak {unit}", "ratio", *causes.values(), "trained", "GFLOP/token"]
    extra = {"largest_batch": "largest", "seconds": "seconds", "tokens_per_second": "tokens/s"}
    columns += [title for key, title in extra.items() if key in rows[0]]
    cells = []
    for row in rows:
        by = [sum(v.values()) if isinstance(v, dict) else v for v in row["by_cause"].values()]
        numbers = [row["peak_bytes"] / size, row["ratio"], *(v / size for v in by)]
        more = [row[key] for key in extra if key in row]
        cells.append([label(row), *numbers, row["trainable_parameters"], row["flops_per_token"] / 1e9, *more])
    return columns, cells


def count_parameters(model: nn.Module, parts: dict[str, int], asked: Asked, json: bool) -> None:
    """Prints what each strategy would train, and of how many parameters."""
    from normtune.accounting import shares
    from normtune.cli.output import human_bytes, print_json, print_table

    every = asked.strategies is None or asked.skips
    found, refused = shares(model, asked.names("all"), asked.rank or 64, skip=every)
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
