"""`normtune norms`: the anatomy of a model, from its config alone."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import nn

    from normtune.structure import Anatomy

ROWS = (
    *("norms", "final_norm", "qk_norms", "vision_norms", "connector", "embed", "head"),
    *("attn_q", "attn_k", "attn_v", "attn_o", "attn_qkv", "mlp", "llm", "vision"),
)


def norms(
    model: Annotated[str, typer.Argument(help="Model folder or hub id; only its config is read.")],
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show a model's parts: norms and their formula, projections, embedding, connector; parameters and bytes of each.

    Example: normtune norms HuggingFaceTB/SmolLM2-360M-Instruct
    """
    from normtune.cli.output import human_bytes, print_json, print_table, quiet_libraries

    quiet_libraries()
    from normtune.skeletons import skeleton
    from normtune.structure import anatomy

    empty = skeleton(model)
    found = anatomy(empty)
    constants = found.constants(empty)
    total = sum(p.numel() for p in empty.parameters() if id(p) not in constants)
    parts = {part: facts for part in ROWS if (facts := describe(empty, found, part, total))}
    dtype = str(next(empty.parameters()).dtype).removeprefix("torch.")
    if json:
        about = {"model": model, "class": type(empty).__name__, "parameters": total, "dtype": dtype}
        print_json({**about, "blocks": len(found.blocks), "parts": parts})
        return
    rows: list[list[Any]] = [
        [
            part,
            facts["modules"],
            facts["parameters"],
            human_bytes(facts["bytes"]),
            f"{facts['percent']:.4f}",
            "; ".join(facts["formulas"]),
            facts["names"][0],
        ]
        for part, facts in parts.items()
    ]
    title = f"{type(empty).__name__}: {total:,} parameters, {len(found.blocks)} blocks, bytes in {dtype}"
    print_table(["part", "modules", "parameters", "bytes", "% of model", "formula", "first"], rows, title)


def describe(model: nn.Module, found: Anatomy, part: str, total: int) -> dict[str, Any] | None:
    """Modules, parameters, bytes (in the config's dtype), share and formulas of a part; None if the model lacks it."""
    from normtune.structure import formulas

    names = found.modules(part)
    if not names:
        return None
    members = found.parameters(model, part)
    count = sum(p.numel() for p in members)
    kinds: Counter[str] = Counter()
    if "norm" in part:
        for formula in formulas(model, names).values():
            eps = "" if formula.eps is None else f", eps {formula.eps:g}"
            kinds[f"{formula.kind}{eps}, computes in {formula.compute}"] += 1
    return {
        "modules": len(names),
        "parameters": count,
        "bytes": sum(p.numel() * p.element_size() for p in members),
        "percent": 100 * count / total,
        "formulas": dict(kinds),
        "names": names,
    }
