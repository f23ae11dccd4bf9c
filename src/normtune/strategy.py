"""Strategies: which parts train. `apply(model, strategy)` freezes everything else and says what it did.

Scope: the table of strategies (PAPER: Zhao et al., arXiv 2312.11420), lists of parts, fp32 trainable tensors on any
base dtype, LoRA through PEFT. The only module with an opinion on strategies. Not here: where parts are
(structure.py), how fp32 parameters run in a bf16 model (kernels/precision.py), optimizers (training.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from normtune.errors import InputError, did_you_mean
from normtune.kernels import demote, promote
from normtune.structure import PART_NAMES, Anatomy, anatomy

STRATEGIES: dict[str, tuple[str, ...]] = {
    "connector": ("connector",),
    "layernorm": ("norms", "connector", "embed", "head"),
    "layernorm-simple": ("norms",),
    "attn-qv": ("attn_qv", "connector", "embed", "head"),
    "attn-mlp": ("mlp", "connector", "embed", "head"),
    "lora": ("lora", "connector", "embed", "head"),
    "full": ("llm", "connector"),
}
LORA_NAME = "default"


@dataclass
class Report:
    """What `apply` made trainable.

    Attributes:
        trainable: parameter names, tied tensors once.
        parameters, total: how many; `total` counts the LoRA matrices (PEFT's convention) and not constant modules.
        bytes: of the trainable tensors (fp32).
        part_of: trainable name -> the part that it belongs to.
        skipped: parts of a named strategy that the model lacks.
    """

    strategy: str
    parts: tuple[str, ...]
    trainable: list[str]
    parameters: int
    total: int
    bytes: int
    part_of: dict[str, str]
    skipped: list[str] = field(default_factory=list)

    @property
    def percent(self) -> float:
        return 100 * self.parameters / self.total

    def by_part(self, model: nn.Module) -> dict[str, int]:
        counts: dict[str, int] = {}
        for name, parameter in model.named_parameters():
            if name in self.part_of:
                part = self.part_of[name]
                counts[part] = counts.get(part, 0) + parameter.numel()
        return counts


@dataclass
class Tuning:
    """What normtune knows about a model that it tunes; kept on the model as `_normtune`.

    Attributes:
        dtype: of the base's weights and activations.
        base_gains: the base's own gains before any tuning, fp32 on the CPU.
        tuned: names of the parameters that an adapter must hold: trainable now, or changed by an earlier strategy.
        versions: torch's count of in-place changes of each trainable tensor when it became trainable.
    """

    anatomy: Anatomy
    dtype: torch.dtype
    base_gains: dict[str, torch.Tensor]
    tuned: list[str] = field(default_factory=list)
    versions: dict[str, int] = field(default_factory=dict)
    report: Report | None = None
    lora: dict[str, Any] | None = None


def tuning(model: nn.Module) -> Tuning:
    """The model's tuning state, made from its anatomy at the first call, before anything is tuned."""
    state = vars(model).get("_normtune")
    if state is None:
        found = anatomy(model)
        gains = [*found.norms, *found.final_norm, *found.qk_norms]
        base = {
            f"{name}.{key}": parameter.detach().float().cpu().clone()
            for name in gains
            for key, parameter in model.get_submodule(name).named_parameters()
            if not parameter.is_meta
        }
        embed = next(model.get_submodule(found.embed[0]).parameters())
        norm = next(model.get_submodule(found.norms[0]).parameters())
        dtype = embed.dtype if embed.dtype.is_floating_point else norm.dtype
        state = Tuning(found, dtype, base)
        model._normtune = state  # type: ignore[assignment]
    return state


def apply(
    model: nn.Module,
    strategy: str | Sequence[str],
    *,
    rank: int = 64,
    alpha: float = 128,
    dropout: float = 0.05,
    seed: int = 0,
) -> Report:
    """Makes the strategy's parameters trainable in fp32, freezes the rest; the last strategy applied holds.

    Args:
        strategy: a name of `STRATEGIES`, or a list of parts (`norms`, `connector`, ..., `regex:PATTERN`).
        rank, alpha, dropout, seed: of the `lora` part.

    Raises:
        InputError: unknown strategy or part, a part that the model lacks (for a name: if nothing is left).
    """
    label, parts, explicit = resolve(strategy)
    state = tuning(model)
    state.tuned = changed(model, state)
    options = {"rank": rank, "alpha": alpha, "dropout": dropout, "seed": seed}
    select(model, state.anatomy, parts, explicit)  # raises before anything is touched
    if "lora" in parts:
        add_lora(model, state, options)
    else:
        remove_lora(model, state)
    part_of, skipped = select(model, state.anatomy, parts, explicit)
    set_trainable(model, state, part_of)
    state.report = make_report(model, state, label, parts, part_of, skipped)
    return state.report


def check(model: nn.Module, strategy: str | Sequence[str]) -> set[str]:
    """The parts that `apply` would train; raises as it does, and touches nothing."""
    _, parts, explicit = resolve(strategy)
    _, skipped = select(model, tuning(model).anatomy, parts, explicit)
    return set(parts) - set(skipped)


def resolve(strategy: str | Sequence[str]) -> tuple[str, tuple[str, ...], bool]:
    """(label, parts, whether the parts were named one by one)."""
    if isinstance(strategy, str):
        if strategy not in STRATEGIES:
            known = ", ".join(STRATEGIES)
            raise InputError(f"unknown strategy {strategy!r}{did_you_mean(strategy, STRATEGIES)}; known: {known}")
        return strategy, STRATEGIES[strategy], False
    parts = tuple(strategy)
    if not parts:
        raise InputError("an empty list of parts trains nothing; name at least one of " + ", ".join(PART_NAMES))
    for part in parts:
        if part not in PART_NAMES and not part.startswith("regex:"):
            known = ", ".join(PART_NAMES)
            raise InputError(f"unknown part {part!r}{did_you_mean(part, PART_NAMES)}; known: {known}, regex:PATTERN")
    return "+".join(parts), parts, True


def select(model: nn.Module, found: Anatomy, parts: Sequence[str], explicit: bool) -> tuple[dict[str, str], list[str]]:
    """Trainable name -> part, and the parts that the model lacks. A specific part wins over `llm`."""
    part_of: dict[str, str] = {}
    skipped = []
    for part in sorted(parts, key=lambda p: p == "llm"):
        names = part_parameters(model, found, part)
        if not names and not (part == "lora" and found.linears):
            skipped.append(part)
        for name in names:
            part_of.setdefault(name, part)
    if explicit and skipped:
        raise InputError(missing(model, found, skipped[0]))
    if set(skipped) == set(parts):
        raise InputError(f"{type(model).__name__} has none of the parts {', '.join(parts)}: nothing to train")
    return part_of, skipped


def missing(model: nn.Module, found: Anatomy, part: str) -> str:
    if part == "attn_qv":
        return (
            f"the attention of {type(model).__name__} has no q and v projections of their own (they are fused into "
            "one weight);\ntrain the whole projection with a regex part, or use lora"
        )
    if part.startswith("regex:"):
        return f"part {part!r} matches no parameter of {type(model).__name__}; `normtune norms MODEL` lists its parts"
    present = [p for p in PART_NAMES if p != "lora" and part_parameters(model, found, p)]
    return f"{type(model).__name__} has no part {part!r}; it has {', '.join(present)}"


def part_parameters(model: nn.Module, found: Anatomy, part: str) -> list[str]:
    """Names of a part's parameters, tied ones under their first name, constant modules left out."""
    tied = {id(p): name for name, p in model.named_parameters()}
    constant = {id(p) for name in found.constant for p in model.get_submodule(name).parameters()}
    if part == "lora":
        return [name for name in tied.values() if is_lora(name)]
    if part.startswith("regex:"):
        try:
            pattern = re.compile(part.removeprefix("regex:"))
        except re.error as error:
            raise InputError(f"part {part!r} is no regular expression: {error}") from None
        return [name for name, p in model.named_parameters() if pattern.search(name) and id(p) not in constant]
    names: dict[str, None] = {}
    for root in found.modules(part):
        for key, parameter in model.get_submodule(root).named_parameters():
            name = tied[id(parameter)]
            if id(parameter) in constant or is_lora(name) or (part == "bias" and not key.endswith("bias")):
                continue
            names[name] = None
    return list(names)


def changed(model: nn.Module, state: Tuning) -> list[str]:
    """Of the tensors tuned so far, those whose values an optimizer, a checkpoint or an adapter has changed."""
    parameters = dict(model.named_parameters())
    return [
        name for name in state.tuned if name in parameters and parameters[name]._version != state.versions.get(name)
    ]


def set_trainable(model: nn.Module, state: Tuning, part_of: dict[str, str]) -> None:
    """fp32 and trainable for the chosen parameters; the rest frozen, in the base's dtype unless it was tuned."""
    keep = set(state.tuned)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
        if name in part_of:
            if parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            if name not in keep:
                state.versions[name] = parameter._version
        elif name in state.versions and name not in keep:
            parameter.data = parameter.data.to(state.dtype)
            del state.versions[name]
    state.tuned = [name for name, _ in model.named_parameters() if name in keep or name in part_of]
    match_precision(model, state)


def match_precision(model: nn.Module, state: Tuning) -> None:
    """Lets every module that holds fp32 parameters in a lower-precision model compute in its input's dtype."""
    if state.dtype == torch.float32:
        return
    norms = {*state.anatomy.norms, *state.anatomy.final_norm, *state.anatomy.qk_norms, *state.anatomy.vision_norms}
    roots = [state.anatomy.llm, *state.anatomy.head, *state.anatomy.connector, *state.anatomy.vision]
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if not own or is_lora(name + ".") or not any(inside(name, root) for root in roots):
            continue
        if any(p.dtype == torch.float32 for p in own):
            promote(module, state.dtype, is_norm=name in norms)
        else:
            demote(module)


def inside(name: str, root: str) -> bool:
    return not root or name == root or name.startswith(root + ".")


def is_lora(name: str) -> bool:
    """PEFT puts its matrices into modules of these names below the layer that it adapts."""
    return ".lora_A." in name or ".lora_B." in name


def add_lora(model: nn.Module, state: Tuning, options: dict[str, Any]) -> None:
    """Injects LoRA into every linear layer of the blocks, in place; an identical one that is there stays."""
    if state.lora == options:
        return
    remove_lora(model, state)
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=options["rank"],
        lora_alpha=options["alpha"],
        lora_dropout=options["dropout"],
        target_modules=list(state.anatomy.linears),
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options["seed"])
        inject_adapter_in_model(config, model, adapter_name=LORA_NAME)
    for name, parameter in model.named_parameters():
        if is_lora(name):
            parameter.data = parameter.data.float()
    for name in state.anatomy.linears:
        model.get_submodule(name).train(model.training)  # PEFT's layers come in train mode, with dropout
    rename_tuned(model, state)
    state.lora = options


def remove_lora(model: nn.Module, state: Tuning) -> None:
    """Takes the LoRA layers out again; their matrices are gone."""
    if state.lora is None:
        return
    from peft.tuners.lora import LoraLayer

    for name in state.anatomy.linears:
        layer = model.get_submodule(name)
        if isinstance(layer, LoraLayer):
            model.set_submodule(name, layer.base_layer)  # type: ignore[arg-type]
    for leftover in ("peft_config", "_hf_peft_config_loaded"):
        vars(model).pop(leftover, None)
    state.lora = None
    rename_tuned(model, state)


def rename_tuned(model: nn.Module, state: Tuning) -> None:
    """PEFT moves `x.weight` to `x.base_layer.weight`; keep the list of tuned names true."""
    present = {name.replace(".base_layer.", "."): name for name, _ in model.named_parameters()}
    plain = [name.replace(".base_layer.", ".") for name in state.tuned if not is_lora(name)]
    versions = {name.replace(".base_layer.", "."): v for name, v in state.versions.items()}
    state.tuned = [present[name] for name in plain if name in present]
    state.versions = {present[name]: v for name, v in versions.items() if name in present}


def make_report(
    model: nn.Module,
    state: Tuning,
    label: str,
    parts: tuple[str, ...],
    part_of: dict[str, str],
    skipped: list[str],
) -> Report:
    constant = {id(p) for name in state.anatomy.constant for p in model.get_submodule(name).parameters()}
    parameters = [(name, p) for name, p in model.named_parameters() if id(p) not in constant]
    trainable = [(name, p) for name, p in parameters if name in part_of]
    return Report(
        strategy=label,
        parts=parts,
        trainable=[name for name, _ in trainable],
        parameters=sum(p.numel() for _, p in trainable),
        total=sum(p.numel() for _, p in parameters),
        bytes=sum(p.numel() * p.element_size() for _, p in trainable),
        part_of={name: part_of[name] for name, _ in trainable},
        skipped=skipped,
    )
