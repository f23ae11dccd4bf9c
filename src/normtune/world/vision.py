"""The two frozen vision encoders of the embedded world, trained on rendered scenes with labels per patch.

Every patch is told what it belongs to: background, and the colour, shape, size, row and column of its thing. The
labels are read linearly from the last but one layer, the one that LLaVA takes its features from; the last layer serves
a loss of its own, as in published encoders (which categories are there at all). `vision` is a SigLIP-style
transformer without CLS token, `vision2` a DINOv2 with CLS, another width, patch and image size.

Not here: drawing (`scenes`), the language model (`language`). Source: SigLIP (Zhai et al., 2023), DINOv2 (Oquab et
al., 2023) as transformers implements them; dense labels instead of their losses, since a minute must do.

Shapes: B images, P patches, T tokens (P, and one more with CLS), H hidden size, h pixels of a side.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from normtune.progress import Bar
from normtune.runlog import atomic_folder
from normtune.world import scenes

LAYER = -2  # the hidden state that LLaVA reads
LABELS = {"background": 3, "colour": 7, "shape": 6, "size": 3, "row": 4, "column": 4, "first": 2}  # classes
MEAN = STD = [0.5, 0.5, 0.5]
MINUTES = 12.0  # with which the shipped encoders were made
POOL, FRESH = 8192, 24  # scenes kept in memory, and how many of them are drawn anew per step
BATCH = 64
RATES = 8e-3, 2e-3  # peak learning rates of Muon and AdamW


@dataclass(frozen=True)
class Design:
    """What distinguishes the two encoders. `steps_per_minute` is a nominal rate of one CPU core."""

    name: str
    side: int  # pixels of the image that the encoder sees
    patch: int
    steps_per_minute: int
    share: float  # of the minutes for vision

    @property
    def grid(self) -> int:
        return self.side // self.patch

    def model(self) -> nn.Module:
        sizes: dict[str, Any] = {"image_size": self.side, "patch_size": self.patch}
        if self.name == "vision":
            sizes |= {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 5, "num_attention_heads": 4}
            return SiglipVisionModel(SiglipVisionConfig(vision_use_head=False, **sizes))
        sizes |= {"hidden_size": 96, "mlp_ratio": 2, "num_hidden_layers": 4, "num_attention_heads": 3}
        return Dinov2Model(Dinov2Config(**sizes))

    def processor(self) -> Any:
        square = {"height": self.side, "width": self.side}
        if self.name == "vision":
            return SiglipImageProcessorPil(size=square, image_mean=MEAN, image_std=STD)
        edge = {"shortest_edge": self.side}
        return BitImageProcessorPil(
            size=edge, crop_size=square, image_mean=MEAN, image_std=STD, do_resize=True, do_center_crop=True,
            do_rescale=True, do_normalize=True, do_convert_rgb=True,
        )  # fmt: skip


DESIGNS = (
    Design("vision", side=64, patch=16, steps_per_minute=450, share=0.6),
    Design("vision2", side=60, patch=12, steps_per_minute=500, share=0.4),
)


def build(out: Path, minutes: float, seed: int, *, measured: int = 400) -> dict[str, dict[str, Any]]:
    """Trains both encoders into `out`/vision and `out`/vision2; one that is there already is kept and measured.

    The number of steps follows from `minutes` at a nominal rate, so that the result depends on the arguments only.
    Returns figures of each by name: parameters, bytes, steps, seconds, accuracy of each label on `measured` held-out
    scenes.
    """
    report = {}
    for index, design in enumerate(DESIGNS):
        folder = out / design.name
        facts: dict[str, Any] = {}
        if not (folder / "config.json").is_file():
            began = time.monotonic()
            steps = max(1, round(minutes * design.share * design.steps_per_minute))
            model = train(design, steps, seed * 10 + index)
            facts = {"steps": steps, "batch": BATCH, "seconds": round(time.monotonic() - began, 1)}
            with atomic_folder(folder, replace=True) as temporary:
                model.to(torch.bfloat16).save_pretrained(temporary)  # type: ignore[operator]
                design.processor().save_pretrained(temporary)
                for file in temporary.iterdir():
                    file.chmod(0o644)  # safetensors makes files for their owner alone
        report[design.name] = {**facts, **measure(folder, design, measured)}
    return report


class Pool:
    """Rendered scenes, redrawn bit by bit: `pixels` uint8 [N, h, h, 3], `labels` int64 [N, P, L], `present` [N, 30]."""

    def __init__(self, design: Design, rng: np.random.Generator, size: int = POOL) -> None:
        self.design, self.rng = design, rng
        drawn = [draw(design, rng, "text") for _ in range(size)]
        self.pixels = np.stack([pixels for pixels, _, _ in drawn])
        self.labels = torch.stack([labels for _, labels, _ in drawn])
        self.present = torch.stack([present for _, _, present in drawn])
        self.next = 0

    def batch(self, fresh: int = FRESH) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pixels as the processor gives them, with noise [B, 3, h, h]; labels [B, P, L]; categories [B, 30]."""
        for _ in range(fresh):
            pixels, self.labels[self.next], self.present[self.next] = draw(self.design, self.rng, "text")
            self.pixels[self.next] = pixels
            self.next = (self.next + 1) % len(self.pixels)
        chosen = self.rng.integers(0, len(self.pixels), BATCH)
        images = self.pixels[chosen].astype(np.float32) / 127.5 - 1
        contrast = self.rng.uniform(0.92, 1.08, (BATCH, 1, 1, 1))
        light = self.rng.uniform(-0.06, 0.06, (BATCH, 1, 1, 1))
        noise = self.rng.standard_normal(images.shape, dtype=np.float32) * self.rng.uniform(0, 0.06, (BATCH, 1, 1, 1))
        images = np.clip(images * contrast + light + noise, -1, 1).astype(np.float32)
        return torch.from_numpy(images).permute(0, 3, 1, 2), self.labels[chosen], self.present[chosen]


def draw(design: Design, rng: np.random.Generator, split: str) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """One new scene of `split`: pixels as from a JPEG file uint8 [h, h, 3], labels [P, L], categories present [30]."""
    scene = scenes.sample(rng, split)
    boxes = scenes.layout(scene, rng)
    buffer = io.BytesIO()
    scenes.render(scene, rng, boxes).save(buffer, "JPEG", quality=95, subsampling=0)
    image = Image.open(buffer).convert("RGB")
    if design.side != scenes.SIDE:
        image = image.resize((design.side, design.side), Image.Resampling.BICUBIC)
    present = torch.tensor([float(category in scene.categories) for category in scenes.CATEGORIES])
    return np.asarray(image), labels_of(scene, boxes, design.grid), present


def labels_of(scene: scenes.Scene, boxes: Sequence[scenes.Box], grid: int) -> torch.Tensor:
    """The class of every patch for every label, int64 [grid * grid, L]; the last class of a label means "no thing".

    `first` tells the first patch of a thing in raster order (1) from its others, so that things can be counted.
    """
    background = list(scenes.BACKGROUNDS).index(scene.background)
    colours = list(scenes.COLOURS)
    rows, seen = [], set()
    for owner in scenes.owners(boxes, grid):
        if owner < 0:
            rows.append([background, *(LABELS[name] - 1 for name in ("colour", "shape", "size", "row", "column")), 0])
            continue
        thing = scene.things[owner]
        of_thing = [colours.index(thing.colour), scenes.SHAPES.index(thing.shape), scenes.SIZES.index(thing.size)]
        rows.append([background, *of_thing, thing.row, thing.column, int(owner not in seen)])
        seen.add(owner)
    return torch.tensor(rows)


class Heads(nn.Module):
    """What reads the encoder during training and is thrown away: labels per patch, categories per image."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.patch = nn.Linear(hidden_size, sum(LABELS.values()))
        self.image = nn.Linear(hidden_size, len(scenes.CATEGORIES))

    def losses(self, output: Any, labels: torch.Tensor, present: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss of the labels plus small ones, logits of the labels [B, P, sum of classes])."""
        features = output.hidden_states[LAYER][:, -labels.shape[1] :]  # [B, P, H], without CLS
        logits = self.patch(features)
        loss = torch.zeros(())
        for part, label in zip(logits.split(list(LABELS.values()), -1), labels.unbind(-1), strict=True):
            loss = loss + F.cross_entropy(part.flatten(0, 1), label.flatten())
        categories = self.image(output.last_hidden_state.mean(1))
        # Features of unit scale are what a new connector is drawn for.
        scale = (features.square().mean(-1).sqrt() - 1).square().mean()
        return loss + 3 * F.binary_cross_entropy_with_logits(categories, present) + 0.1 * scale, logits


def train(design: Design, steps: int, seed: int, quiet: bool = False) -> nn.Module:
    """An encoder of `design` after `steps` steps; float32, in eval mode.

    Muon for the matrices of the blocks (it needed half of AdamW's steps), AdamW for the rest; the rates warm up, stay,
    and fall linearly over the second half.
    """
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = design.model()
        heads = Heads(model.config.hidden_size)  # type: ignore[union-attr, arg-type]
    pool = Pool(design, rng, min(POOL, BATCH * steps))
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layer" in name]
    chosen = {id(p) for p in matrices}
    parameters = [*model.parameters(), *heads.parameters()]
    optimizers = [
        torch.optim.Muon(matrices, lr=RATES[0], weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([p for p in parameters if id(p) not in chosen], RATES[1], (0.9, 0.98), weight_decay=0.0),
    ]
    warmup = max(1, min(100, steps // 10))
    model.train()
    with Bar(design.name, steps, 0, quiet) as bar:
        for step in range(steps):
            factor = min((step + 1) / warmup, 1.0, max(2 * (steps - step) / steps, 0.01))
            for optimizer, rate in zip(optimizers, RATES, strict=True):
                optimizer.param_groups[0]["lr"] = rate * factor
                optimizer.zero_grad()
            pixels, labels, present = pool.batch()
            with torch.autocast("cpu", torch.bfloat16):
                loss, _ = heads.losses(model(pixels, output_hidden_states=True), labels, present)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            bar.update(step + 1, f"loss {loss.item():.3f}")
    return model.eval()


@torch.no_grad()
def features_of(model: Any, processor: Any, images: Sequence[Image.Image], patches: int) -> torch.Tensor:
    """What LLaVA reads from the encoder, by patch: float32 [B, P, H]."""
    pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
    return model(pixels, output_hidden_states=True).hidden_states[LAYER][:, -patches:].float()


def fit_reader(inputs: torch.Tensor, labels: torch.Tensor, steps: int = 60) -> nn.Linear:
    """Softmax regression from features [N, H] to all labels [N, L] at once, by L-BFGS."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reader = nn.Linear(inputs.shape[1], sum(LABELS.values()))
    optimizer = torch.optim.LBFGS(reader.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        parts = reader(inputs).split(list(LABELS.values()), -1)
        losses = [F.cross_entropy(part, label) for part, label in zip(parts, labels.unbind(-1), strict=True)]
        loss = torch.stack(losses).sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return reader.requires_grad_(False)


def measure(folder: Path, design: Design, count: int = 400, seed: int = 99) -> dict[str, Any]:
    """Sizes of the saved encoder, and how well a linear reader of its features finds the labels of unseen scenes.

    A reader is fitted to the features of 4 times `count` scenes of split `text` and asked about `count` scenes of split
    `dev`, which nothing learns from. `patches` are accuracies over all patches that a thing owns (an eighth of one can
    be enough to own it), `things` over the patches that hold a thing's centre; `background` and `found` (is there a
    thing) are over all patches.
    """
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    rng = np.random.default_rng(seed)
    reader = fit_reader(*_featured(design, model, processor, rng, "text", 4 * count)[:2])
    inputs, labels, centres = _featured(design, model, processor, rng, "dev", count)
    guesses = torch.stack([part.argmax(-1) for part in reader(inputs).split(list(LABELS.values()), -1)], -1)
    right = dict(zip(LABELS, (guesses == labels).double().unbind(-1), strict=True))
    owned = labels[:, 1] != LABELS["colour"] - 1
    found = ((guesses[:, 1] != LABELS["colour"] - 1) == owned).double()
    places = {"patches": owned, "things": owned & centres}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": (folder / "model.safetensors").stat().st_size,
        "background": round(right.pop("background").mean().item(), 4),
        "found": round(found.mean().item(), 4),
        **{
            what: {name: round(values[mask].mean().item(), 4) for name, values in right.items()}
            for what, mask in places.items()
        },
        "feature_rms": round(inputs.square().mean().sqrt().item(), 3),
    }


def _featured(
    design: Design, model: Any, processor: Any, rng: np.random.Generator, split: str, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of `count` new scenes, patch by patch: features [N, H], labels [N, L], whether a thing's centre is there [N]."""
    images, labels, centres = [], [], torch.zeros(count, design.grid**2, dtype=torch.bool)
    side = scenes.SIDE / design.grid
    for number in range(count):
        scene = scenes.sample(rng, split)
        boxes = scenes.layout(scene, rng)
        buffer = io.BytesIO()
        scenes.render(scene, rng, boxes).save(buffer, "JPEG", quality=95, subsampling=0)
        images.append(Image.open(buffer).convert("RGB"))
        labels.append(labels_of(scene, boxes, design.grid))
        for box in boxes:
            centres[number, int(box.y // side) * design.grid + int(box.x // side)] = True
    chunks = [features_of(model, processor, images[n : n + 100], design.grid**2) for n in range(0, count, 100)]
    return torch.cat(chunks).flatten(0, 1), torch.cat(labels), centres.flatten()
