"""The gain map: how far training has moved each norm's gain, and how far it has turned it.

Scope: gains of every norm of the LLM (of the vision encoder where they were trained), against the base's. Not here:
biases, which not every norm has; gradients.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn

from normtune.analysis.roles import norm_roles
from normtune.analysis.similarity import significant
from normtune.layers import unwrapped
from normtune.strategy import base_gains, parameters, plain, tuning
from normtune.structure import formulas
from normtune.structure.norms import own_parameters


def gain_map(model: nn.Module) -> list[dict[str, Any]]:
    """One record per norm, in the order of the network.

    `name`, `role` (see `norm_roles`), `block` (number in the LLM or in the vision encoder; None outside), `change`
    |g - g0| / |g0|, `angle` between g and g0 in degrees, `trained`: whether the run trained it.

    g is the effective gain, what the normalized value is multiplied by: 1 + the weight where that is the norm's
    formula. `change` and `angle` are None where the base's gain is zero. Empty for a model without learned gains.

    Raises:
        InputError: as `norm_roles`.
    """
    model = unwrapped(model)
    state, present, base = tuning(model), parameters(model), base_gains(model)
    if not state.anatomy.norms:
        return []
    roles = norm_roles(model)
    names = {id(p): plain(name) for name, p in model.named_parameters()}
    gains = {norm: names[id(own_parameters(model.get_submodule(norm))[0])] for norm in roles}
    kept = [norm for norm in roles if gains[norm] in base]
    kinds = formulas(model, kept)
    found = []
    for norm in kept:
        offset = 1.0 if "1+g" in kinds[norm].kind else 0.0
        before = base[gains[norm]].double().flatten() + offset
        after = present[gains[norm]].detach().cpu().double().flatten() + offset
        length = float(before.norm())
        found.append(
            {
                "name": norm,
                "role": roles[norm],
                "block": block_of(norm),
                "change": significant(float((after - before).norm()) / length) if length else None,
                "angle": angle(before, after),
                "trained": gains[norm] in state.tuned,
            }
        )
    return found


def block_of(name: str) -> int | None:
    """The first number in a module's name: that of the block it is in."""
    number = re.search(r"\.(\d+)(\.|$)", name)
    return int(number[1]) if number else None


def angle(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Between two fp64 vectors in degrees, exact for small ones too (Kahan, 2006); None where one is zero."""
    if not float(a.norm()) or not float(b.norm()):
        return None
    u, v = a / a.norm(), b / b.norm()
    return significant(math.degrees(2 * math.atan2(float((u - v).norm()), float((u + v).norm()))))
