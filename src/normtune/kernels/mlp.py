"""MLPs by behaviour: down(act(gate(x)) * up(x)), the same with gate and up in one layer, or down(act(up(x))).

Which it is, which layer is which and which child is the activation is found by running the module's own forward on a
twin of it whose linear layers are tiny and random; no weight of the model is read. Not here: what backward keeps
(functions.py).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from normtune.kernels.functions import Unary, elementwise, gated_product
from normtune.layers import features, is_linear

HIDDEN, INNER = 6, 10  # sizes of the twin's layers
FUNCTIONS: dict[str, Unary] = {
    "F.silu": F.silu,
    "F.gelu": F.gelu,
    "F.relu": F.relu,
}  # for a forward that calls them itself


@dataclass(frozen=True)
class MLP:
    """How an MLP computes; names of its children.

    Attributes:
        kind: `gated`, `fused` (one layer `up` gives both halves; `gate_first` tells which is the gate) or `plain`.
        act: name of a child or attribute, or of a function of torch.nn.functional (`F.silu`).
        dropout: name of a dropout behind `down`, or empty.
    """

    kind: str
    up: str
    down: str
    act: str
    gate: str = ""
    gate_first: bool = True
    dropout: str = ""


def find_mlp(module: nn.Module) -> MLP | None:
    """The arrangement that reproduces the module's own forward exactly, or None: then it is to be left alone."""
    linears = {name: child for name, child in module.named_children() if holds_weights(child)}
    others = [child for name, child in module.named_children() if name not in linears]
    if not 2 <= len(linears) <= 3 or any(True for child in others for _ in child.parameters()):
        return None
    drops = [name for name, child in module.named_children() if isinstance(child, nn.Dropout)]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        twin = make_twin(module, linears)
        if twin is None:
            return None
        x = torch.cat([torch.randn(3, HIDDEN), 1e4 * torch.randn(3, HIDDEN)])  # large ones show clamps
        try:
            torch.manual_seed(1)  # so that dropout shows where it is
            wanted = type(module).forward(twin, x)
        except Exception:  # takes more than one input, or does something with its sizes
            return None
        for candidate in candidates(linears, callables(module), ["", *drops]):
            if isinstance(wanted, torch.Tensor) and torch.equal(run(twin, candidate, x), wanted):
                return candidate
    return None


def holds_weights(child: nn.Module) -> bool:
    """A linear layer, or what PEFT puts in its place."""
    return is_linear(child) or hasattr(child, "in_features")


def make_twin(module: nn.Module, linears: dict[str, nn.Module]) -> nn.Module | None:
    """A shallow copy with tiny random layers of sizes in the same proportion; None for sizes that fit no MLP."""
    hidden = features(next(iter(linears.values())))[0]
    sizes = {hidden: HIDDEN}
    inner = [features(child)[0] for child in linears.values() if features(child)[0] != hidden]
    if len(set(inner)) > 1:
        return None
    sizes.update({inner[0]: INNER, 2 * inner[0]: 2 * INNER} if inner else {2 * hidden: 2 * HIDDEN})
    twin = copy.copy(module)
    twin.__dict__.pop("forward", None)
    twin._modules = dict(module._modules)
    for name, child in module.named_children():
        twin._modules[name] = copy.copy(child)
    for name, child in linears.items():
        size_in, size_out = features(child)
        if size_in not in sizes or size_out not in sizes:
            return None
        with_bias = getattr(child, "bias", None) is not None
        twin._modules[name] = nn.Linear(sizes[size_in], sizes[size_out], bias=with_bias)
    return twin.train()


def callables(module: nn.Module) -> list[str]:
    """Children and attributes that could be the activation."""
    plain = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
    children = [name for name, child in module.named_children() if not holds_weights(child)]
    return [*children, *(name for name in plain if name != "forward"), *FUNCTIONS]


def candidates(linears: dict[str, nn.Module], acts: list[str], drops: list[str]) -> Iterator[MLP]:
    for act, drop, names in itertools.product(acts, drops, itertools.permutations(linears)):
        if len(names) == 3:
            yield MLP("gated", gate=names[0], up=names[1], down=names[2], act=act, dropout=drop)
        else:
            yield MLP("plain", up=names[0], down=names[1], act=act, dropout=drop)
            yield MLP("fused", up=names[0], down=names[1], act=act, dropout=drop)
            yield MLP("fused", up=names[0], down=names[1], act=act, dropout=drop, gate_first=False)


def run(module: nn.Module, mlp: MLP, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(1)
    try:
        return mlp_forward(module, mlp, x)
    except RuntimeError:  # sizes that do not fit
        return torch.empty(0)


def mlp_forward(module: nn.Module, mlp: MLP, x: torch.Tensor, eight_bit: bool = False) -> torch.Tensor:
    """The module's forward; x (..., H) -> (..., H). `eight_bit`: backward keeps 8-bit copies of gate and up."""
    act: Unary = FUNCTIONS[mlp.act] if mlp.act in FUNCTIONS else getattr(module, mlp.act)
    up = getattr(module, mlp.up)(x)
    if mlp.kind == "plain":
        inner = elementwise(up, act, eight_bit)
    else:
        if mlp.kind == "fused":
            first, second = up.chunk(2, dim=-1)
            gate, up = (first, second) if mlp.gate_first else (second, first)
        else:
            gate = getattr(module, mlp.gate)(x)
        inner = gated_product(gate, up, act, eight_bit)
    out = getattr(module, mlp.down)(inner)
    return getattr(module, mlp.dropout)(out) if mlp.dropout else out  # type: ignore[no-any-return]
