"""`swap(model, ...)`: norms, MLPs and attention of an LLM keep for backward what is needed, and nothing else.

Forward stays what it is; `restore(model)` gives every module its own forward back. Which norms follow which formula
is the caller's knowledge (structure). Not here: the functions (functions.py, attention.py), MLPs (mlp.py).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from normtune.kernels import attention
from normtune.kernels.functions import LeanNorm
from normtune.kernels.mlp import MLP, find_mlp, mlp_forward
from normtune.kernels.replacing import Forward, Replaced, call, is_plain, put_back, replace
from normtune.layers import is_linear


class NormFormula(Protocol):
    """What `structure.Formula` says of a norm."""

    @property
    def kind(self) -> str: ...
    @property
    def eps(self) -> float | None: ...


@dataclass
class Swaps:
    """What was swapped, and what was left alone and why (a line per class of module)."""

    norms: int = 0
    mlps: int = 0
    left: list[str] = field(default_factory=list)


class Lean(Replaced):
    """The forward of a swapped module."""


def swap(
    model: nn.Module,
    norms: Mapping[str, NormFormula],
    mlps: Iterable[str],
    attn: Iterable[str],
    eight_bit: bool = False,
) -> Swaps:
    """Swaps the modules in place; those that compute otherwise than expected are left alone.

    Args:
        norms: names of norms and their formulas.
        mlps: names of modules that may be MLPs.
        attn: names of attention modules; those that run on transformers' sdpa function run on a lean one.
        eight_bit: MLPs keep their gate and up (or, without a gate, the input of their activation) as int8.
    """
    done, left = Swaps(), Counter[str]()
    for name, formula in norms.items():
        module = model.get_submodule(name)
        if formula.kind == "own":
            left[f"{type(module).__name__}: no known formula"] += 1
            continue
        centred, offset = formula.kind.startswith("layernorm"), float("1+g" in formula.kind)
        replace(module, Lean, norm_forward, centred, offset, formula.eps or 0.0)
        done.norms += 1
    known: dict[tuple[str, str], MLP | None] = {}
    for name in mlps:
        module = model.get_submodule(name)
        if is_linear(module):  # the MLP is not a module of its own
            continue
        # what a module prints does not say all that it computes by (Gemma 3n: how sparse this layer's MLP is)
        facts = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str) and k != "training"}
        kind = str(module), repr(facts)
        if kind not in known:
            known[kind] = find_mlp(module)
        found = known[kind]
        if found is None or not is_plain(module):
            left[f"{type(module).__name__}: not recognized as an MLP"] += 1
            continue
        replace(module, Lean, gated_forward, found, eight_bit)
        done.mlps += 1
    for name in attn:
        attention.mark(model.get_submodule(name))
    done.left = [f"{number} x {what}" for what, number in left.items()]
    return done


def restore(model: nn.Module) -> None:
    """Takes back what `swap` did; nothing happens to a model that was not swapped."""
    for module in model.modules():
        put_back(module, Lean)
        attention.unmark(module)


def norm_forward(
    module: nn.Module, before: Forward | None, centred: bool, offset: float, eps: float, x: torch.Tensor, *rest: Any
) -> torch.Tensor:
    own = functools.partial(call, module, before)
    if rest or torch.compiler.is_compiling():  # a gate, which the formula does not know; a graph (see compiling.py)
        return own(x, *rest)  # type: ignore[no-any-return]
    gain, *rest_of = module.parameters(recurse=False)
    bias = rest_of[0] if rest_of else None
    if not torch.is_grad_enabled() or not (x.requires_grad or gain.requires_grad):
        return own(x)  # type: ignore[no-any-return]
    return LeanNorm.apply(x, gain, bias, own, centred, offset, eps)  # type: ignore[no-any-return,no-untyped-call]


def gated_forward(
    module: nn.Module, before: Forward | None, mlp: MLP, eight_bit: bool, x: torch.Tensor
) -> torch.Tensor:
    return mlp_forward(module, mlp, x, eight_bit)
