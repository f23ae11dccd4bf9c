"""Whether samples can lie end to end in one row of a model, and whether that is worth it.

`can_pack` tries it on the model at hand: a sample must give the head the same, alone or behind another one. Models
whose layers carry a state from token to token (Mamba), or that make their positions themselves (ALiBi), cannot.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from normtune.kernels import without_head
from normtune.kernels.segments import segments
from normtune.layers import unwrapped
from normtune.strategy.state import tuning

LENGTHS = (5, 7)
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Relative, by norm; half precision: COARSE. Samples that see one another differ by 0.1 and more."""
COARSE = 0.03


PACK_LENGTH = {"cpu": 2048, "cuda": 8192}
"""Tokens of a packed row by device, for those where packing was found to be faster than padding.

cpu: CPU time of a step against samples one by one; samples of 164 to 450 tokens, hidden size 512, 8 blocks, one thread,
other work beside it (some 5 % either way). bf16: rows of 512 tokens 0.96, of 1,024 0.92, of 2,048 0.87, but 1.8 with
the mask of the whole row; padded in groups of 2 and 4 of about one length 0.97, of 4 in any order 1.05. fp32: 1,024
tokens 0.94, 2,048 0.91, groups of 4 1.19 (docs/LOG.md). cuda: not measured; its kernels skip what is not needed, and
8,192 rows are what fills the matmuls.
"""


def prefers_packing(device: torch.device) -> bool:
    """Whether `packing: auto` packs on this device."""
    return device.type in PACK_LENGTH


def pack_length(device: torch.device) -> int:
    """The tokens of a packed row, unless a sample is longer."""
    return PACK_LENGTH.get(device.type, PACK_LENGTH["cpu"])


def can_pack(model: nn.Module) -> str | None:
    """None where packed samples are computed as each of them alone, else why not, in a few words.

    Runs three short rows of text in evaluation mode, without gradients.
    """
    model = unwrapped(model)
    training = [module for module in model.modules() if module.training]
    model.eval()  # dropout would differ, and take from the training's random numbers
    try:
        with torch.no_grad():
            return compare(model)
    except Exception as error:  # whatever a model raises about rows that it does not expect
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        for module in training:
            module.training = True


def compare(model: nn.Module) -> str | None:
    first, second = words(model)
    alone = torch.cat([hidden(model, row) for row in (first, second)], dim=1)
    packed = hidden(model, first, second)
    limit = TOLERANCE.get(alone.dtype, COARSE)
    if distance(packed, alone) <= limit:
        return None
    other = hidden(model, first.flip(0), second)
    size = len(first)
    if distance(packed[:, size:], other[:, size:]) > limit:
        return "its samples would see one another"
    return "it does not take the positions of its samples"


def hidden(model: nn.Module, *rows: torch.Tensor) -> torch.Tensor:
    """What the head is given for samples in one row, (1, T, H) fp32 or wider, or the model's first output."""
    lengths = torch.tensor([len(row) for row in rows])
    inputs: dict[str, Any] = {"input_ids": torch.cat(rows)[None], "use_cache": False}
    if len(rows) > 1:
        inputs["position_ids"] = torch.cat([torch.arange(len(row)) for row in rows])[None].to(rows[0].device)
    head = tuning(model).anatomy.head
    with segments(lengths) if len(rows) > 1 else nullcontext():
        if not head:
            return model(**inputs)[0]  # type: ignore[no-any-return]
        with without_head(model.get_submodule(head[0])) as given:
            model(**inputs)
    return given[0]


def words(model: nn.Module) -> list[torch.Tensor]:
    """Two samples of tokens without a role of their own, (5) and (7) int64."""
    embed = model.get_submodule(tuning(model).anatomy.embed[0])
    weight = max(embed.parameters(), key=lambda p: p.numel())
    config = model.config.to_dict()  # type: ignore[operator,union-attr]
    roles: set[int] = set()
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key, value in part.items():
            if str(key).endswith(("_id", "_index")):
                roles |= set(value) if isinstance(value, list) else {value}
    usual = [n for n in range(min(len(weight), 1000)) if n not in roles][: sum(LENGTHS)]
    return list(torch.tensor(usual, device=weight.device).split(LENGTHS))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())
