"""What an analysis looks at: samples that the training has not seen, samples that it has, and batches of the latter.

Scope: choosing samples, the same for every run of the same data; a benchmark's questions with their truths as
conversations. Not here: tokens and pixels (data/), what is measured.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path

from torch import Tensor

from normtune.chat import Turn
from normtune.data import Collator, Mixture, Sample, micro_batches, read_samples
from normtune.errors import InputError
from normtune.evaluation.questions import YES_NO, Asked, Settings, ask
from normtune.recipe import DataSource, Recipe, Stage
from normtune.step import MICRO_BATCH

SEED = 0  # of what is chosen, whatever the run's own seed: runs of one comparison are measured on the same samples
STATES_BATCH = 8  # samples of which the states of all layers are held at a time


def held_out(recipe: Recipe | None, data: str | None, images: str | None, number: int) -> tuple[list[Sample], str]:
    """`number` samples that no stage trains on, and in words where they are from.

    Those of the file `data` in LLaVA's format, or else the questions of the benchmarks of `evaluate.dev` (or
    `evaluate.data`) with their truths, as many of each benchmark.

    Raises:
        InputError: neither; files that are missing or wrong.
    """
    if data is not None:
        found = read_samples(DataSource(path=data, images=images))
        chosen = sorted(random.Random(SEED).sample(range(len(found)), min(number, len(found))))
        return [found[place] for place in chosen], Path(data).name
    section = recipe.evaluate if recipe else None
    if section is None:
        raise InputError(
            "there is no `evaluate` section in a recipe to take held-out samples from;\n"
            "give --data FILE (JSON with conversations) and --images DIR"
        )
    names = list(dict.fromkeys(section.benchmarks))
    share = -(-number // len(names))
    folder = section.dev or section.data
    asked = ask(Settings(tuple(names), share, seed=SEED), folder)
    taken = [sample for one in asked for sample in answered(one)[:share]][:number]
    return taken, f"{', '.join(names)} of {Path(folder).name}"


def answered(asked: Asked) -> list[Sample]:
    """The questions of a benchmark with their truths as the assistant's turn; those without one are left out.

    Of several references the most frequent one, and of those the first; yes and no as the model is asked to say them.
    """
    samples = []
    for place, item in enumerate(asked.items):
        truth = asked.task.truth(item)
        texts = [truth] if isinstance(truth, str) else list(truth)
        if not texts:
            continue
        text = Counter(texts).most_common(1)[0][0]
        request = asked[place]
        turns = (*request.turns, Turn("assistant", text.capitalize() if asked.name in YES_NO else text))
        images = () if asked.images[place] is None else (asked.images[place],)
        samples.append(Sample(item.id, turns, images, asked.name, request.where))  # type: ignore[arg-type]
    return samples


def trained_order(mixture: Mixture) -> Iterator[int]:
    """The places of a stage's samples in a fixed random order, epoch after epoch, without end."""
    return (place for epoch in count() for place in mixture.order(SEED, epoch))


def trained_samples(mixture: Mixture, number: int) -> list[Sample]:
    """The first `number` different ones of that order."""
    places = islice(trained_order(mixture), min(number, mixture.per_epoch))
    return [mixture[place] for place in dict.fromkeys(places)]


def training_batches(
    mixture: Mixture, collator: Collator, stage: Stage, number: int
) -> Iterator[list[dict[str, Tensor]]]:
    """`number` batches of the stage's size, each as its micro-batches, padded; the same for every run of this data."""
    order = trained_order(mixture)
    for _ in range(number):
        rows = collator.encode([mixture[place] for place in islice(order, stage.batch_size)])
        size = stage.micro_batch_size or MICRO_BATCH
        yield [collator.padded(group) for group in micro_batches(rows, size, False, 0)]


def in_batches(samples: Sequence[Sample], collator: Collator) -> Iterator[dict[str, Tensor]]:
    """Padded batches of samples of about one length."""
    rows = collator.encode(samples)
    yield from (collator.padded(group) for group in micro_batches(rows, STATES_BATCH, False, 0))


def image_token(collator: Collator) -> int | None:
    """The id of the token that stands for a patch of an image in the prompt; None where there is none."""
    found = collator.chat.tokenizer.get_vocab().get(collator.chat.image_token)
    return None if found is None else int(found)
