"""Linear layers, whatever they are made of, and models, whatever is around them."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

_COMPUTES_LINEAR: dict[type, bool] = {}


def is_linear(module: nn.Module) -> bool:
    """A linear layer: torch's (and its quantized subclasses) or the transposed one that GPT-2 has in transformers.

    Not subclasses that compute something else, such as routers of mixtures of experts that give scores and choices.
    """
    from transformers.pytorch_utils import Conv1D

    if type(module).__module__.partition(".")[0] == "bitsandbytes":
        return isinstance(module, nn.Linear)
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    return isinstance(module, nn.Linear) and computes_linear(module)


def computes_linear(module: nn.Linear) -> bool:
    """Whether a subclass's own forward is x W^T + b: run on a shallow copy with tiny weights, once per class."""
    kind = type(module)
    if kind not in _COMPUTES_LINEAR:
        generator = torch.Generator().manual_seed(0)
        weight, bias, x = (torch.randn(*shape, generator=generator) for shape in ((5, 3), (5,), (2, 4, 3)))
        twin = copy.copy(module)
        twin._parameters = {"weight": nn.Parameter(weight), "bias": None if module.bias is None else nn.Parameter(bias)}
        try:
            with torch.no_grad():
                y = kind.forward(twin, x)
            wanted = F.linear(x, weight, None if module.bias is None else bias)
            _COMPUTES_LINEAR[kind] = isinstance(y, torch.Tensor) and torch.allclose(y, wanted, atol=1e-5)
        except Exception:  # it takes other input
            _COMPUTES_LINEAR[kind] = False
    return _COMPUTES_LINEAR[kind]


def features(linear: nn.Module) -> tuple[int, int]:
    """(input size, output size)."""
    if hasattr(linear, "in_features"):
        return linear.in_features, linear.out_features  # type: ignore[return-value]
    size_in, size_out = linear.weight.shape  # type: ignore[union-attr,misc]
    return size_in, size_out


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        if "_orig_mod" in model._modules:
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model
