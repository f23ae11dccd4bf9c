"""`normtune norms`: the anatomy of a model, from its config alone."""

from __future__ import annotations

from typing import Annotated, Any

import typer

ROWS = (
    *("norms", "final_norm", "qk_norms", "vision_norms", "connector", "embed", "head"),
    *("attn_q", "attn_k", "attn_v", "attn_o", "mlp", "llm", "vision"),
)


def norms(
    model: Annotated[str, typer.Argument(help="Model folder or hub id; only its config is read.")],
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show which norms, projections and other parts a model has, and how many parameters each.

    Example: normtune norms HuggingFaceTB/SmolLM2-360M-Instruct
    """
    from normtune.cli.output import print_json, print_table, quiet_libraries

    quiet_libraries()
    from normtune.structure import anatomy
    from normtune.tuned import skeleton

    empty = skeleton(model)
    found = anatomy(empty)
    constant = {id(p) for name in found.constant for p in empty.get_submodule(name).parameters()}
    total = sum(p.numel() for p in empty.parameters() if id(p) not in constant)
    parts: dict[str, dict[str, Any]] = {}
    for part in ROWS:
        names = found.modules(part)
        if names:
            parameters = {id(p): p.numel() for name in names for p in empty.get_submodule(name).parameters()}
            count = sum(numbers for key, numbers in parameters.items() if key not in constant)
            parts[part] = {"modules": len(names), "parameters": count, "percent": 100 * count / total, "names": names}
    if json:
        print_json({"model": model, "class": type(empty).__name__, "parameters": total, "parts": parts})
        return
    rows: list[list[Any]] = [
        [part, facts["modules"], facts["parameters"], f"{facts['percent']:.4f}", facts["names"][0]]
        for part, facts in parts.items()
    ]
    title = f"{type(empty).__name__}: {total:,} parameters, {len(found.blocks)} blocks"
    print_table(["part", "modules", "parameters", "% of model", "first"], rows, title)
