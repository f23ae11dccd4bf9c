"""Ask a model the questions of the benchmarks and score its answers, with the controls that keep scores honest.

Scope: benchmarks whole or in part (`limit`), with the image, without it (`blind`) or with another item's
(`shuffled`). `selection` decides what is asked and shown, `answering` asks. Not here: scoring rules (`tasks`), files
and tables of results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from normtune.chat import PLACEHOLDER, Turn
from normtune.errors import InputError, did_you_mean
from normtune.evaluation.answering import Request, answer, generate
from normtune.evaluation.selection import CONTROLS, Control, images_shown, select, shuffled_images
from normtune.tasks import TASKS, Item, Task

__all__ = ["CONTROLS", "Control", "answer", "evaluate_model", "select", "shuffled_images"]


def evaluate_model(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    benchmarks: Sequence[str],
    data: str | Path,
    *,
    limit: int | None = None,
    control: Control = "none",
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    predictions: bool = False,
) -> dict[str, dict[str, Any]]:
    """Scores of `model` on each of `benchmarks` (names of `tasks.TASKS`) whose official files lie below `data`.

    `limit` asks at least that many questions per benchmark, whole images at a time (see `select`). `control`
    takes the image away (`blind`) or gives every question another item's image (`shuffled`); questions without
    an image stay as they are. `progress(benchmark, answered, total)` is called after each batch.

    Returns {benchmark: {"score": headline 0 to 1, figures of the task ..., "n": questions asked, "control": ...}}
    and, with `predictions`, a list [{id, question, answer, truth}] in the files' order. The model is left in the
    modes (training or not, module by module) and with the generation settings that it came with.

    InputError for an unknown benchmark or control, and for missing or wrong files: all are read, and the images'
    existence checked, before the first question is asked."""
    _check(benchmarks, control, limit, batch_size)
    root = Path(data)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder.\nGive the folder that holds the benchmarks' files.")
    asked: dict[str, tuple[Task, list[Item], list[Request]]] = {}
    for name in dict.fromkeys(benchmarks):
        items = select(TASKS[name].load(root), limit, seed)
        images = images_shown(name, items, control, seed)
        requests = [_request(name, item, image) for item, image in zip(items, images, strict=True)]
        asked[name] = TASKS[name], items, requests
    results: dict[str, dict[str, Any]] = {}
    for name, (task, items, requests) in asked.items():

        def report(done: int, name: str = name, total: int = len(items)) -> None:
            if progress is not None:
                progress(name, done, total)

        texts = generate(model, processor, requests, task.max_new_tokens, batch_size, report)
        results[name] = {**task.score(items, texts), "n": len(items), "control": control}
        if predictions:
            results[name]["predictions"] = [
                {"id": item.id, "question": item.question, "answer": text, "truth": task.truth(item)}
                for item, text in zip(items, texts, strict=True)
            ]
    return results


def _check(benchmarks: Sequence[str], control: str, limit: int | None, batch_size: int) -> None:
    """InputError for a value that no run could use."""
    for name in benchmarks:
        if name not in TASKS:
            raise InputError(
                f"benchmark '{name}' is unknown{did_you_mean(name, TASKS)}.\nThere are {', '.join(TASKS)}."
            )
    if control not in CONTROLS:
        raise InputError(f"control '{control}' is unknown.\nThere are {', '.join(CONTROLS)}.")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}.\nGive 1 or more, or no limit.")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}.\nGive 1 or more.")


def _request(name: str, item: Item, image: Path | None) -> Request:
    text = item.question if image is None else f"{PLACEHOLDER}\n{item.question}"
    return Request((Turn("user", text),), () if image is None else (image,), f"{name}, item '{item.id}'")
