"""Linear layers, whatever they are made of: torch's, quantized ones, PEFT's around them, GPT-2's transposed one."""

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
