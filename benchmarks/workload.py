"""What the benchmarks of the training step share: LLaVA-shaped models with random weights, samples, ways to train.

Every way is a `Method` whose `step(samples)` is one optimizer step over the same samples: transformers' own loss on
padded batches under PEFT (as its users run it), or normtune's step under one of its batchings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

import normtune as nt
from normtune.step import loss_at, positions

IMAGE = 999
IGNORED = -100
Sample = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """Of a Llama with an image's features in front; `inner` is 2.6875 hidden, as Llama's, unless given."""

    hidden: int
    layers: int
    vocabulary: int = 32_000
    patches: int = 144
    features: int = 64
    head: int = 64
    inner: int = 0

    @property
    def width(self) -> int:
        """Of the MLP."""
        return self.inner or self.hidden * 43 // 16

    def config(self) -> LlavaConfig:
        text = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // self.head,
            vocab_size=self.vocabulary,
            max_position_embeddings=16_384,
        )
        side = int(self.patches**0.5)
        assert side * side == self.patches, "patches must be a square"
        vision = CLIPVisionConfig(
            hidden_size=self.features,
            intermediate_size=4 * self.features,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=8 * side,
            patch_size=8,
        )
        return LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=self.patches)


class GivenFeatures(nn.Module):
    """In place of the vision tower: what it is given are an image's features already, of all layers."""

    def forward(self, pixel_values: torch.Tensor, **options: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=pixel_values, hidden_states=(pixel_values,) * 3)


def base(shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> LlavaForConditionalGeneration:
    """A model with weights from N(0, .02), gains 1; the same for the same shape."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(shape.config()).to(dtype)
    model.model.vision_tower = GivenFeatures()
    model.to_empty(device=device)
    llm = model.model.language_model
    llm.rotary_emb = type(llm.rotary_emb)(model.config.text_config).to(device)  # its buffers are computed, not stored
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0, 0.02, generator=generator)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return model.train()


def sample(shape: Shape, text: int, supervised: int, generator: torch.Generator, dtype: torch.dtype) -> Sample:
    """One image and `text` tokens, the last `supervised` of them supervised; on the CPU."""
    ids = torch.randint(3, 900, (1, shape.patches + text), generator=generator)
    ids[:, : shape.patches] = IMAGE
    labels = ids.clone()
    labels[:, : ids.shape[1] - supervised] = IGNORED
    image = torch.randn(1, shape.patches + 1, shape.features, generator=generator).to(dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": image}


def padded(batch: Sequence[Sample]) -> Sample:
    width = max(one["input_ids"].shape[1] for one in batch)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    joined = {
        key: torch.cat([nn.functional.pad(one[key], (0, width - one[key].shape[1]), value=value) for one in batch])
        for key, value in fill.items()
    }
    return {**joined, "pixel_values": torch.cat([one["pixel_values"] for one in batch])}


def packed(batch: Sequence[Sample]) -> Sample:
    """Samples end to end in one row, positions counted from 0 in each; the first label of each is no target."""
    labels = [torch.nn.functional.pad(one["labels"][:, 1:], (1, 0), value=IGNORED) for one in batch]
    lengths = torch.tensor([one["input_ids"].shape[1] for one in batch])
    return {
        "input_ids": torch.cat([one["input_ids"] for one in batch], 1),
        "labels": torch.cat(labels, 1),
        "position_ids": torch.cat([torch.arange(int(n)) for n in lengths])[None],
        "lengths": lengths,
        "pixel_values": torch.cat([one["pixel_values"] for one in batch]),
    }


def micro_batches(batch: Sequence[Sample], size: int, layout: Callable[[Sequence[Sample]], Sample]) -> list[Sample]:
    return [layout(batch[start : start + size]) for start in range(0, len(batch), size)]


@dataclass
class Method:
    """A way to train: `step(samples)` is one optimizer step, and returns the loss."""

    model: nn.Module
    step: Callable[[Sequence[Sample]], torch.Tensor]


def updating(model: nn.Module) -> Callable[[], None]:
    """The update that `train` makes, and that transformers' Trainer makes: clipping at 1, AdamW in one kernel."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)

    def update() -> None:
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update


def theirs(model: nn.Module, autocast: torch.dtype | None = None) -> Method:
    """transformers' own loss on one padded batch, as its Trainer runs it; with autocast where gains are fp32."""
    update = updating(model)
    device = next(model.parameters()).device

    def step(batch: Sequence[Sample]) -> torch.Tensor:
        together = {key: value.to(device) for key, value in padded(batch).items()}
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            loss = model(**together, use_cache=False).loss
        loss.backward()
        update()
        return loss.detach()  # type: ignore[no-any-return]

    return Method(model, step)


def ours(
    model: nn.Module,
    size: int,
    layout: Callable[[Sequence[Sample]], Sample] = padded,
    strategy: str | list[str] = "layernorm-simple",
    activations: str = "exact",
    compiled: bool = False,
    **options: Any,
) -> Method:
    """normtune's step: micro-batches of `size` samples, the sum of their losses over the step's supervised tokens."""
    from normtune.strategy import compile_blocks

    nt.apply(model, strategy, **options)
    nt.lean(model, activations=activations)
    if compiled and (warning := compile_blocks(model)):
        raise RuntimeError(warning)
    update = updating(model)
    device = next(model.parameters()).device

    def step(batch: Sequence[Sample]) -> torch.Tensor:
        parts = micro_batches(batch, size, layout)
        placed = [positions(part.pop("labels")) for part in parts]
        supervised = sum(len(rows) for rows, _ in placed)
        total = torch.zeros((), device=device)
        for part, (rows, targets) in zip(parts, placed, strict=True):
            moved = {key: value if key == "lengths" else value.to(device) for key, value in part.items()}
            loss = loss_at(model, moved, rows.to(device), targets.to(device)) / supervised
            loss.backward()
            total += loss.detach()
        update()
        return total

    return Method(model, step)


def peft_norms(model: nn.Module, fp32: bool = False) -> nn.Module:
    """PEFT's LNTuning of the norms in the blocks; its gains have the base's dtype unless `fp32`."""
    tuned = get_peft_model(model, LNTuningConfig(target_modules=nt.anatomy(model).norms))  # type: ignore[arg-type]
    for parameter in tuned.parameters():
        if parameter.requires_grad and fp32:
            parameter.data = parameter.data.float()
    return tuned


def peft_lora(model: nn.Module, rank: int = 64, dropout: float = 0.05) -> nn.Module:
    """PEFT's LoRA on every linear layer of the LLM's blocks."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=nt.anatomy(model).linears)
    return get_peft_model(model, config)  # type: ignore[arg-type]


@contextmanager
def kept(model: nn.Module) -> Iterator[list[int]]:
    """Counts into a list of one the bytes that autograd keeps at most at a time, parameters and buffers aside."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    live: dict[int, int] = {}
    most = [0]

    def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            live[storage.data_ptr()] = storage.nbytes()
            most[0] = max(most[0], sum(live.values()))
        return tensor, storage.data_ptr()

    def unpack(packed: tuple[torch.Tensor, int]) -> torch.Tensor:
        live.pop(packed[1], None)
        return packed[0]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield most
