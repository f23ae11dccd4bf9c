"""`normtune plan`: what each strategy would train, from configs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def plan(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe; or give --llm and --vision.")] = None,
    llm: Annotated[str | None, typer.Option(help="Folder or hub id of the LLM; only its config is read.")] = None,
    vision: Annotated[str | None, typer.Option(help="The same of the vision encoder.")] = None,
    connector: Annotated[Literal["linear", "mlp"], typer.Option(help="Kind of the connector.")] = "mlp",
    compare: Annotated[str, typer.Option(help="Strategies by comma; parts of a list joined by +.")] = "all",
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of LoRA.")] = 64,
    parameters: Annotated[bool, typer.Option("--parameters", help="Parameters only (all that is planned yet).")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Count what each strategy would train, and say of how many.

    Example: normtune plan --llm meta-llama/Llama-2-7b-hf --vision openai/clip-vit-large-patch14 --connector linear
    """
    from normtune.cli.output import human_bytes, print_json, print_table, quiet_libraries
    from normtune.errors import InputError
    from normtune.recipe import ModelRecipe, load_recipe
    from normtune.recipe.schema import PARTS, STRATEGIES

    if (recipe is None) == (llm is None):
        raise InputError("give either a recipe, or --llm (with --vision for a multimodal model)")
    quiet_libraries()
    from normtune.accounting import denominator, shares
    from normtune.skeletons import assembled_skeleton, skeleton

    if recipe is not None:
        from normtune.world import resolve

        model = assembled_skeleton(resolve(load_recipe(recipe)).model)
    elif vision is None:
        model = skeleton(str(llm))
    else:
        model = assembled_skeleton(ModelRecipe(llm=llm, vision=vision, connector=connector))
    every = compare == "all"
    wanted = list(STRATEGIES) if every else [name.strip() for name in compare.split(",")]
    strategies = [n if n in STRATEGIES or (n not in PARTS and "+" not in n) else n.split("+") for n in wanted]
    parts = denominator(model)
    found, refused = shares(model, strategies, lora_rank, skip=every)
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
    total = " + ".join(f"{label} {number:,}" for label, number in parts.items())
    print(f"total: {total}; for LoRA its matrices, too")
    for name, reason in refused.items():
        print(f"{name}: not here: {reason.splitlines()[0]}")
