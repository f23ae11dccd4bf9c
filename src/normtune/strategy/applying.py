"""The public verbs: `apply` a strategy, `check` whether it could be applied, groups for an optimizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from normtune.errors import InputError
from normtune.kernels import is_quantized, keep_differentiable
from normtune.layers import unwrapped
from normtune.strategy.lora import add_lora, check_options, is_trained, lora_targets, remove_lora
from normtune.strategy.state import (
    GAIN_PARTS,
    Tuning,
    count,
    gain_names,
    norm_formulas,
    plain,
    refuse_banked,
    set_trainable,
    tuning,
)
from normtune.strategy.table import resolve, select


@dataclass
class Report:
    """What `apply` made trainable.

    Attributes:
        trainable: parameter names, tied tensors once.
        parameters, total: how many; `total` counts the LoRA matrices (PEFT's convention) and not constant modules.
        bytes: of the trainable tensors (fp32).
        part_of: trainable name -> the part that it belongs to.
        skipped: parts of a named strategy that the model lacks.
        formulas: formula of the trained norms -> number of norms.
        notes: what a user should know: norms of an unknown formula, experts that LoRA does not reach.
    """

    strategy: str
    parts: tuple[str, ...]
    trainable: list[str]
    parameters: int
    total: int
    bytes: int
    part_of: dict[str, str]
    skipped: list[str] = field(default_factory=list)
    formulas: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def percent(self) -> float:
        return 100 * self.parameters / self.total

    def by_part(self, model: nn.Module) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for name, parameter in model.named_parameters():
            if name in self.part_of:
                counts[self.part_of[name]] += parameter.numel()
        return dict(counts)


def apply(
    model: nn.Module,
    strategy: str | Sequence[str],
    *,
    rank: int = 64,
    alpha: float = 128,
    dropout: float = 0.05,
    targets: Sequence[str] | None = None,
    seed: int = 0,
) -> Report:
    """Makes the strategy's parameters trainable in fp32, freezes the rest; the last strategy applied holds.

    Args:
        strategy: a name of `STRATEGIES`, or a list of parts (`norms`, `connector`, ..., `regex:PATTERN`).
        rank, alpha, dropout, seed: of the `lora` part.
        targets: of the `lora` part: parts (`attn_q`, `mlp`, ...) or `regex:PATTERN`; None is every linear layer of
            the blocks.

    Raises:
        InputError: unknown strategy, part or LoRA target, a part that the model lacks (for a name: its own part, or
            all), a float16 base, quantized or offloaded weights among the trainable ones, trained LoRA that would
            be lost, a model in a bank. The model is as it was then.
    """
    model = unwrapped(model)
    refuse_banked(model)
    label, parts, explicit = resolve(strategy)
    state = tuning(model)
    part_of, skipped = select(model, state.anatomy, parts, explicit)
    refuse(model, state, part_of, label)
    chosen = [targets] if isinstance(targets, str) else None if targets is None else sorted(targets)
    options = {"rank": rank, "alpha": alpha, "dropout": dropout, "seed": seed, "targets": chosen}
    check_options(state.anatomy, options)
    if state.lora not in (None, options if "lora" in parts else None) and is_trained(model):
        raise InputError(
            f"{label} would throw away the LoRA that was trained on this model;\n"
            "keep lora among the parts, with the same options, or normtune.merge it first"
        )
    keep_differentiable(model)
    if "lora" in parts:
        add_lora(model, state, options)
    else:
        remove_lora(model, state)
    part_of, skipped = select(model, state.anatomy, parts, explicit)
    set_trainable(model, state, part_of.keys())
    state.report = make_report(model, state, label, parts, part_of, skipped)
    return state.report


def check(
    model: nn.Module, strategy: str | Sequence[str], targets: Sequence[str] | None = None
) -> dict[str, list[nn.Parameter]]:
    """The parts that `apply` would train and their parameters (none yet for `lora`); a tied head is part of `embed`.

    Raises as `apply` does, and touches nothing.
    """
    model = unwrapped(model)
    label, parts, explicit = resolve(strategy)
    state = tuning(model)
    part_of, _ = select(model, state.anatomy, parts, explicit)
    refuse(model, state, part_of, label)
    if "lora" in parts:
        lora_targets(state.anatomy, None if targets is None else list(targets))
    members: dict[str, list[nn.Parameter]] = {"lora": []} if "lora" in parts else {}
    for name, parameter in model.named_parameters():
        if name in part_of:
            members.setdefault(part_of[name], []).append(parameter)
    return members


def refuse(model: nn.Module, state: Tuning, part_of: Mapping[str, str], label: str) -> None:
    """Raises InputError for what cannot be trained safely."""
    if state.dtype == torch.float16:
        raise InputError(
            "a float16 base is not tuned: gradients of its activations underflow without loss scaling;\n"
            "load it with dtype=torch.bfloat16 (or float32)"
        )
    for name, parameter in model.named_parameters():
        if name in part_of and parameter.is_meta and is_offloaded(model):
            raise InputError(
                f"{label}: {name} is offloaded to the CPU or the disk by accelerate and would not train;\n"
                "load the model without offloading (device_map without cpu and disk, or a smaller or quantized base)"
            )
        if name in part_of and is_quantized(parameter):
            raise InputError(
                f"{label}: {name} (part {part_of[name]}) is quantized and cannot be trained;\n"
                "use layernorm, layernorm-simple, connector or lora, or load the base in bfloat16"
            )


def is_offloaded(model: nn.Module) -> bool:
    """Whether hooks of accelerate keep weights elsewhere between uses."""
    hooks = [vars(module).get("_hf_hook") for module in model.modules()]
    flat = [h for hook in hooks if hook is not None for h in (hook, *getattr(hook, "hooks", ()))]
    return any(getattr(hook, "offload", False) for hook in flat)


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    *,
    learning_rates: Mapping[str, float] | None = None,
    weight_decay: float = 0.0,
    weight_decays: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: one per part and decay. Gains and biases never decay.

    Args:
        learning_rates, weight_decays: values by part that replace `learning_rate` and `weight_decay`.

    Raises:
        InputError: before `apply`, or a part that is not trained.
    """
    model, state = unwrapped(model), tuning(model)
    if state.report is None:
        raise InputError("nothing is trainable yet: call normtune.apply first")
    part_of, gains = state.report.part_of, gain_names(model, state.anatomy)
    rates, decays = dict(learning_rates or {}), dict(weight_decays or {})
    unknown = sorted({*rates, *decays} - set(part_of.values()))
    if unknown:
        trained = ", ".join(sorted(set(part_of.values())))
        raise InputError(f"a rate or decay is given for {', '.join(unknown)}, which is not trained; trained: {trained}")
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name in part_of:
            decayed = parameter.dim() > 1 and plain(name) not in gains and not name.endswith("bias")
            groups.setdefault((part_of[name], decayed), []).append(parameter)
    return [
        {
            "part": part,
            "params": members,
            "lr": rates.get(part, learning_rate),
            "weight_decay": decays.get(part, weight_decay) if decayed else 0.0,
        }
        for (part, decayed), members in groups.items()
    ]


def make_report(
    model: nn.Module,
    state: Tuning,
    label: str,
    parts: tuple[str, ...],
    part_of: dict[str, str],
    skipped: list[str],
) -> Report:
    found = state.anatomy
    constants = found.constants(model)
    counted = [(name, p) for name, p in model.named_parameters() if id(p) not in constants]
    trainable = [(name, p) for name, p in counted if name in part_of]
    owners = {plain(name).rpartition(".")[0] for name, _ in trainable}
    norms = [name for part in GAIN_PARTS for name in found.modules(part) if name in owners]
    kinds = norm_formulas(model, norms)
    return Report(
        strategy=label,
        parts=parts,
        trainable=[name for name, _ in trainable],
        parameters=sum(p.numel() for _, p in trainable),
        total=sum(count(p) for _, p in counted),
        bytes=sum(p.numel() * p.element_size() for _, p in trainable),
        part_of={name: part_of[name] for name, _ in trainable},
        skipped=skipped,
        formulas=dict(Counter(kind.kind for kind in kinds.values())),
        notes=[*strange(model, kinds), *unreached(model, state)],
    )


def strange(model: nn.Module, kinds: Mapping[str, Any]) -> list[str]:
    """A note per class of norm whose formula is not one that we know."""
    found: dict[str, tuple[str, int]] = {}
    for name, kind in kinds.items():
        if kind.kind == "own":
            label = type(model.get_submodule(name)).__name__
            found[label] = (kind.nearest, found.get(label, ("", 0))[1] + 1)
    return [
        f"{number} norms ({label}) follow no known formula ({nearest}): they train through their own forward, "
        "which is not lean"
        for label, (nearest, number) in found.items()
    ]


def unreached(model: nn.Module, state: Tuning) -> list[str]:
    """LoRA adapts layers; experts that keep all their weights in one tensor stay as they are."""
    if state.lora is None:
        return []
    roots = tuple(root + "." for root in state.anatomy.mlp)
    stacked = [p for name, p in model.named_parameters() if p.dim() == 3 and name.startswith(roots)]
    total = sum(p.numel() for p in stacked)
    return [f"LoRA does not reach {len(stacked)} stacked expert tensors ({total:,} weights)"] if stacked else []
