"""What normtune knows about a model that it tunes: which tensors it made fp32, which of them changed, the base's gains.

Names of parameters are plain here: without the level `base_layer` that PEFT puts between a layer and its weight.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from normtune.errors import InputError, JobError
from normtune.kernels import Logits, Swaps, demote, is_quantized, promote, restore, swap
from normtune.kernels.replacing import is_held
from normtune.layers import unwrapped
from normtune.structure import Anatomy, Formula, dissect, formulas

if TYPE_CHECKING:
    from normtune.strategy.applying import Report

SAMPLE = 4096  # elements of a tensor that is no gain: enough for a share, and free at 7B
CHUNK = 1 << 22
LLM_GAINS = ("norms", "final_norm", "qk_norms")
GAIN_PARTS = (*LLM_GAINS, "vision_norms")


@dataclass
class Tuning:
    """The state of a tuned model; kept on the model as `_normtune`.

    Attributes:
        dtype: of the base's activations.
        tuned: names of the parameters that an adapter must hold: trainable now, or changed earlier.
        base: gains and biases of norms as they were before they became trainable or were overwritten, base's dtype.
        origin: dtype in the base of every tensor that is fp32 because of us.
        samples: a sample of the base's values of every other tensor that became trainable or was overwritten.
        prints: fingerprint of each trainable tensor when it became trainable.
        lora: options of the LoRA layers that are in the model.
        lean: what `lean` was called with: `exact` or `8bit`; None where it was not.
        formulas: of the norms that were asked for.
        logits: what the model does to its head's output, once that is known; (None,) for something else.
    """

    anatomy: Anatomy
    dtype: torch.dtype
    tuned: list[str] = field(default_factory=list)
    base: dict[str, torch.Tensor] = field(default_factory=dict)
    origin: dict[str, torch.dtype] = field(default_factory=dict)
    samples: dict[str, torch.Tensor] = field(default_factory=dict)
    prints: dict[str, tuple[int, int]] = field(default_factory=dict)
    report: Report | None = None
    lora: dict[str, Any] | None = None
    lean: Literal["exact", "8bit"] | None = None
    formulas: dict[str, Formula] = field(default_factory=dict)
    logits: tuple[Logits | None] | None = None


def tuning(model: nn.Module) -> Tuning:
    """The model's tuning state, made from its anatomy at the first call, before anything is tuned.

    Raises:
        InputError: a model that holds adapters of another tool, whose parts would be taken for the base's.
    """
    model = unwrapped(model)
    state = vars(model).get("_normtune")
    if state is None:
        foreign = [n for n, _ in model.named_parameters() if is_lora(n) or ".base_layer." in n or "_to_save." in n]
        if foreign:
            raise InputError(
                f"the model holds an adapter of PEFT's ({foreign[0]});\n"
                "merge it first (merge_and_unload), or load the plain base and train LoRA with the part lora"
            )
        found = dissect(model)
        state = Tuning(found, activation_dtype(model, found))
        model._normtune = state  # type: ignore[assignment]
    elif not state.tuned and not state.origin:  # nothing is tuned: the base may have been cast since
        state.dtype = activation_dtype(model, state.anatomy)
    return state


def activation_dtype(model: nn.Module, found: Anatomy) -> torch.dtype:
    """That of the embedding, or of the norms where the embedding is quantized."""
    modules = [model.get_submodule(name) for name in [*found.embed, *found.norms]]
    floats = (p.dtype for module in modules for p in module.parameters() if not is_quantized(p))
    return next(floats, torch.float32)


def plain(name: str) -> str:
    """The name without the level that PEFT adds."""
    return name.replace(".base_layer.", ".")


def is_lora(name: str) -> bool:
    """PEFT puts its matrices into modules of these names below the layer that it adapts."""
    return ".lora_A." in name or ".lora_B." in name


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own parameters by plain name, tied ones once, without LoRA's matrices."""
    model = unwrapped(model)
    return {plain(name): p for name, p in model.named_parameters() if not is_lora(name)}


def count(parameter: torch.Tensor) -> int:
    """How many weights a parameter holds; a 4-bit one packs two into a byte."""
    quant = getattr(parameter, "quant_state", None)
    return parameter.numel() if quant is None else math.prod(quant.shape)


def gain_names(model: nn.Module, found: Anatomy) -> dict[str, str]:
    """Name of every gain and bias of a norm -> its part; those of a block that is used twice have one name."""
    names = {id(p): name for name, p in parameters(model).items()}
    return {
        names[id(parameter)]: part
        for part in GAIN_PARTS
        for root in found.modules(part)
        for parameter in model.get_submodule(root).parameters()
    }


def hold_base(model: nn.Module, names: Iterable[str]) -> None:
    """Keeps the present values of those of `names` that are gains, and a sample of others, unless kept already.

    Call it before they are overwritten. Costs a copy of fp32 gains only: one that becomes fp32 leaves its old tensor.
    """
    state, present = tuning(model), parameters(model)
    gains = gain_names(model, state.anatomy)
    for name in names:
        if name in gains and name not in state.base:
            value = present[name].detach()
            state.base[name] = value.clone() if value.dtype == torch.float32 else value
        elif name in present and name not in gains and name not in state.samples:
            state.samples[name] = sample(present[name]).clone()


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """At most `SAMPLE` elements, evenly spread; (...) -> (N)."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE]


def witnesses(model: nn.Module) -> dict[str, torch.Tensor]:
    """64 values each of the base's embedding and of the first and last linear layer of the blocks, fp32 on the CPU.

    They tell two bases with equal gains apart, such as a LoRA finetune that was merged. Keys are `NAME#64`;
    quantized tensors have none.
    """
    state, present = tuning(model), parameters(model)
    chosen = [state.anatomy.embed[0], *state.anatomy.linears[:1], *state.anatomy.linears[-1:]]
    found = {}
    for name in (f"{module}.weight" for module in chosen):
        value = state.base.get(name, present.get(name))
        if value is not None and not value.is_meta and not is_quantized(value):
            spread = state.samples[name] if name in state.samples else sample(value)
            spread = spread[:: max(1, spread.numel() // 64)][:64]
            found[f"{name}#64"] = spread.to("cpu", torch.float32, copy=True)
    return found


def refuse_cast(model: nn.Module) -> None:
    """Raises JobError where a tuned tensor is no longer fp32: a cast of the whole model has rounded its training."""
    present = parameters(model)
    for name in tuning(model).tuned:
        if name in present and present[name].dtype != torch.float32:
            dtype = str(present[name].dtype).removeprefix("torch.")
            raise JobError(
                f"{name} was fp32 when it was tuned and is {dtype} now: the model was cast as a whole (model.to, "
                "bf16_full_eval)\nand its training is rounded; train again without that cast"
            )


def refuse_banked(model: nn.Module) -> None:
    """Raises InputError where a bank serves the model: its rows would run on other tensors from now on."""
    if is_held(model):
        raise InputError("a bank serves this model; add to the bank instead (Bank.add), or close it first")


def base_gains(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base's own gains and biases of norms, fp32 on the CPU; those of the vision encoder where they were tuned."""
    state, present = tuning(model), parameters(model)
    return {
        name: state.base.get(name, present[name]).detach().to("cpu", torch.float32, copy=True)
        for name, part in gain_names(model, state.anatomy).items()
        if (part != "vision_norms" or name in state.base) and not present[name].is_meta
    }


def fingerprint(tensor: torch.Tensor) -> tuple[int, int]:
    """Two sums over the bits of an fp32 tensor, one weighted by position: any change shows, however it was written."""
    if tensor.is_meta:
        return 0, 0
    bits = tensor.detach().reshape(-1).view(torch.int32)
    total = weighted = 0
    for part in bits.split(CHUNK):  # int64 copies of a chunk, not of an embedding
        wide = part.long()
        total += int(wide.sum())
        weighted += int((wide * torch.arange(1, len(wide) + 1, device=wide.device)).sum())
    return total, weighted


def changed(model: nn.Module, state: Tuning) -> list[str]:
    """Of the tensors tuned so far, those whose values an optimizer, a checkpoint or an adapter has changed."""
    present = parameters(model)
    return [
        name
        for name in state.tuned
        if name in present and (name not in state.prints or fingerprint(present[name]) != state.prints[name])
    ]


def mark_tuned(model: nn.Module, names: Iterable[str]) -> None:
    """Counts parameters as changed, whatever their values: they were read from a checkpoint or an adapter."""
    state, wanted = tuning(model), set(names)
    for name in wanted:
        state.prints.pop(name, None)
    state.tuned = [name for name in parameters(model) if name in wanted or name in state.tuned]


def set_trainable(model: nn.Module, state: Tuning, names: Collection[str]) -> None:
    """fp32 and trainable for `names` (as the model has them); the rest frozen, as in the base unless it was changed."""
    state.tuned = changed(model, state)
    hold_base(model, [plain(name) for name in names])
    for name, parameter in model.named_parameters():
        key = plain(name)
        parameter.requires_grad_(False)
        parameter.grad = None
        if name in names:
            to_float32(state, key, parameter)
            if key not in state.tuned and not is_lora(name):
                state.prints[key] = fingerprint(parameter)
            parameter.requires_grad_(True)
        elif key not in state.tuned:
            to_base(state, key, parameter)
    kept = {*state.tuned, *(plain(name) for name in names)}
    state.tuned = [name for name in parameters(model) if name in kept]
    match_precision(model, state)


def to_float32(state: Tuning, name: str, parameter: nn.Parameter) -> None:
    if parameter.dtype != torch.float32:
        if not is_lora(name):
            state.origin[name] = parameter.dtype
        parameter.data = parameter.data.float()


def to_base(state: Tuning, name: str, parameter: nn.Parameter) -> None:
    """Undoes `to_float32` and `hold_base` of a tensor that nobody changed."""
    held, dtype = state.base.pop(name, None), state.origin.pop(name, None)
    state.prints.pop(name, None)
    state.samples.pop(name, None)
    if dtype is not None:
        parameter.data = parameter.data.to(dtype) if held is None else held.to(parameter.device)


def settle(model: nn.Module) -> None:
    """Freezes everything; tensors that nobody changed get the base's dtype and forward again."""
    set_trainable(model, tuning(model), ())


def match_precision(model: nn.Module, state: Tuning) -> None:
    """Lets every module that holds tensors which became fp32 compute in the base's dtype; the others as they were."""
    restore(model)
    norms = {name for part in GAIN_PARTS for name in state.anatomy.modules(part)}
    # by identity: a tied tensor has one name and two modules
    origin = {id(p): state.origin[name] for name, p in parameters(model).items() if name in state.origin}
    for name, module in model.named_modules():
        raised = [origin[id(p)] for p in module.parameters(recurse=False) if id(p) in origin]
        if raised:
            promote(module, raised[0], is_norm=name in norms)
        else:
            demote(module)
    if state.lean:
        swap_forwards(model, state)


def swap_forwards(model: nn.Module, state: Tuning) -> Swaps:
    found = state.anatomy
    norms = norm_formulas(model, [*found.norms, *found.final_norm, *found.qk_norms])
    return swap(model, norms, found.mlp, found.attn, eight_bit=state.lean == "8bit")


def norm_formulas(model: nn.Module, names: Iterable[str]) -> dict[str, Formula]:
    """`structure.formulas`, each norm probed once per model."""
    known = tuning(model).formulas
    wanted = dict.fromkeys(names)
    known.update(formulas(model, [name for name in wanted if name not in known]))
    return {name: known[name] for name in wanted}
