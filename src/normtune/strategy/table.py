"""The table of strategies, and the parameters of a part."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from normtune.errors import InputError, did_you_mean
from normtune.strategy.state import is_lora, plain
from normtune.structure import PART_NAMES, Anatomy, without_gains

STRATEGIES: dict[str, tuple[str, ...]] = {
    "connector": ("connector",),
    "layernorm": ("norms", "connector", "embed", "head"),
    "layernorm-simple": ("norms",),
    "attn-qv": ("attn_qv", "connector", "embed", "head"),
    "attn-mlp": ("mlp", "connector", "embed", "head"),
    "lora": ("lora", "connector", "embed", "head"),
    "full": ("llm", "connector"),
}


def resolve(strategy: str | Sequence[str]) -> tuple[str, tuple[str, ...], bool]:
    """(label, parts, whether the parts were named one by one).

    Raises:
        InputError: an unknown strategy or part, or an empty list.
    """
    if isinstance(strategy, str):
        if strategy not in STRATEGIES:
            known = ", ".join(STRATEGIES)
            hint = f"; a part is given as a list: [{strategy}]" if strategy in PART_NAMES else ""
            raise InputError(f"unknown strategy {strategy!r}{did_you_mean(strategy, STRATEGIES)}; known: {known}{hint}")
        return strategy, STRATEGIES[strategy], False
    if not isinstance(strategy, Sequence):
        raise InputError(f"a strategy is a name or a list of parts, not {strategy!r}; known: {', '.join(STRATEGIES)}")
    parts = tuple(strategy)
    if not parts:
        raise InputError("an empty list of parts trains nothing; name at least one of " + ", ".join(PART_NAMES))
    for part in parts:
        if part not in PART_NAMES and not str(part).startswith("regex:"):
            known = ", ".join(PART_NAMES)
            raise InputError(
                f"unknown part {part!r}{did_you_mean(str(part), PART_NAMES)}; known: {known}, regex:PATTERN"
            )
    return "+".join(parts), parts, True


def select(model: nn.Module, found: Anatomy, parts: Sequence[str], explicit: bool) -> tuple[dict[str, str], list[str]]:
    """Trainable name -> part, and the parts that the model lacks. A specific part wins over `llm`.

    Raises:
        InputError: a part that the model lacks: any of an explicit list, norms of a strategy that is named after
            them, or all parts.
    """
    part_of: dict[str, str] = {}
    skipped = []
    for part in sorted(parts, key=lambda p: p == "llm"):
        names = part_parameters(model, found, part)
        if not names and not (part == "lora" and found.linears):
            skipped.append(part)
        for name in names:
            part_of.setdefault(name, part)
    if "norms" in skipped:
        raise InputError(without_gains(model, found))
    if explicit and skipped:
        raise InputError(missing(model, found, skipped[0]))
    own = [part for part in ("attn_qv", "mlp", "lora", "llm") if part in skipped]
    if own:  # what is left would be another strategy under this one's name
        raise InputError(missing(model, found, own[0]))
    if set(skipped) == set(parts):
        raise InputError(f"{type(model).__name__} has none of the parts {', '.join(parts)}: nothing to train")
    return part_of, skipped


def missing(model: nn.Module, found: Anatomy, part: str) -> str:
    """Why the model has no such part, and what it has instead."""
    name = type(model).__name__
    if part in ("attn_q", "attn_k", "attn_v", "attn_qv"):
        if found.attn_qkv:
            return (
                f"{name}: q and v are slices of one fused projection ({found.attn_qkv[0]}) and cannot be trained "
                "alone;\ntrain the whole projection with the list of parts [attn_qkv], or use lora"
            )
        if found.attn:
            leaves = [n for n in found.linears if n.startswith(found.attn[0] + ".")]
            return (
                f"{name}: the roles of the projections in {found.attn[0]} are not plain q, k, v, o "
                f"({', '.join(n.rpartition('.')[2] for n in leaves)});\nname them with a regex part, or use lora"
            )
    if part.startswith("regex:"):
        return f"part {part!r} matches no parameter of {name}; `normtune norms MODEL` lists its parts"
    present = [p for p in PART_NAMES if p != "lora" and part_parameters(model, found, p)]
    return f"{name} has no part {part!r}; it has {', '.join(present)}"


def part_parameters(model: nn.Module, found: Anatomy, part: str) -> list[str]:
    """Names of a part's parameters, tied ones under their first name, constant modules left out."""
    tied = {id(p): name for name, p in model.named_parameters()}
    constant = found.constants(model)
    if part == "lora":
        return [name for name in tied.values() if is_lora(name)]
    if part.startswith("regex:"):
        try:
            pattern = re.compile(part.removeprefix("regex:"))
        except re.error as error:
            raise InputError(f"part {part!r} is no regular expression: {error}") from None
        return [
            name
            for name, p in model.named_parameters()
            if pattern.search(plain(name)) and id(p) not in constant and not is_lora(name)
        ]
    names: dict[str, None] = dict.fromkeys(found.loose if part == "connector" else ())
    for root in found.modules(part):
        for key, parameter in model.get_submodule(root).named_parameters():
            name = tied[id(parameter)]
            if id(parameter) in constant or is_lora(name) or (part == "bias" and not key.endswith("bias")):
                continue
            if part in ("llm", "bias") and name.startswith(tuple(f"{root}." for root in found.vision)):
                continue  # an encoder inside the LLM's module
            names[name] = None
    return list(names)
