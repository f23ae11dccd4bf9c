"""Floating-point operations of a training step, by rule, and the rate that a GPU's datasheet promises.

A matmul with N weights costs 2N for each row in forward, 2N more for the gradient of its input, only where one has to
flow through, and 2N for the gradient of its weights, only where these train. The head runs at supervised positions, the
encoder once for each image. So a frozen base under trained norms costs 4N and not 6N, and a utilization (MFU) by this
count claims no matmul that nobody did. Source: the count of Kaplan et al., arXiv 2001.08361, by matmul.
Not counted: element-wise work, what recomputing costs (activation checkpointing), windows of sliding attention.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normtune.layers import features, is_linear, unwrapped
from normtune.strategy import tuning

# Datasheet rates, FLOP/s without sparsity: bf16, fp16, fp32 (without TF32). NVIDIA's datasheets and whitepapers.
RATES: dict[str, tuple[float | None, float, float]] = {
    "B200": (2250e12, 2250e12, 80e12),
    "H200 NVL": (835e12, 835e12, 60e12),
    "H200": (989e12, 989e12, 67e12),
    "H100 NVL": (835e12, 835e12, 60e12),
    "H100 PCIe": (756e12, 756e12, 51e12),
    "H100": (989e12, 989e12, 67e12),
    "A100": (312e12, 312e12, 19.5e12),
    "L40S": (362e12, 362e12, 91.6e12),
    "L4": (121e12, 121e12, 30.3e12),
    "A10": (125e12, 125e12, 31.2e12),
    "RTX 4090": (165e12, 165e12, 82.6e12),
    "RTX 3090": (71e12, 71e12, 35.6e12),
    "V100": (None, 125e12, 15.7e12),
    "T4": (None, 65e12, 8.1e12),
}
OTHER_CHIPS = {"Laptop", "Ti", "D", "MIG"}
"""Words that make a name one of another chip, or of a slice of one, whose rate is not in the table."""


def peak_rate(device: str, dtype: torch.dtype = torch.bfloat16) -> float | None:
    """FLOP/s of dense matmuls by the datasheet; None where it is not known.

    Args:
        device: name of the GPU, as `torch.cuda.get_device_name` gives it.
    """
    words = device.replace("-", " ").split()
    column = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}.get(dtype)
    found = next((rates for name, rates in RATES.items() if set(name.split()) <= set(words)), None)
    return None if found is None or column is None or OTHER_CHIPS.intersection(words) else found[column]


@dataclass(frozen=True)
class Flops:
    """What a step costs: FLOPs per token, supervised position, distinct image and pair of positions that attend."""

    token: float
    supervised: float
    image: float
    pair: float

    def step(self, tokens: float, supervised: float = 0, images: float = 0, pairs: float = 0) -> float:
        """FLOPs of a step; `tokens` with image tokens and without padding, `pairs` from `causal_pairs`."""
        return self.token * tokens + self.supervised * supervised + self.image * images + self.pair * pairs


def causal_pairs(lengths: Iterable[int]) -> float:
    """How many pairs (query, key) causal attention sees in samples of these lengths."""
    return sum(n * (n + 1) / 2 for n in lengths)


def count_flops(model: nn.Module, cached: bool = False) -> Flops:
    """The costs of a model as it is tuned now; call it again after `apply`. Weights may be on the meta device.

    Args:
        cached: images come as stored features, so that one of them costs the connector's matmuls alone.
    """
    model = unwrapped(model)
    found = tuning(model).anatomy
    images = [p for name in (*found.vision, *found.connector) for p in model.get_submodule(name).parameters()]
    before = [*images, *model.get_submodule(found.embed[0]).parameters()]
    flows = any(p.requires_grad for p in before)
    token = pair = 0.0
    for name in found.blocks:
        one, of_pair, flows = block_flops(model, name, flows)
        token, pair = token + one, pair + of_pair
    flows = flows or any(p.requires_grad for n in found.final_norm for p in model.get_submodule(n).parameters())
    head = sum(matmul(model.get_submodule(n), flows)[0] for n in found.head)
    return Flops(token, head, image_flops(model, cached), pair)


def block_flops(model: nn.Module, name: str, flows: bool) -> tuple[float, float, bool]:
    """Of a block: FLOPs per token and per pair, and whether gradients flow on; attention is taken to come first."""
    found, block = tuning(model).anatomy, model.get_submodule(name)
    inside = [n for n, _ in block.named_modules(prefix=name)]
    norms = {*found.norms, *found.qk_norms}.intersection(inside)
    first = (*found.attn_q, *found.attn_k, *found.attn_v, *found.attn_qkv)
    total, attends = 0.0, 0.0
    flows = flows or any(p.requires_grad for n in norms for p in model.get_submodule(n).parameters())
    stages = [_below(inside, first), _below(inside, found.attn_o)]
    stages.append([n for n in inside if n not in {*stages[0], *stages[1]}])
    share = active_share(model)
    outer = model.get_submodule(found.embed[0]).weight.shape[-1]  # type: ignore[union-attr,index]
    for number, names in enumerate(stages):
        after = flows
        for module in map(model.get_submodule, names):
            inner = is_linear(module) and features(module)[0] != outer  # what it is given comes from within the stage
            cost, trains = matmul(module, after if inner else flows)
            total, after = total + cost, after or trains
        total += share * sum(experts(model.get_submodule(n), flows) for n in names)
        flows = after
        if number == 0:
            width = sum(features(_plain(model.get_submodule(n)))[0] for n in found.attn_o if n in inside)
            attends = 4.0 * width * (3 if flows else 1)
    return total, attends, flows


def matmul(module: nn.Module, flows: bool) -> tuple[float, bool]:
    """FLOPs of one row through a linear layer, and whether its weight trains; 0 for what is no linear layer."""
    if not is_linear(module):
        return 0.0, False
    size_in, size_out = features(module)
    trains = bool(module.weight.requires_grad)  # type: ignore[union-attr]
    return 2.0 * size_in * size_out * (1 + flows + trains), trains


def experts(module: nn.Module, flows: bool) -> float:
    """FLOPs of one row through all experts that are held in one tensor (E, in, out)."""
    own = [p for p in module.parameters(recurse=False) if p.dim() == 3]
    return sum(2.0 * p.numel() * (1 + flows + p.requires_grad) for p in own)


def active_share(model: nn.Module) -> float:
    """The share of the experts that a token passes through."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    chosen = getattr(text, "num_experts_per_tok", None)
    number = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    return chosen / number if chosen and number else 1.0


def image_flops(model: nn.Module, cached: bool = False) -> float:
    """Of one image: the encoder on its patches unless its output is `cached`, and the connector on what comes out.

    0 where the number of patches is not known.
    """
    found = tuning(model).anatomy
    config: Any = getattr(getattr(model, "config", None), "vision_config", None)
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if not found.vision or not isinstance(size, int) or not isinstance(patch, int):
        return 0.0
    patches, total = (size // patch) ** 2, 0.0
    flows = False
    for root in [] if cached else map(model.get_submodule, found.vision):
        rows = positions_of(root, patches)
        flows = any(p.requires_grad for p in root.parameters())
        layers = [layer for held in root.modules() if isinstance(held, nn.ModuleList) for layer in held]
        inner = {id(m): m for layer in layers for m in layer.modules()}
        total += rows * sum(matmul(m, flows)[0] for m in inner.values())
        total += 4.0 * rows**2 * getattr(config, "hidden_size", 0) * len(layers) * (3 if flows else 1)
        convolutions = [m for m in root.modules() if isinstance(m, nn.Conv2d)]
        total += patches * sum(2.0 * m.weight.numel() * (1 + m.weight.requires_grad) for m in convolutions)
    for root in map(model.get_submodule, found.connector):
        for module in root.modules():
            cost, trains = matmul(module, flows)
            total, flows = total + patches * cost, flows or trains
    return total


def positions_of(encoder: nn.Module, patches: int) -> int:
    """Rows inside the encoder: its patches and the class token and registers that its position table has room for."""
    sizes = [p.shape[-2] for p in encoder.parameters() if p.dim() >= 2]
    return min((n for n in sizes if patches <= n <= patches + 8), default=patches)


def _below(inside: list[str], roots: Iterable[str]) -> list[str]:
    """Those of `inside` that are one of `roots` or below one (LoRA's matrices are below the layer they adapt)."""
    wanted = set(roots).intersection(inside)
    return [n for n in inside if any(n == root or n.startswith(root + ".") for root in wanted)]


def _plain(module: nn.Module) -> nn.Module:
    """The layer under PEFT's, where there is one."""
    return getattr(module, "base_layer", module)
