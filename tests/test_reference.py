"""Twenty steps beside transformers and PEFT in fp32: the same losses, gradients and gains, however the step computes.

The reference is PEFT's LNTuning under transformers' own loss on one padded batch, without lean forwards, packing,
stored features or a head on supervised positions alone.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from benchmarks.workload import packed, padded, peft_norms
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import normtune as nt
from normtune.step import loss_at, positions

pytestmark = pytest.mark.heavy

IMAGE, PATCHES = 99, 16
STEPS = 20


def model() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    text = LlamaConfig(
        hidden_size=32, intermediate_size=86, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, initializer_range=0.2,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE))


def samples(step: int) -> list[dict[str, torch.Tensor]]:
    """Four samples of different lengths, an image each."""
    generator = torch.Generator().manual_seed(step)
    found = []
    for _ in range(4):
        text = int(torch.randint(6, 30, (), generator=generator))
        ids = torch.randint(1, 98, (1, PATCHES + text), generator=generator)
        ids[:, :PATCHES] = IMAGE
        labels = ids.clone()
        labels[:, : PATCHES + text // 2] = -100
        pixels = torch.randn(1, 3, 16, 16, generator=generator)
        found.append(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}
        )
    return found


def features_of(trained: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """What the connector reads: the layer that LLaVA takes, without the class token."""
    with torch.no_grad():
        seen = trained.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return seen[trained.config.vision_feature_layer][:, 1:]


def run(
    trained: nn.Module, loss: Callable[[list[dict[str, torch.Tensor]]], float]
) -> tuple[list[float], list[list[torch.Tensor]], list[torch.Tensor]]:
    """Losses and gradients of all steps, and the gains at the end; `loss` runs backward."""
    gains = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(gains, lr=1e-3, weight_decay=0.0)
    losses, gradients = [], []
    for step in range(STEPS):
        losses.append(loss(samples(step)))
        gradients.append([p.grad.clone() for p in gains if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients, gains


@pytest.fixture(scope="module")
def reference() -> tuple[list[float], list[list[torch.Tensor]], list[torch.Tensor]]:
    tuned = peft_norms(model()).train()

    def loss(batch: list[dict[str, torch.Tensor]]) -> float:
        value = tuned(**padded(batch), use_cache=False).loss
        value.backward()
        return float(value.detach())

    return run(tuned, loss)


@pytest.mark.parametrize("size", [4, 1], ids=["accumulation 1", "accumulation 4"])
@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
@pytest.mark.parametrize("layout", [padded, packed], ids=lambda layout: layout.__name__)
def test_twenty_steps_are_those_of_peft(
    layout: Callable[..., dict[str, torch.Tensor]], cached: bool, size: int, reference: tuple[list, list, list]
) -> None:
    own = model().train()
    nt.apply(own, "layernorm-simple")
    nt.lean(own)

    def loss(batch: list[dict[str, torch.Tensor]]) -> float:
        supervised = sum(int((one["labels"][:, 1:] != -100).sum()) for one in batch)
        total = 0.0
        for start in range(0, len(batch), size):
            part = layout(batch[start : start + size])
            rows, targets = positions(part.pop("labels"))
            if cached:
                part["features"] = features_of(own, part.pop("pixel_values"))
            value = loss_at(own, part, rows, targets) / supervised
            value.backward()
            total += float(value.detach())
        return total

    losses, gradients, gains = run(own, loss)
    assert losses == pytest.approx(reference[0], rel=1e-5)
    for step, (mine, theirs) in enumerate(zip(gradients, reference[1], strict=True)):
        for a, b in zip(mine, theirs, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm(), step
    for a, b in zip(gains, reference[2], strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
        assert (a != 1).all()
