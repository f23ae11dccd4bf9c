"""Whether training moves what it should: before the first step from step sizes, afterwards from values.

Source: a step below half a unit in the last place of a stored value is rounded away. For a value v of a format with
p bits of precision, half a unit is 2^(floor(log2 |v|) - p); at 1.0 that is 2^-24 = 6e-8 in fp32, 2^-8 = 4e-3 in bf16.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from normtune.errors import InputError
from normtune.layers import unwrapped
from normtune.strategy.state import fingerprint, gain_names, plain, sample, tuning


def half_unit(values: torch.Tensor) -> torch.Tensor:
    """Half a unit in the last place of each value, fp32; (N) -> (N)."""
    limits = torch.finfo(values.dtype)
    _, exponent = torch.frexp(values.detach().float().abs().clamp_min(limits.tiny))
    return torch.ldexp(torch.full_like(exponent, 0.25 * limits.eps, dtype=torch.float32), exponent)


def check_step_size(groups: Iterable[Mapping[str, Any]], storage: torch.dtype | None = None) -> None:
    """Compares AdamW's step, at most about its learning rate, with what the storage of each tensor can add.

    Args:
        groups: an optimizer's `param_groups`; each with `params`, `lr`, and perhaps `part`.
        storage: dtype that the tensors will be stored in (default: the one that they have).

    Raises:
        InputError: more than half of a group's values cannot take such a step.
    """
    for group in groups:
        rate, lost, number, needed = float(group["lr"]), 0.0, 0, 0.0
        for parameter in group["params"]:
            if parameter.is_meta or parameter.numel() == 0 or not parameter.is_floating_point():
                continue
            dtype = storage or parameter.dtype
            limits = half_unit(sample(parameter).to(dtype))
            lost += float((limits > rate).float().mean()) * parameter.numel()
            number += parameter.numel()
            needed = max(needed, float(limits.median()))
        if number and lost > 0.5 * number:
            part = f"part {group['part']}" if "part" in group else f"a group of {len(group['params'])} tensors"
            remedy = "raise it" if dtype == torch.float32 else "train fp32 tensors (normtune.apply)"
            raise InputError(
                f"learning rate {rate:g} would be rounded away: {lost / number:.0%} of {part}, stored in "
                f"{str(dtype).removeprefix('torch.')}, change only by steps over {needed:.1g}; {remedy}"
            )


def movement(model: nn.Module) -> dict[str, dict[str, float]]:
    """How far the norms' trainable gains and biases are from the base's, in any training program, by part.

    Returns:
        part -> `moved` (percent of values that differ) and `max_change` (largest |g - g_base|).

    Raises:
        InputError: before `normtune.apply`.
    """
    if tuning(model).report is None:
        raise InputError("nothing is trainable yet: call normtune.apply first")
    return Movement(model, gains_only=True).measure()


class Movement:
    """Movement of all trainable tensors, by part: gains against the base's, others against their start on a sample."""

    def __init__(self, model: nn.Module, gains_only: bool = False) -> None:
        model, state = unwrapped(model), tuning(model)
        assert state.report is not None
        gains = gain_names(model, state.anatomy)
        self.entries: list[tuple[str, nn.Parameter, torch.Tensor, bool]] = []
        for name, parameter in model.named_parameters():
            part = state.report.part_of.get(name)
            if part is None or parameter.is_meta:
                continue
            if plain(name) in gains:
                self.entries.append((part, parameter, state.base[plain(name)].float().to(parameter.device), True))
            elif not gains_only:
                self.entries.append((part, parameter, sample(parameter).clone(), False))

    @property
    def gain_parts(self) -> set[str]:
        """Parts that hold nothing but gains and biases of norms."""
        others = {part for part, _, _, whole in self.entries if not whole}
        return {part for part, _, _, whole in self.entries if whole} - others

    def prints(self) -> list[tuple[int, int]]:
        """Fingerprints of the trainable gains: equal ones mean that nothing has moved between."""
        return [fingerprint(parameter) for _, parameter, _, whole in self.entries if whole]

    def measure(self) -> dict[str, dict[str, float]]:
        """part -> `moved` (percent) and `max_change`."""
        counts: dict[str, int] = defaultdict(int)
        moved: dict[str, int] = defaultdict(int)
        most: dict[str, float] = defaultdict(float)
        for part, parameter, start, whole in self.entries:
            now = parameter.detach() if whole else sample(parameter)
            change = (now - start).abs()
            counts[part] += change.numel()
            moved[part] += int((change > 0).sum())
            most[part] = max(most[part], float(change.max()))
        return {
            part: {"moved": round(100 * moved[part] / number, 3), "max_change": float(f"{most[part]:.3g}")}
            for part, number in counts.items()
        }
