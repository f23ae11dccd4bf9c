"""One optimizer step: the groups of AdamW, the schedule, the loss over supervised tokens, and what moved.

The loss of a step is the sum of the cross-entropy over its supervised tokens divided by their count over all
micro-batches and processes, so that accumulation 1, accumulation 4 and two processes give the same update.
Not here: the order of steps and stages (training/).
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from normtune.errors import InputError, JobError
from normtune.features import images
from normtune.flops import Flops, causal_pairs
from normtune.kernels import HeadLoss, Logits, find_logits, without_head
from normtune.kernels.segments import segments
from normtune.layers import unwrapped
from normtune.sharding import sum_gradients
from normtune.strategy import Movement, Report, check_step_size, parameter_groups, tuning

if TYPE_CHECKING:  # the loss serves programs that have neither
    from accelerate import Accelerator

    from normtune.recipe import Stage

GUARD_STEPS = 10  # a gain that trains at all has moved by then
MICRO_BATCH = 16  # samples per forward pass, unless the stage says


class NotFinite(JobError):
    """A loss or gradient that is not finite; nothing was updated.

    Attributes:
        facts: loss and gradient norm, as text (they are no JSON numbers).
        micro_batches: numbers of this process's micro-batches whose loss is not finite.
    """

    def __init__(self, where: str, loss: float, norm: float, micro_batches: list[int]) -> None:
        super().__init__(f"{where}: loss {loss:.4g}, gradient norm {norm:.4g}: not finite; lower learning_rate")
        self.facts = {"loss_was": f"{loss:.4g}", "grad_norm_was": f"{norm:.4g}"}
        self.micro_batches = micro_batches


class NothingToLearn(JobError):
    """No sample of a step, on any process, has a supervised token; nothing was updated."""


class Abandoned(Exception):
    """The step was given up between two micro-batches, because the training was told to stop; nothing was updated."""


def check_rates(stage: Stage, parts: Mapping[str, list[nn.Parameter]]) -> None:
    """Checks the rates of a stage against the parts that it will train (from `strategy.check`).

    Raises:
        InputError: a learning rate or weight decay of a part that the stage does not train, or a rate whose steps
            would be rounded away in fp32.
    """
    for key, values in (("learning_rates", stage.learning_rates), ("weight_decays", stage.weight_decays)):
        if unknown := sorted(set(values) - parts.keys()):
            tied = "; head is tied to embed: give its rate there" if unknown == ["head"] and "embed" in parts else ""
            raise InputError(
                f"stage {stage.name}: {key} names {', '.join(unknown)}, which strategy {stage.strategy} does not "
                f"train; it trains {', '.join(sorted(parts))}{tied}"
            )
    groups = [
        {"part": part, "params": members, "lr": stage.learning_rates.get(part, stage.learning_rate)}
        for part, members in parts.items()
    ]
    try:
        check_step_size(groups, torch.float32)
    except InputError as error:
        raise InputError(f"stage {stage.name}: {error}") from None


def make_optimizer(model: nn.Module, stage: Stage) -> torch.optim.AdamW:
    """AdamW with a group per part and decay (see `parameter_groups`); `peak` is the rate that the schedule scales."""
    groups = parameter_groups(
        model,
        stage.learning_rate,
        learning_rates=stage.learning_rates,
        weight_decay=stage.weight_decay,
        weight_decays=stage.weight_decays,
    )
    # fused: the others make temporaries as large as a tensor (CUDA's default as large as all of them together)
    return torch.optim.AdamW([{**group, "peak": group["lr"]} for group in groups], lr=stage.learning_rate, fused=True)


def description(
    model: nn.Module, stage: Stage, report: Report, notes: Sequence[str], optimizer: torch.optim.Optimizer
) -> list[str]:
    """What a stage trains, line by line: parts, notes, those of the stage, the optimizer's groups."""
    parts = ", ".join(f"{part} {count:,}" for part, count in report.by_part(model).items())
    skipped = f"; the model has no {', '.join(report.skipped)}" if report.skipped else ""
    groups = [
        f"{group['part']}: {len(group['params'])} tensors, {sum(p.numel() for p in group['params']):,} values, "
        f"learning rate {group['lr']:g}, weight decay {group['weight_decay']:g}"
        for group in optimizer.param_groups
    ]
    head = (
        f"{stage.name}: {report.strategy} trains {report.parameters:,} of {report.total:,} parameters "
        f"({report.percent:.4g} %, {report.bytes / 2**20:.2f} MiB in fp32): {parts}{skipped}"
    )
    return [head, *(f"  {text}" for text in (*report.notes, *notes, *groups))]


def schedule(stage: Stage, step: int, total: int) -> float:
    """Factor of the peak learning rate at optimizer step `step` (from 0): linear warm-up, then the schedule."""
    warmup = math.ceil(stage.warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if stage.schedule == "constant":
        return 1.0
    return 1 - done if stage.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def take_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[dict[str, torch.Tensor]],
    stage: Stage,
    step: int,
    total: int,
    stopped: Callable[[], bool] = bool,
) -> dict[str, Any]:
    """Forward and backward over the micro-batches, then one update; returns the step's figures, summed over processes
    but for `batch`, which says what this process computed (see `batch_digest`).

    Args:
        stopped: asked between micro-batches whether to give up (of several processes none can do that alone).

    Raises:
        NothingToLearn: no supervised token. NotFinite: a loss or gradient. Abandoned: `stopped` said yes.
    """
    began = time.perf_counter()
    dtype = tuning(accelerator.unwrap_model(model)).dtype
    own = torch.tensor([size_of(batch) for batch in batches]).sum(0)
    supervised, tokens, images, pairs = accelerator.reduce(own.to(accelerator.device)).tolist()
    if supervised == 0:
        raise NothingToLearn(f"{stage.name}, step {step + 1}: no sample has a supervised token; see max_length")
    losses = []
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            loss = supervised_loss(model, on_device(batch, accelerator.device, dtype))
            if not loss.requires_grad or accelerator.num_processes > 1:
                # a batch without images does not reach the connector: its gradient is zero, not missing
                loss = loss + 0.0 * sum(p.sum() for p in model.parameters() if p.requires_grad)
            accelerator.backward(loss * accelerator.num_processes / supervised)
            losses.append(loss.detach())
        if not last and accelerator.num_processes == 1 and stopped():
            optimizer.zero_grad(set_to_none=True)
            raise Abandoned
    mean = float(accelerator.reduce(total_of(losses))) / supervised
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:  # as where several processes exchange gradients: not reached is zero, not missing
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    sum_gradients(model, parameters)
    norm = float(accelerator.clip_grad_norm_(parameters, stage.clip or math.inf))
    if not math.isfinite(mean) or not math.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
        wrong = [number for number, loss in enumerate(losses) if not math.isfinite(float(loss))]
        raise NotFinite(f"{stage.name}, step {step + 1}", mean, norm, wrong)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * schedule(stage, step, total)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - began
    return {
        "loss": mean,
        "batch": batch_digest(batches),
        "grad_norm": round(norm, 6),
        "learning_rate": optimizer.param_groups[0]["lr"],
        "supervised_tokens": supervised,
        "tokens": tokens,
        "images": images,
        "pairs": pairs,
        "seconds": seconds,
    }


def total_of(losses: Sequence[torch.Tensor]) -> torch.Tensor:
    """Their sum, added up in order from zero."""
    total = torch.zeros((), device=losses[0].device)
    for loss in losses:
        total += loss
    return total


def add_throughput(record: dict[str, Any], waited: float, flops: Flops, peak: float | None) -> None:
    """Replaces `seconds`, `images` and `pairs` of a step's record by what they and the wait for its data come to.

    `tokens_per_second` counts every token of the batch (image tokens too, padding not), `supervised_per_second` those
    that the loss is taken over, `data_wait` is the share of the time spent waiting for data. `tflops` are the matmuls
    that were due (see flops.py: none for weight gradients of frozen weights), `mfu` their share of `peak`, the
    datasheet's FLOP/s of all devices together, where that is known.
    """
    seconds = record.pop("seconds") + waited
    rate = (
        flops.step(record["tokens"], record["supervised_tokens"], record.pop("images"), record.pop("pairs")) / seconds
    )
    record["tokens_per_second"] = round(record["tokens"] / seconds, 1)
    record["supervised_per_second"] = round(record["supervised_tokens"] / seconds, 1)
    record["data_wait"] = round(waited / seconds, 4)
    record["tflops"] = float(f"{rate / 1e12:.4g}")
    if peak:
        record["mfu"] = round(rate / peak, 4)


def size_of(batch: Mapping[str, torch.Tensor]) -> list[int]:
    """Of a batch: supervised tokens, tokens (of images too, padding not), distinct images, attended pairs."""
    lengths = batch["lengths"] if "lengths" in batch else batch["attention_mask"].sum(1)
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    images = len(batch.get("pixel_values", batch.get("features", ())))
    return [supervised, int(lengths.sum()), images, int(causal_pairs(lengths.tolist()))]


def batch_digest(batches: Sequence[Mapping[str, torch.Tensor]]) -> str:
    """CRC-32, 8 hex digits, of shapes and values of `input_ids` and `labels` of a step's micro-batches, in their order.

    Two trainings whose digests agree in every step have read the same tokens with the same targets, in the same order
    and grouped alike; another micro-batch size or packing gives other digests. Pixels are not in it. Of several
    processes each has its own share: the log holds that of the main process alone.
    """
    digest = 0
    for batch in batches:
        for name in ("input_ids", "labels"):
            values = batch[name].cpu()
            digest = zlib.crc32(f"{name} {tuple(values.shape)}".encode(), digest)
            digest = zlib.crc32(values.contiguous().numpy().data, digest)
    return f"{digest:08x}"


ON_CPU = ("labels", "lengths")
"""What the host reads of a batch: on a GPU each look would wait for all that was queued there."""


def on_device(batch: dict[str, torch.Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The batch on `device`; pixels in the base's dtype, since not every encoder casts them itself."""
    moved = {k: v for k, v in batch.items() if k not in ON_CPU}
    moved = {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in moved.items()}
    return moved | {k: batch[k] for k in ON_CPU if k in batch}


def supervised_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum of the cross-entropy over the supervised tokens of a batch, in fp32; `labels` are best on the CPU."""
    batch = dict(batch)
    rows, targets = positions(batch.pop("labels"))
    device = batch["input_ids"].device
    return loss_at(model, batch, rows.to(device), targets.to(device))


def positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where something is predicted that is supervised, and what: labels (B, S) -> rows (N), targets (N).

    Rows count positions of the flattened (B, S); position s predicts label s + 1.
    """
    wanted = nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    (rows,) = torch.nonzero(wanted != -100, as_tuple=True)
    return rows, wanted[rows]


def loss_at(
    model: nn.Module, batch: dict[str, torch.Tensor], rows: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Sum of the cross-entropy at `rows` (N) of the batch's flattened positions against `targets` (N), in fp32.

    Head and loss run at these positions alone, in chunks that keep no logits; where the model does something unknown
    with its logits, on the columns of all rows. Shapes do not depend on data while the head is a plain one. `lengths`
    in the batch say where the samples of a packed row end (see `segments`), `image_index` and `features` which images
    are seen (see `images`).
    """
    batch = dict(batch)
    lengths = batch.pop("lengths", None)
    known = head_of(unwrapped(model))
    if known is not None:
        head, logits = known
        with segments(lengths), images(model, batch), without_head(head) as given:
            model(**batch, use_cache=False)
        hidden = given[0].flatten(0, 1).index_select(0, rows)  # (N, H)
        return HeadLoss.apply(hidden, head.weight, head.bias, targets, logits)  # type: ignore
    width = batch["input_ids"].shape[1]
    columns, place = torch.unique(rows % width, return_inverse=True)
    if len(columns) == 0:
        columns = columns.new_zeros(1)
    with segments(lengths), images(model, batch):
        out = model(**batch, use_cache=False, logits_to_keep=columns).logits  # (B, K, V)
    return F.cross_entropy(out[rows // width, place].float(), targets, reduction="sum")


def head_of(model: nn.Module) -> tuple[nn.Linear, Logits] | None:
    """The head and what becomes of its output, found once per model; None where it is no plain linear layer."""
    state = tuning(model)
    if state.logits is None:
        head = model.get_submodule(state.anatomy.head[0]) if state.anatomy.head else None
        plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
        state.logits = (find_logits(model, head) if plain and head is not None else None,)
    (logits,) = state.logits
    if logits is None:
        return None
    return model.get_submodule(state.anatomy.head[0]), logits  # type: ignore[return-value]


class Guard:
    """Measures the movement of the trainable tensors now and then, and stops a run whose gains stay where they are."""

    def __init__(self, model: nn.Module, stage: Stage, total: int) -> None:
        self.movement, self.stage, self.total = Movement(model), stage, total
        self.warm = min(max(math.ceil(stage.warmup_ratio * total), GUARD_STEPS), total)
        self.start = self.movement.prints()
        self.last: dict[str, dict[str, float]] = {}

    def measure(self, step: int, record: dict[str, Any]) -> None:
        """Adds `moved` (percent, over norms), `max_change` and `movement` by part to the step's record.

        Every tenth step, at the end of the warm-up and at the last step (`step` counts from 1).
        """
        if step % 10 and step not in (self.warm, self.total):
            return
        self.last = self.movement.measure()
        record["movement"] = self.last
        gains = [values for part, values in self.last.items() if part in self.movement.gain_parts]
        if not gains:
            return
        record["moved"] = min(values["moved"] for values in gains)
        record["max_change"] = max(values["max_change"] for values in gains)

    def check(self, step: int, record: dict[str, Any]) -> None:
        """Raises JobError if at the end of the warm-up not one gain has moved in this stage."""
        if step == self.warm and self.start and self.movement.prints() == self.start:
            still = record["grad_norm"] == 0.0
            cause = "their gradients are zero: nothing supervised depends on them" if still else "raise learning_rate"
            raise JobError(f"{self.stage.name}: after {step} steps not one gain has moved; {cause}")


def note_of(record: dict[str, Any]) -> str:
    moved = f"  moved {record['moved']:.0f} %" if "moved" in record else ""
    return f"loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tok/s{moved}"
