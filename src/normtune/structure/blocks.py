"""What is in a decoder block: norms on the residual stream, attention and its projections, MLP, other mixers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from normtune.layers import features, is_linear
from normtune.structure.norms import NormFinder, own_parameters

# What only a module that mixes positions is given: a mask, a cache, positions.
MIXER_INPUTS = {
    *("attention_mask", "position_embeddings", "position_ids", "position_bias", "alibi", "rotary_pos_emb"),
    *("past_key_values", "past_key_value", "layer_past", "cache_params", "cache", "state", "cu_seqlens"),
}


@dataclass
class BlockParts:
    """Full names of the modules of one block, by what they are."""

    norms: list[str] = field(default_factory=list)
    inner_norms: list[str] = field(default_factory=list)  # inside attention or another mixer
    attn: list[str] = field(default_factory=list)
    roles: dict[str, list[str]] = field(default_factory=lambda: {role: [] for role in ("q", "k", "v", "o", "qkv")})
    mlp: list[str] = field(default_factory=list)
    behind: list[str] = field(default_factory=list)  # what stands behind a norm in one module with it


def named(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules below and including `module`, with full names."""
    for name, sub in module.named_modules():
        yield (f"{prefix}.{name}" if name else prefix), sub


def block_parts(block: nn.Module, prefix: str, finder: NormFinder, width: int) -> BlockParts:
    """Sorts the children of a block; a child that only wraps norms and attention (DBRX) is looked into."""
    parts = BlockParts()
    collect(block, prefix, finder, width, parts)
    parts.mlp = parts.mlp or parts.behind  # beside an MLP it is a gate, which belongs to no part of its own
    return parts


def collect(owner: nn.Module, prefix: str, finder: NormFinder, width: int, parts: BlockParts) -> None:
    for child_name, child in owner.named_children():
        name = f"{prefix}.{child_name}"
        if finder.is_norm(child):
            parts.norms.append(name)
        elif isinstance(child, nn.ModuleList | nn.ModuleDict) or is_wrapper(child, finder):
            collect(child, name, finder, width, parts)
        elif mixes_positions(child):
            parts.inner_norms += [n for n, m in named(child, name) if finder.is_norm(m)]
            if not any(isinstance(m, nn.modules.conv._ConvNd) for m in child.modules()):  # no state-space mixer
                parts.attn.append(name)
                for role, found in projections(child, name, width).items():
                    parts.roles[role] += found
        elif starts_with_norm(child, finder, width):
            first, *rest = child.named_children()
            parts.norms.append(f"{name}.{first[0]}")
            parts.behind += [f"{name}.{key}" for key, m in rest if any(p.dim() > 1 for p in m.parameters())]
        elif any(p.dim() > 1 for p in child.parameters()):
            parts.mlp.append(name)


def starts_with_norm(module: nn.Module, finder: NormFinder, width: int) -> bool:
    """A norm of the residual stream with something behind it: a gate, or in some blocks the MLP."""
    first = next(module.children(), None)
    return first is not None and finder.is_norm(first) and own_parameters(first)[0].shape == (width,)


def mixes_positions(module: nn.Module) -> bool:
    """Whether a module's forward is given a mask, a cache or positions: attention or a recurrent mixer."""
    return not MIXER_INPUTS.isdisjoint(inspect.signature(type(module).forward).parameters)


def is_wrapper(module: nn.Module, finder: NormFinder) -> bool:
    """A module without weights of its own, whose children are norms and a mixer."""
    children = list(module.children())
    own = [*module.parameters(recurse=False), *(p for c in children if is_linear(c) for p in c.parameters())]
    if own or not mixes_positions(module) or not any(finder.is_norm(c) for c in children):
        return False
    return any(mixes_positions(m) for c in children for m in c.modules())


def projections(attention: nn.Module, prefix: str, width: int) -> dict[str, list[str]]:
    """Names of the q, k, v, o projections, or of the fused qkv and o; empty lists for any other arrangement.

    Of two or three linear layers (the third a gate) the widest is the fused one: its output is longer than the input
    of o, which is as long as q; two of equal length are q and o of a layer that shares its keys. Of four or more, q, k
    and v are told by the paper's letters where each stands for one layer, else by their order; o maps back to the
    hidden size what is as long as q, and has its letter or comes last.

    Args:
        width: hidden size H of the residual stream.
    """
    roles: dict[str, list[str]] = {role: [] for role in ("q", "k", "v", "o", "qkv")}
    linears = {n: features(m) for n, m in named(attention, prefix) if is_linear(m)}
    if len(linears) < 2:
        return roles
    back = [n for n, (_, size) in linears.items() if size == width]
    if len(linears) < 4:
        fused = max(linears, key=lambda n: linears[n][1])
        outs = [n for n in back if n != fused and linears[n][0] < linears[fused][1]]
        if outs and linears[fused][0] == width:
            return {**roles, "qkv": [fused], "o": outs[:1]}
        first, *_, last = linears
        shared = linears[first] == linears[last][::-1] and linears[first][0] == width and len(linears) == 2
        return {**roles, "q": [first], "o": [last]} if shared else roles
    by_letter = {r: [n for n in linears if n.rpartition(".")[2].startswith(r)] for r in "qkv"}
    if all(len(names) == 1 for names in by_letter.values()):
        q, k, v = (by_letter[role][0] for role in "qkv")
    elif len(linears) == 4 and not any(by_letter.values()):
        q, k, v = list(linears)[:3]
    else:
        return roles
    rest = [n for n in back if n not in (q, k, v)]
    outs = [n for n in rest if n.rpartition(".")[2].startswith("o")] or rest
    outs = [n for n in outs if linears[n][0] == linears[q][1]] or outs
    inputs = {linears[n][0] for n in (q, k, v)}
    if not outs or len(inputs) > 1 or linears[q][1] % linears[k][1]:
        return roles
    return {**roles, "q": [q], "k": [k], "v": [v], "o": [outs[-1]]}
