"""Linear layers, whatever they are made of, and models, whatever is around them."""

from __future__ import annotations

from torch import nn


def is_linear(module: nn.Module) -> bool:
    """A linear layer: torch's (and its quantized subclasses) or the transposed one that GPT-2 has in transformers."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


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
