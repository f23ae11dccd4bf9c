"""The step of a training on fake tensors: what it would hold at its peak, and what it would compute.

What runs is the project's own step (`apply`, `lean`, `make_optimizer`, `loss_at`, backward, clipping, AdamW's update)
on tensors without values, from configs alone. The optimizer's state exists already, as from the second step on. The
fake tensors pose as a CPU's, since others need a build of torch for their device; a GPU keeps the same for backward.
Every sample is `length` long; an attention mask is made, as for a padded batch.
Not here: `compile: true` (planned as eager), packed rows (kept is the same), what an allocator leaves unused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from normtune.errors import InputError
from normtune.flops import causal_pairs, count_flops
from normtune.kernels import Logits
from normtune.memory.ledger import HEAD, OTHER, OUTPUT, WORKSPACE, Ledger
from normtune.memory.quantized import stand_in
from normtune.step import loss_at, make_optimizer
from normtune.strategy import Report, apply, checkpoint, lean, tuning

if TYPE_CHECKING:
    from normtune.recipe import Stage

WEIGHTS, TRAINABLE, GRADIENTS, OPTIMIZER = "weights", "trainable", "gradients", "optimizer"
NORMS, QKV, GATES, VISION, LORA = "norm inputs", "q k v", "gate and up", "vision", "lora"
KEPT = (NORMS, QKV, OUTPUT, GATES, VISION, LORA, OTHER)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "nf4": torch.bfloat16, "int8": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """A micro-batch: samples, tokens of each (image tokens too), supervised ones among them, and micro-batches."""

    batch: int = 1
    length: int = 2048
    supervised: int = 100
    micro_batches: int = 1


@dataclass
class Plan:
    """What a step would take.

    Attributes:
        peak_bytes: at the fullest moment of a step.
        by_cause: the same by cause, which sums to it: weights (frozen), trainable, gradients, optimizer, activations
            (a dict: what is kept for backward), head_and_loss, workspace.
        trainable_parameters, total_parameters: as `Report` counts them.
        flops_per_token: of forward, backward and the loss, for each token of the batch.
        step_flops: of a micro-batch.
        lora_rank: where LoRA trains.
        notes: what was assumed.
    """

    strategy: str
    peak_bytes: int
    by_cause: dict[str, Any]
    trainable_parameters: int
    total_parameters: int
    percent: float
    trainable_bytes: int
    flops_per_token: float
    step_flops: float
    shape: Shape
    dtype: str
    lora_rank: int | None = None
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        return {**{k: v for k, v in found.items() if k != "shape"}, **found["shape"]}


def plan_step(model: nn.Module, stage: Stage, shape: Shape, dtype: str = "bfloat16", block: int = 512) -> Plan:
    """Plans a step of `stage` on micro-batches of `shape`.

    Args:
        model: on the meta device, untuned (see `normtune.skeletons`); not usable afterwards.
        dtype: of the frozen weights: float32, bfloat16, nf4, int8 (the linear layers of the blocks).
        block: allocations are multiples of so many bytes (512 on a GPU).

    Raises:
        InputError: a strategy that the model cannot take, or samples too short for an image and what is supervised.
    """
    report = prepare(model, stage, dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger(block) as ledger:
        materialize(model, ledger, without=tuning(model).anatomy.vision if stage.cache_features else [])
        batch, images, note = make_batch(model, shape, DTYPES[dtype], stage.cache_features)
        optimizer = make_optimizer(model, stage)
        prime(optimizer, ledger)
        ledger.watch()
        run_step(model, optimizer, batch, stage, shape, ledger)
    tokens, lengths = shape.batch * shape.length, [shape.length] * shape.batch
    cost = count_flops(model, stage.cache_features).step(
        tokens, shape.batch * shape.supervised, images, causal_pairs(lengths)
    )
    return Plan(
        strategy=report.strategy,
        peak_bytes=ledger.peak,
        by_cause=nested(ledger.at_peak),
        trainable_parameters=report.parameters,
        total_parameters=report.total,
        percent=report.percent,
        trainable_bytes=report.bytes,
        flops_per_token=cost / tokens,
        step_flops=cost,
        shape=shape,
        dtype=dtype,
        lora_rank=stage.lora.rank if "lora" in report.parts else None,
        skipped=report.skipped,
        notes=[
            *note,
            *(["planned without torch.compile"] if stage.compile else []),
            *(
                ["recomputing (checkpoint_activations) not counted in the FLOPs"]
                if stage.checkpoint_activations
                else []
            ),
        ],
    )


def prepare(model: nn.Module, stage: Stage, dtype: str) -> Report:
    """The model as `train` has it before the first step, on the meta device."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
    report = apply(model, stage.strategy, **stage.lora.model_dump())
    lean(model, stage.activations)
    state = tuning(model)
    text: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    # to learn it by a run takes values; a cap is the part of it that takes memory
    state.logits = (Logits(cap=getattr(text, "final_logit_softcapping", None)),)
    if dtype in ("nf4", "int8"):
        for name in state.anatomy.linears:
            layer = model.get_submodule(name)
            layer = getattr(layer, "base_layer", layer)
            if any(p.requires_grad for p in layer.parameters(recurse=False) if p.dim() > 1):
                raise InputError(
                    f"{report.strategy} trains {name}, which {dtype} freezes; use dtype bfloat16, or another strategy"
                )
            stand_in(layer, dtype)
    if stage.checkpoint_activations:
        checkpoint(model, on=True)
    return report


def materialize(model: nn.Module, ledger: Ledger, without: list[str]) -> None:
    """Replaces every parameter and buffer by a fake one on the CPU, but for modules `without`; tied ones stay tied."""
    left = {module for name in without for module in model.get_submodule(name).modules()}
    made: dict[int, torch.Tensor] = {}
    held = []  # an identity lasts as long as its object
    for module in model.modules():
        if module in left:
            continue
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            held.append(tensor)
            if id(tensor) not in made:
                fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                ledger.move(fake, TRAINABLE if tensor.requires_grad else WEIGHTS)
                own = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if own else fake
            holder: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
            holder[name] = made[id(tensor)]
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.move(p.grad, GRADIENTS))


def make_batch(
    model: nn.Module, shape: Shape, dtype: torch.dtype, cached: bool
) -> tuple[dict[str, torch.Tensor], int, list[str]]:
    """A micro-batch as `loss_at` takes it, the number of its images, and what was assumed."""
    config: Any = model.config
    batch = {"input_ids": torch.empty(shape.batch, shape.length, dtype=torch.long)}
    vision: Any = getattr(config, "vision_config", None)
    size: Any = getattr(vision, "image_size", None)
    patches = 0
    if isinstance(size, int) and hasattr(config, "image_seq_length"):
        patches = (size // vision.patch_size) ** 2
    if shape.supervised > shape.length - (patches or 1):
        before = f"the {patches} tokens of an image" if patches else "a token to begin with"
        raise InputError(
            f"length {shape.length} is too short for {before} and {shape.supervised} supervised ones; "
            "give a larger --length (max_length of a recipe), or fewer with --supervised"
        )
    if not patches:
        text = not tuning(model).anatomy.vision
        return batch, 0, [] if text else ["images of this model are not planned: no encoder's work, text alone"]
    if cached:
        batch["features"] = torch.empty(shape.batch, patches, vision.hidden_size, dtype=dtype)
    else:
        batch["pixel_values"] = torch.empty(shape.batch, 3, size, size, dtype=dtype)
    return batch, shape.batch, [f"{patches} of the tokens of each sample are an image's"]


def prime(optimizer: torch.optim.Optimizer, ledger: Ledger) -> None:
    """Takes an update, after which the optimizer's state is there as from the second step on."""
    for parameter in trained(optimizer):
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for state in optimizer.state.values():
        for tensor in state.values():
            ledger.move(tensor, OPTIMIZER)


def trained(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def run_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, torch.Tensor],
    stage: Stage,
    shape: Shape,
    ledger: Ledger,
) -> None:
    """As `normtune.step.take_step` does it."""
    model.train()
    found = tuning(model).anatomy
    outputs = [model.get_submodule(name) for name in found.attn_o]
    rows = torch.empty(shape.batch * shape.supervised, dtype=torch.long)
    for _ in range(shape.micro_batches):
        with ledger.forward(model, kinds(model), outputs):
            loss = loss_at(model, dict(batch), rows, rows)
        if not loss.requires_grad:  # a batch without images does not reach the connector
            loss = loss + 0.0 * sum(p.sum() for p in trained(optimizer))
        (loss / (shape.supervised * shape.batch)).backward()
        del loss
    for parameter in trained(optimizer):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
            ledger.move(parameter.grad, GRADIENTS)
    nn.utils.clip_grad_norm_(trained(optimizer), stage.clip or float("inf"))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def kinds(model: nn.Module) -> dict[nn.Module, str]:
    """What is kept in which modules, for `Ledger.forward`."""
    found = tuning(model).anatomy
    roles: list[tuple[str, list[str]]] = [
        (NORMS, [*found.norms, *found.final_norm]),
        (QKV, [*found.attn, *found.qk_norms]),
        (GATES, found.mlp),
        (VISION, [*found.vision, *found.connector]),
    ]
    known = {model.get_submodule(name): kind for kind, names in roles for name in names}
    return known | {module: LORA for module in model.modules() if hasattr(module, "lora_A")}


def nested(causes: dict[str, int]) -> dict[str, Any]:
    """`Plan.by_cause` of a ledger's flat one."""
    kept = {kind: causes.get(kind, 0) for kind in KEPT if kind != LORA or causes.get(kind)}
    first = {cause: causes.get(cause, 0) for cause in (WEIGHTS, TRAINABLE, GRADIENTS, OPTIMIZER)}
    return {**first, "activations": kept, HEAD: causes.get(HEAD, 0), WORKSPACE: causes.get(WORKSPACE, 0)}


def largest_batch(plan_of: Callable[[int], Plan], limit: int, most: int = 4096) -> int:
    """The most samples of a micro-batch whose peak stays within `limit` bytes; 0 where one does not.

    Peaks grow in proportion once activations decide them, so a few plans are enough.
    """
    low, high = 0, most + 1  # fits, does not fit
    peaks = {}
    guess = 1
    while high - low > 1:
        peaks[guess] = plan_of(guess).peak_bytes
        low, high = (guess, high) if peaks[guess] <= limit else (low, guess)
        if len(peaks) == 1 or low == 0:
            guess = 4 * low or (low + high) // 2
        else:
            one, other = sorted(peaks)[-2:]
            each = (peaks[other] - peaks[one]) / (other - one) if other > one else 0
            guess = one + int((limit - peaks[one]) / each) if each > 0 else 2 * low
        guess = min(max(guess, low + 1), high - 1)
    return low
