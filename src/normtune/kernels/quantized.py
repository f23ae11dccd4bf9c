"""bitsandbytes' 4- and 8-bit weights: which parameters they are, and that gradients keep flowing through them.

Source: bitsandbytes 0.50's `nn/modules.py` (Linear4bit.forward) and `autograd/_functions.py` (matmul_4bit).
Not here: loading a quantized model (pretrained.py); fp32 biases of quantized layers (precision.py).
"""

from __future__ import annotations

import torch
from torch import nn

from normtune.errors import InputError

TRAINABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_quantized(parameter: torch.Tensor) -> bool:
    """Whether a parameter holds packed or 8-bit values, which cannot be trained.

    bitsandbytes' 4-bit weights can pose as bf16 (its `quant_storage`), hence the look at their class.
    """
    return parameter.dtype not in TRAINABLE or type(parameter).__module__.partition(".")[0] == "bitsandbytes"


def keep_differentiable(model: nn.Module) -> None:
    """Keeps 4-bit layers in the storage format that has a backward; nothing happens to a model without any.

    On CPUs with AVX512-BF16, bitsandbytes repacks the weights at the first forward in eval mode whose input needs no
    gradient (any generation) and rounds their scales to bf16. From then on these layers pass no gradient on, silently.

    Raises:
        InputError: that has happened already.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
            raise InputError(
                f"{name}: bitsandbytes has repacked this 4-bit layer for inference: no gradient passes through it;\n"
                "load the model again, with normtune.load or with normtune.apply before its first use"
            )
        module.support_avx512bf16_for_cpu = False
