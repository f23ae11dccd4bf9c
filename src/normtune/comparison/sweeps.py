"""Sweeps: the rows that answer one question about a setting (a rate, the length of stage 1, an encoder, how much data,
which norms).

Scope: variants. Not here: what is read off them (`statistics`), the order of norms (`analysis`), training.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from normtune.comparison.kinds import apportion
from normtune.comparison.variants import (
    ALL,
    Variant,
    at_rates,
    default_rate,
    label_of,
    parse_strategies,
    prepared,
    rate_candidates,
    slug,
    stage1_variants,
    strategy_variant,
    with_strategy,
)
from normtune.data import Mixture, read_samples
from normtune.data.skipping import policy
from normtune.errors import InputError
from normtune.recipe import Recipe
from normtune.training.batching import steps_of

POINTS = 8
LENGTHS = (0.0, 0.25, 0.5, 1.0, 2.0)
SHARES = (0.125, 0.25, 0.5, 1.0)
VISION = ("layernorm-simple", "connector", "norms+connector")
DATA = ("full", "lora", "layernorm")
MOST_REPEATED = 100  # as the recipe allows
NONE = "none"  # of the last stage: stage 1 alone


def rate_sweep(recipe: Recipe, strategies: Iterable[str], points: int = POINTS) -> list[Variant]:
    """Every strategy (default: all) at `points` rates in half decades around its own; stage 1 alone as a control.

    Raises:
        InputError: an unknown strategy, or fewer than three points, which make no curve.
    """
    if points < 3:
        raise InputError(f"{points} points make no curve of learning rates; give 3 or more.")
    rows = [
        variant
        for strategy in parse_strategies(unique(strategies) or ALL)
        for variant in at_rates(recipe, strategy, rate_candidates(recipe, strategy, "auto", points))
    ]
    return [*rows, *stage1_variants(recipe)]


def align_sweep(recipe: Recipe, strategies: Iterable[str], fractions: Sequence[float] = LENGTHS) -> list[Variant]:
    """Every strategy (default: the recipe's) after stages 1 of `fractions` times the recipe's steps, and `none`: stage
    1 alone of each length, to see whether a long one replaces stage 2. 0 leaves stage 1 out; then there is no `none`.

    A stage 1 that the recipe takes from another run (`start_from`) is trained here.

    Raises:
        InputError: a recipe of one stage, an unknown strategy, a negative fraction, data that cannot be read.
    """
    if len(recipe.stages) < 2:
        raise InputError("--sweep align varies the length of stage 1, and the recipe has one stage only; add one.")
    if not fractions or min(fractions) < 0:
        raise InputError(f"fractions {', '.join(map(str, fractions)) or 'of nothing'}: give numbers from 0 up.")
    names = [name for name in unique(strategies) if name != NONE]
    chosen = parse_strategies(names or [label_of(recipe.stages[-1].strategy)])
    _, whole = steps_of(recipe.stages[0], Mixture(recipe.stages[0].data, policy(recipe)))
    rows = []
    for steps in sorted({max(round(fraction * whole), int(fraction > 0)) for fraction in fractions}):
        changed = with_stage1(recipe, steps)
        where = f"stage 1 of {steps} steps" if steps else "no stage 1"
        for strategy in chosen:
            row = strategy_variant(changed, strategy, f"{label_of(strategy)}, {where}")
            rows.append(with_factors(row, align_steps=steps))
        if steps:
            alone = stage1_variants(changed, f"{NONE}, {where}", align_steps=steps)
            rows += [replace(row, control=False) for row in alone]  # one of the candidates here
    return rows


def with_stage1(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with so many steps of stage 1; with none it begins with the second stage."""
    first = recipe.stages[0].model_copy(update={"max_steps": steps})
    stages = [first, *recipe.stages[1:]] if steps else recipe.stages[1:]
    return recipe.model_copy(update={"stages": stages, "start_from": None})


def vision_sweep(recipe: Recipe, encoders: Sequence[str], strategies: Iterable[str] = ()) -> list[Variant]:
    """Every strategy (default: norms, connector, both) and stage 1 alone, under each vision encoder; one encoder is
    compared with the recipe's. Stage 1 is trained for each.

    Raises:
        InputError: a model given by `path`, which has its encoder inside; no other encoder; an unknown strategy.
    """
    if recipe.model.vision is None:
        raise InputError("--sweep vision exchanges the encoder: give model.llm and model.vision, not model.path.")
    named = unique(encoders)
    named = named if len(named) > 1 else unique([recipe.model.vision, *named])
    if len(named) < 2:
        raise InputError("--sweep vision needs another vision encoder than the recipe's; name it, or two of them.")
    short = [Path(name).name.rpartition(":")[2] for name in named]
    shown = short if len(set(short)) == len(short) else named
    rows = []
    for encoder, name in zip(named, shown, strict=True):
        model = recipe.model.model_copy(update={"vision": encoder})
        changed = recipe.model_copy(update={"model": model, "start_from": None})
        own = [
            strategy_variant(changed, strategy, f"{label_of(strategy)}, {name}")
            for strategy in parse_strategies(unique(strategies) or VISION)
        ]
        own += stage1_variants(changed, f"stage 1 only, {name}")
        rows += [with_factors(row, encoder=encoder) for row in own]
    return rows


def data_sweep(recipe: Recipe, strategies: Iterable[str], fractions: Sequence[float] = SHARES) -> list[Variant]:
    """Every strategy (default: full, lora, layernorm) on shares of the last stage's samples: the first of each file, in
    proportion to what the recipe takes of it. Steps, batches and rate schedule are those of the whole: what varies is
    how many different samples there are, and how often each is seen.

    Raises:
        InputError: an unknown strategy, a fraction outside (0, 1], data that cannot be read.
    """
    if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
        given = ", ".join(map(str, fractions)) or "nothing"
        raise InputError(f"fractions of the data {given}: give numbers above 0 and up to 1, the recipe's own amount.")
    stage = recipe.stages[-1]
    _, steps = steps_of(stage, Mixture(stage.data, policy(recipe)))
    sizes = [len(read_samples(source, policy(recipe))) for source in stage.data]
    rows = []
    for samples in sorted({max(1, round(fraction * sum(sizes))) for fraction in fractions}):
        limits = zip(stage.data, apportion(samples, sizes).tolist(), strict=True)
        # seen as much oftener as they are fewer: epochs, and with them the batches, stay as long as those of the whole
        kept = [
            source.model_copy(update={"limit": n, "weight": source.weight * size / n})
            for (source, n), size in zip(limits, sizes, strict=True)
            if n
        ]
        if any(source.weight > MOST_REPEATED for source in kept):
            raise InputError(f"{samples} samples of the recipe's last stage are too few; give larger fractions.")
        changed = prepared(recipe, data=[source.model_dump(mode="json") for source in kept], max_steps=steps)
        for strategy in parse_strategies(unique(strategies) or DATA):
            row = strategy_variant(changed, strategy, f"{label_of(strategy)}, {samples} samples")
            rows.append(with_factors(row, samples=samples))
    return [*rows, *stage1_variants(recipe)]


def norm_role_variants(recipe: Recipe, roles: Mapping[str, str]) -> list[Variant]:
    """The norms of each role alone, at the rate of all norms. `roles`: module name of a norm -> its role.

    Raises:
        InputError: no norms.
    """
    check_norms(list(roles))
    members: dict[str, list[str]] = {}
    for name, role in roles.items():
        members.setdefault(role, []).append(name)
    return [
        norms_variant(recipe, names, f"{role.replace('_', '-')} norms ({len(names)})", role == "vision", norms=role)
        for role, names in members.items()
    ]


def norm_count_variants(recipe: Recipe, ranking: Sequence[str], counts: Sequence[int] | None = None) -> list[Variant]:
    """The first `counts` norms of a ranking (default: powers of two, and all), at the rate of all norms.

    Raises:
        InputError: no norms, or a count that is not there.
    """
    check_norms(ranking)
    total = len(ranking)
    if counts is None:
        counts = [*(2**n for n in range((total - 1).bit_length())), total]
    if not all(0 < count <= total for count in counts):
        raise InputError(f"counts {', '.join(map(str, counts))}: the model has {total} norms to choose from.")
    return [
        norms_variant(recipe, ranking[:count], f"{count} of {total} norms", False, strategy="norms", count=count)
        for count in sorted(set(counts))
    ]


def check_norms(names: Sequence[str]) -> None:
    if not names:
        raise InputError("--sweep norms: no norms with a learned gain were found in this model.")


def norms_variant(recipe: Recipe, names: Sequence[str], label: str, tunes_encoder: bool, **factors: object) -> Variant:
    """A row that trains the norms of these names and nothing else."""
    rate = default_rate(recipe, ["norms"])
    changed = with_strategy(recipe, [norms_part(names)], rate, tunes_encoder=tunes_encoder)
    own = {"strategy": label, "learning_rate": rate, **factors}
    return Variant(label, f"{slug(label)}-{rate!r}", changed, own)


def norms_part(names: Iterable[str]) -> str:
    """The part that holds the gains and biases of these modules: their names, escaped, from beginning to end."""
    return f"regex:^(?:{'|'.join(map(re.escape, names))})\\.[^.]+$"


def with_factors(variant: Variant, **factors: object) -> Variant:
    return replace(variant, factors={**variant.factors, **factors})


def unique(names: Iterable[str]) -> list[str]:
    """Without blanks and repetitions: a curve is drawn once."""
    return list(dict.fromkeys(name.strip() for name in names if name.strip()))
