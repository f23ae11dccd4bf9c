"""What tuning has changed inside a model: similarity of layers, gradients, gains, what the image contributes.

Scope: one finished run (or adapter) at a time, as a document of plain figures; formulas and their limits are in
docs/analysis.md. The way: `samples` (what is looked at), `states` and `similarity` (layers), `stages` and `gradients`,
`roles` and `gains` (norms), `seeing` (scores without the right image); `figures` makes a report's blocks of documents.
Not here: training, tables of several strategies (comparison).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normtune.adapter import read_adapter
from normtune.analysis.gains import gain_map
from normtune.analysis.roles import ROLES, norm_roles
from normtune.analysis.samples import held_out, image_token, in_batches, trained_samples
from normtune.analysis.seeing import image_contribution
from normtune.analysis.similarity import Similarity, significant
from normtune.analysis.stages import stage_gradients
from normtune.analysis.states import block_states, kinds_of_tokens, quiet_model, states_at
from normtune.data import Collator, Mixture, Sample
from normtune.data.skipping import policy
from normtune.errors import InputError
from normtune.features import Store, fill_store
from normtune.progress import Bar
from normtune.recipe import Recipe, load_recipe
from normtune.runlog import Run
from normtune.step import head_of, on_device, size_of, supervised_loss
from normtune.strategy import resolve, tuning
from normtune.tuned import Tuned, open_tuned, place

__all__ = ["ROLES", "analyze_run", "gain_map", "look", "norm_roles"]

FORMAT = 1
LIMIT = 100


def analyze_run(
    run: str | Path,
    *,
    data: str | None = None,
    images: str | None = None,
    samples: int = 64,
    batches: int = 8,
    limit: int | None = LIMIT,
    reuse: bool = True,
    quiet: bool = False,
) -> dict[str, Any]:
    """The analysis of a finished run's folder, or of an adapter folder whose record names the base.

    An adapter alone has no training data and no benchmarks: losses, gradients and the image's contribution are None.

    Args:
        data, images: held-out samples, a file in LLaVA's format and its folder of images; default: questions and truths
            of the recipe's `evaluate.dev` (or `evaluate.data`) as conversations.
        samples: held-out samples, and as many of the training data.
        batches: batches of the last stage's size that gradients are measured on.
        limit: questions per benchmark, whole images at a time; None: all.
        reuse: take scores that the run's `evaluations` hold, with their number of questions (see `seeing`).

    Returns:
        A document for JSON; its fields are described in docs/analysis.md.

    Raises:
        InputError: no such folder, files that are missing or wrong, no held-out samples.
        JobError: gradients that are not finite, or a batch without supervised tokens.
    """
    began, folder = time.monotonic(), Path(run)
    if samples < 1 or batches < 2:
        raise InputError(f"samples {samples}, batches {batches}: give at least 1 sample and 2 batches")
    recipe, base = recipe_of(folder)
    seen, source = held_out(recipe, data, images, samples)
    on_bad = policy(recipe) if recipe else None
    mixture = Mixture(recipe.stages[-1].data, on_bad) if recipe else None
    with torch.random.fork_rng(), threads(recipe):
        tuned = open_tuned(folder)
        model = tuned.model
        place(model, recipe.device if recipe else "auto")
        length = recipe.stages[-1].max_length if recipe else None
        collator = Collator(tuned.processor, length, stored_images(recipe, tuned, seen, mixture), on_bad)
        similarity, losses = layers_and_losses(model, collator, seen, mixture, samples, quiet)
        dropped = collator.counts["dropped"]
        document: dict[str, Any] = {
            "format": FORMAT,
            "run": str(run),
            "strategy": resolve(recipe.stages[-1].strategy)[0] if recipe else (tuned.record or {}).get("strategy"),
            **base,
            "layers": len(tuning(model).anatomy.blocks) + 1,
            "samples": len(seen),
            "held_out": source,
            "similarity": similarity,
            "losses": losses,
            "gradients": None,
            "gains": gain_map(model),
            "image": None,
            "questions": {},
            "notes": [f"{dropped} samples had nothing to learn from and were left out"] if dropped else [],
        }
        if recipe is not None and mixture is not None:
            if recipe.evaluate is not None:
                known = folder if reuse else None
                scores, questions, notes = image_contribution(known, tuned, recipe, recipe.evaluate, limit, quiet)
                document |= {"image": scores, "questions": questions, "notes": [*document["notes"], *notes]}
            over_steps(document, Run(folder), recipe, model, collator, seen, mixture, samples, batches, quiet)
    return {**document, "seconds": round(time.monotonic() - began, 1)}


def recipe_of(folder: Path) -> tuple[Recipe | None, dict[str, Any]]:
    """The recipe of a run's folder, None for an adapter's; seed and model of the base.

    Raises:
        InputError: neither of these.
    """
    if (folder / "recipe.yaml").is_file():
        recipe = load_recipe(folder / "recipe.yaml")
        return recipe, {"seed": recipe.seed, "model": recipe.model.model_dump(mode="json")}
    if (folder / "adapter.json").is_file():
        base = read_adapter(folder)[1].get("base") or {}
        return None, {"seed": base.get("seed"), "model": base.get("model")}
    raise InputError(
        f"{folder} is neither a run nor an adapter folder (no recipe.yaml or adapter.json in it);\n"
        "an analysis needs to know what was tuned: give the folder of a finished run"
    )


def over_steps(
    document: dict[str, Any],
    run: Run,
    recipe: Recipe,
    model: nn.Module,
    collator: Collator,
    seen: Sequence[Sample],
    mixture: Mixture,
    samples: int,
    batches: int,
    quiet: bool,
) -> None:
    """Adds what changes over the last stage: gradients and losses at its checkpoints, whose states it puts into the
    model."""
    points: list[dict[str, Any]] = []

    def losses_at(step: int) -> None:
        train = look(model, collator, trained_samples(mixture, samples))
        points.append({"step": step, "train": train, "held_out": look(model, collator, seen)})

    gradients, notes = stage_gradients(run, recipe, model, collator, mixture, batches, quiet=quiet, visit=losses_at)
    document["losses"]["checkpoints"] = sorted(points, key=lambda point: point["step"])
    document |= {"gradients": gradients, "notes": [*document["notes"], *notes]}


def stored_images(recipe: Recipe | None, tuned: Tuned, seen: Sequence[Sample], mixture: Mixture | None) -> Store | None:
    """The cache in which a training with `cache_features` has kept what its encoder made of the images of its samples;
    what is missing, and of samples that it has not `seen`, is added. None for other runs."""
    if recipe is None or mixture is None or not recipe.stages[-1].cache_features:
        return None
    wanted = {path: sample.where for sample in seen for path in sample.images} | dict(mixture.images())
    skip = policy(recipe) is not None
    return fill_store(recipe.model, tuned.model, tuned.processor, wanted, quiet=True, skip=skip)


def layers_and_losses(
    model: nn.Module, collator: Collator, seen: Sequence[Sample], mixture: Mixture | None, number: int, quiet: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`similarity` by kind of token, on held-out samples; mean loss there, on training samples, and the gap."""
    layers = len(tuning(model).anatomy.blocks) + 1
    found = {kind: Similarity(layers) for kind in ("image", "text")}
    held = look(model, collator, seen, found, quiet=quiet)
    train = None if mixture is None else look(model, collator, trained_samples(mixture, number), quiet=quiet)
    gap = None if held is None or train is None else significant(held - train)
    return {kind: one.result() for kind, one in found.items()}, {"train": train, "held_out": held, "gap": gap}


def look(
    model: nn.Module,
    collator: Collator,
    samples: Sequence[Sample],
    found: dict[str, Similarity] | None = None,
    *,
    quiet: bool = True,
) -> float | None:
    """The mean loss over the supervised tokens of `samples` (None without any), in eval mode; the states between the
    blocks go into `found`, by kind of token. The model is left as it was."""
    state, token = tuning(model), image_token(collator)
    device = next(model.get_submodule(state.anatomy.embed[0]).parameters()).device
    total, supervised, done = 0.0, 0, 0
    title = "training samples" if found is None else "held-out samples"
    with quiet_model(model), torch.no_grad(), Bar(title, len(samples), quiet=quiet) as bar:
        head_of(model)  # once per model it runs the blocks, to learn what becomes of the head's output
        for batch in in_batches(samples, collator):
            with block_states(model, state.anatomy) as states:
                total += float(supervised_loss(model, on_device(batch, device, state.dtype)))
            supervised += size_of(batch)[0]
            for kind, places in kinds_of_tokens(batch, token).items() if found else ():
                found[kind].add(states_at(states, found[kind].layers, places))  # type: ignore[index]
            done += len(batch["input_ids"])
            bar.update(done)
    return significant(total / supervised) if supervised else None


@contextmanager
def threads(recipe: Recipe | None) -> Iterator[None]:
    """As many CPU threads as the run's training used; afterwards as many as before."""
    before = torch.get_num_threads()
    if recipe is not None and recipe.threads:
        torch.set_num_threads(recipe.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
