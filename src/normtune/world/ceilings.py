"""What the tiny language model can do when the scene is given as text: the ceiling of anything tuned from it.

The questions are those of the benchmarks (POPE's three splits, MME's four subtasks, VQAv2's mixture), on scenes
of split `dev`, which nothing is trained on. An answer counts if every token of it, the end included, is the most
likely one after the right tokens before it; for the short answers here that is greedy decoding.

Not here: official scoring of images (`normtune.evaluation`), training (`pretrain`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from transformers import LlamaForCausalLM

from normtune.world import corpus, scenes, text
from normtune.world.scenes import Scene
from normtune.world.text import QA

MANNERS = ("random", "popular", "adversarial")
MME: dict[str, text.Ask] = {
    "existence": text.existence,
    "count": text.count_yes_no,
    "position": text.position_yes_no,
    "color": text.colour_yes_no,
}


def embed(
    model: LlamaForCausalLM,
    batch: corpus.Batch,
    noise: torch.Generator | None = None,
) -> torch.Tensor:
    """Input embeddings [B, S, H]: the sum over each bag; soft positions get scale and noise if asked for."""
    table = model.get_input_embeddings().weight
    rows, length, _ = batch.bags.shape
    flat = batch.bags.view(rows * length, -1)
    summed = torch.nn.functional.embedding_bag(flat, table, mode="sum", padding_idx=corpus.PAD)
    summed = summed.view(rows, length, -1)
    if noise is None:
        return summed
    scale = torch.exp(0.3 * torch.randn(rows, 1, 1, generator=noise))
    spread = table.detach().std() * torch.rand(rows, 1, 1, generator=noise) * 0.7
    shaken = summed * scale + torch.randn(summed.shape, generator=noise) * spread
    return torch.where(batch.soft[..., None], shaken, summed)


def see(batch: corpus.Batch, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Position ids and additive attention mask of a batch, as keyword arguments of the model."""
    mask = torch.zeros(batch.mask.shape, dtype=dtype).masked_fill(~batch.mask, torch.finfo(dtype).min)
    return {"position_ids": batch.places, "attention_mask": mask}


def tell(rng: np.random.Generator, scene: Scene, form: str) -> corpus.Document:
    """A document that begins with the scene in one of corpus.FORMS."""
    made = corpus.Document()
    if form == "plain":
        made.add(corpus.ids(text.description(rng, scene)))
    else:
        made.add_soft((corpus.phrases if form == "pooled" else corpus.slots)(rng, scene, True, True))
    return made


@torch.no_grad()
def right(model: LlamaForCausalLM, documents: list[corpus.Document]) -> list[bool]:
    """For each document whether all its supervised tokens are predicted."""
    hits: list[bool] = []
    for start in range(0, len(documents), 50):
        batch = corpus.collate(documents[start : start + 50])
        embeddings = embed(model, batch)
        guess = model(inputs_embeds=embeddings, **see(batch, embeddings.dtype)).logits.argmax(-1)[:, :-1]
        labels = batch.labels[:, 1:]
        hits += ((guess == labels) | (labels == corpus.IGNORE)).all(1).tolist()
    return hits


def _pope(manner: str) -> Callable[[np.random.Generator, int], tuple[Scene, QA]]:
    def make(rng: np.random.Generator, index: int) -> tuple[Scene, QA]:
        scene = scenes.sample(rng, "dev", 3)
        yes = index % 2 == 0
        category = scenes.pick(rng, scene.things).category if yes else text.absent(rng, scene, manner)
        return scene, QA(text.POPE.format(" ".join(category)), "yes" if yes else "no", manner)

    return make


def _asked(ask: text.Ask, ending: str, least: int = 1) -> Callable[[np.random.Generator, int], tuple[Scene, QA]]:
    def make(rng: np.random.Generator, _: int) -> tuple[Scene, QA]:
        while True:
            scene = scenes.sample(rng, "dev", least)
            qa = ask(rng, scene)
            if qa is not None:
                return scene, QA(qa.question + ending, qa.answer, qa.kind)

    return make


def _groups() -> Iterator[tuple[str, str, Callable[[np.random.Generator, int], tuple[Scene, QA]]]]:
    """(benchmark, part, how to make a question)"""
    for manner in MANNERS:
        yield "pope", manner, _pope(manner)
    for subtask, ask in MME.items():
        yield "mme", subtask, _asked(ask, text.YES_OR_NO)
    yield "vqav2", "mixture", _asked(lambda rng, scene: text.ask(rng, scene, text.QUESTIONS), text.SHORT)
    yield "relations", "yes_no", _asked(text.relation, "", 2)
    for reasoning in text.REASONING:
        yield "reasoning", reasoning.__name__, _asked(reasoning, "", 2)
    yield "caption", "exact", _asked(lambda _, scene: QA(text.CAPTION, text.caption(scene), "caption"), "")
    yield "detail", "exact", _asked(lambda _, scene: QA(text.DETAIL_PROMPTS[0], text.detail(scene), "detail"), "")


def measure(model: LlamaForCausalLM, form: str = "plain", questions: int = 200) -> dict[str, float | dict[str, float]]:
    """Share of right answers per benchmark (mean of its parts) and per part, the scene given in `form`.

    `questions` per part. "vqav2.*" are the kinds of question inside VQAv2's mixture.
    """
    scores: dict[str, list[float]] = {}
    parts: dict[str, float] = {}
    for number, (benchmark, part, make) in enumerate(_groups()):
        rng = np.random.default_rng((77, number))
        documents, kinds = [], []
        for index in range(questions):
            scene, qa = make(rng, index)
            document = tell(rng, scene, form)
            document.turn(qa.question, qa.answer)
            documents.append(document)
            kinds.append(qa.kind)
        hits = right(model, documents)
        parts[f"{benchmark}.{part}"] = round(sum(hits) / len(hits), 4)
        scores.setdefault(benchmark, []).append(sum(hits) / len(hits))
        if benchmark == "vqav2":
            for kind in sorted(set(kinds)):
                mine = [hit for hit, other in zip(hits, kinds, strict=True) if other == kind]
                parts[f"vqav2.{kind}"] = round(sum(mine) / len(mine), 4)
    means: dict[str, float | dict[str, float]] = {name: round(float(np.mean(v)), 4) for name, v in scores.items()}
    return {**means, "parts": parts}
