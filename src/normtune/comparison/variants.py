"""The rows of a comparison: one recipe, changed in its last stage, and what each row stands for.

Scope: strategies with their rates, the controls, the candidates of a search. Not here: kinds of data (`kinds`), sweeps
(`sweeps`), training and asking (`cells`). Nothing is read from disk: `world:` names stay as they are.
Source: PAPER (Zhao et al., arXiv 2312.11420) for the strategies, and for a rate that is searched for each.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from normtune.errors import InputError, did_you_mean
from normtune.recipe import PARTS, Recipe, load_recipe
from normtune.strategy import STRATEGIES

Strategy = str | list[str]
ALL = ("full", "lora", "attn-qv", "attn-mlp", "layernorm", "layernorm-simple", "connector")
STAGE1 = "stage 1 only"
CONTROLS = ("connector", "connector+embed+head")
BASELINES = ("blind", "shuffled")
CANDIDATES = 5
_STEP = 0.5  # of two neighbouring candidates, in decades


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        label: unique among the rows.
        folder: a safe name, unique for each different training; the same training has it in a search and in the table.
        recipe: whole and validated, with this row's model, stages and rate.
        factors: what the row stands for: strategy, learning_rate, kind, samples, align_steps, norms, count, encoder.
        control: no candidate: never marked as a winner.
        trains: False: stage 1 alone, without the last stage.
        baselines: asked in these ways, too ("blind", "shuffled").
    """

    label: str
    folder: str
    recipe: Recipe
    factors: dict[str, Any]
    control: bool = False
    trains: bool = True
    baselines: tuple[str, ...] = ()


def parse_strategy(text: str) -> Strategy:
    """`layernorm` -> itself, `norms+lora` -> ["norms", "lora"], `norms` -> ["norms"]; a strategy's name goes first
    (`lora`, `connector`). A + inside `regex:...` is its own, unless a part or another `regex:` follows.

    Raises:
        InputError: an unknown strategy or part.
    """
    text = text.strip()
    if text in STRATEGIES:
        return text
    following = "|".join((*PARTS, "regex:.*"))
    ends = rf"\+(?=(?:{following})(?:\+|$))" if "regex:" in text else r"\+"
    parts = list(dict.fromkeys(part.strip() for part in re.split(ends, text)))
    for part in parts:
        if part not in PARTS and not part.startswith("regex:"):
            known = PARTS if len(parts) > 1 else (*STRATEGIES, *PARTS)
            where = f" in {text!r}" if len(parts) > 1 else ""
            raise InputError(
                f"unknown {'part' if len(parts) > 1 else 'strategy'} {part!r}{where}{did_you_mean(part, known)}.\n"
                f"Strategies: {', '.join(STRATEGIES)}.\nParts, to be joined by +: {', '.join(PARTS)}, regex:PATTERN."
            )
    return parts


def label_of(strategy: Strategy) -> str:
    """As the command line writes it: `layernorm`, `norms+lora`."""
    return strategy if isinstance(strategy, str) else "+".join(strategy)


def parts_of(strategy: Strategy) -> tuple[str, ...]:
    """What the strategy trains, as far as a model has it."""
    return STRATEGIES[strategy] if isinstance(strategy, str) else tuple(strategy)


def default_rate(recipe: Recipe, strategy: Strategy) -> float:
    """The recipe's rate for the strategy (`compare.learning_rates`), or for one of the same parts; else the last
    stage's.

    Raises:
        InputError: `compare.learning_rates` names a strategy that there is not.
    """
    known = recipe.compare.learning_rates
    by_parts: dict[frozenset[str], float] = {}
    for name, rate in known.items():
        try:
            by_parts.setdefault(frozenset(parts_of(parse_strategy(name))), rate)
        except InputError as error:
            raise InputError(f"recipe: compare.learning_rates: {error}") from None
    stages = recipe.stages[-1].learning_rate
    return known.get(label_of(strategy), by_parts.get(frozenset(parts_of(strategy)), stages))


def with_strategy(
    recipe: Recipe, strategy: Strategy, rate: float | None = None, *, tunes_encoder: bool | None = None
) -> Recipe:
    """The recipe with another strategy and rate in its last stage.

    Rates and decays by part stay for the parts that it trains; where each of its parts has a rate of its own these are
    dropped, because `rate` would mean nothing. Features are cached as in `prepared`.

    Args:
        rate: peak rate of AdamW (default: `default_rate`).
        tunes_encoder: whether it trains tensors of the vision encoder (default: by the parts; a regex may).

    Raises:
        InputError: a rate that no recipe can have.
    """
    last, parts = recipe.stages[-1], set(parts_of(strategy))
    rates = {part: own for part, own in last.learning_rates.items() if part in parts}
    return prepared(
        recipe,
        tunes_encoder,
        strategy=strategy,
        learning_rate=default_rate(recipe, strategy) if rate is None else rate,
        learning_rates={} if parts <= rates.keys() else rates,
        weight_decays={part: own for part, own in last.weight_decays.items() if part in parts},
    )


def prepared(recipe: Recipe, tunes_encoder: bool | None = None, **last: Any) -> Recipe:
    """The recipe as a comparison runs it, with `last` among the fields of its last stage.

    Nothing is evaluated on the way (`evaluate_every`), and each image is encoded once (`cache_features`) up to the
    first stage that may train the encoder. An MLLM given by `path` keeps its own setting: not all can have their
    features stored.
    """
    data = recipe.model_dump(mode="json")
    data["stages"][-1] |= last
    live = False
    for number, stage in enumerate(data["stages"], 1):
        stage["evaluate_every"] = None
        told = tunes_encoder if number == len(data["stages"]) else None
        live = live or (may_tune_encoder(stage["strategy"]) if told is None else told)
        if live or recipe.model.path is None:
            stage["cache_features"] = not live
    return load_recipe(data)


def may_tune_encoder(strategy: Strategy) -> bool:
    return any(part == "vision_norms" or part.startswith("regex:") for part in parts_of(strategy))


def parse_strategies(strategies: Iterable[str]) -> list[Strategy]:
    """Each of them, `all` as the seven of the table.

    Raises:
        InputError: an unknown one, or none at all.
    """
    texts = [text.strip() for text in strategies if text.strip()]
    if not texts:
        raise InputError(f"no strategies to compare.\nGive some of {', '.join(ALL)}, parts joined by +, or all.")
    return [parse_strategy(one) for text in texts for one in (ALL if text == "all" else (text,))]


def controls_for(listed: Sequence[Strategy]) -> list[Strategy]:
    """The strategies that every table has as controls, without those that are listed."""
    there = {frozenset(parts_of(strategy)) for strategy in listed}
    return [one for one in map(parse_strategy, CONTROLS) if frozenset(parts_of(one)) not in there]


def strategy_variants(
    recipe: Recipe, strategies: Iterable[str], rates: Mapping[str, float] | None = None
) -> list[Variant]:
    """The listed strategies in their order (one that is listed twice has two rows and two trainings), then the
    controls: stage 1 alone where the recipe has one, and what `controls_for` adds. `layernorm`, else the first
    strategy, is also asked without its image and with another's.

    Args:
        rates: by label of the strategy, without "(2)" (default: `default_rate`).

    Raises:
        InputError: an unknown strategy, none, or a rate that no recipe can have.
    """
    listed = parse_strategies(strategies)
    names = [label_of(strategy) for strategy in listed]
    shown = "layernorm" if "layernorm" in names else names[0]
    variants = []
    for strategy, label in zip(listed, numbered(names), strict=True):
        baselines = BASELINES if label == shown else ()
        variants.append(strategy_variant(recipe, strategy, label, rates, baselines=baselines))
    variants += stage1_variants(recipe)
    for strategy in controls_for(listed):
        variants.append(strategy_variant(recipe, strategy, label_of(strategy), rates, control=True))
    return variants


def strategy_variant(
    recipe: Recipe, strategy: Strategy, label: str, rates: Mapping[str, float] | None = None, **more: Any
) -> Variant:
    """One row: the strategy at its rate of `rates`, else at its default rate."""
    name = label_of(strategy)
    rate = (rates or {}).get(name, default_rate(recipe, strategy))
    factors = {"strategy": name, "learning_rate": rate}
    return Variant(label, f"{slug(label)}-{rate!r}", with_strategy(recipe, strategy, rate), factors, **more)


def stage1_variants(recipe: Recipe, label: str = STAGE1, **factors: Any) -> list[Variant]:
    """The control that ends with stage 1; none where the comparison trains no stage 1: the recipe has one stage, or
    takes its stage 1 from a run (`start_from`)."""
    if len(recipe.stages) < 2 or recipe.start_from is not None:
        return []
    own = {"strategy": "none", **factors}
    return [Variant(label, slug(label), prepared(recipe), own, control=True, trains=False)]


def rate_candidates(
    recipe: Recipe, strategy: Strategy, learning_rates: str | Sequence[float], count: int = CANDIDATES
) -> list[float]:
    """The rates to try: the given ones, or `count` in half decades around `default_rate`, which is among them, rounded
    to three digits. The same number for every strategy; ascending.

    Raises:
        InputError: no rates, or one that is not positive.
    """
    if learning_rates == "auto":
        if count < 1:
            raise InputError(f"{count} learning rates are none; give 1 or more.")
        centre = default_rate(recipe, strategy)
        return [float(f"{centre * 10 ** (_STEP * (n - count // 2)):.3g}") for n in range(count)]
    usable = not isinstance(learning_rates, str) and all(0 < float(rate) < 10 for rate in learning_rates)
    if not learning_rates or not usable:
        given = learning_rates if isinstance(learning_rates, str) else ", ".join(map(str, learning_rates))
        raise InputError(
            f"learning rates {given or 'nothing'}: give auto, or positive numbers below 10 such as 1e-4,1e-3,1e-2."
        )
    return sorted({float(rate) for rate in learning_rates})


def search_variants(
    recipe: Recipe,
    strategies: Iterable[str],
    learning_rates: str | Sequence[float] = "auto",
    count: int = CANDIDATES,
) -> dict[str, list[Variant]]:
    """Label of a strategy (controls included: they get as many) -> its candidates, to be scored on `evaluate.dev`.

    Raises:
        InputError: the recipe has no data for that; and as `rate_candidates` and `strategy_variants`.
    """
    evaluated(recipe, "dev")
    listed = parse_strategies(strategies)
    found: dict[str, list[Variant]] = {}
    for strategy in (*listed, *controls_for(listed)):
        found[label_of(strategy)] = list(
            at_rates(recipe, strategy, rate_candidates(recipe, strategy, learning_rates, count))
        )
    return found


def at_rates(recipe: Recipe, strategy: Strategy, rates: Iterable[float]) -> Iterator[Variant]:
    """A row per rate, in the folder that the strategy has at that rate in any table."""
    name = label_of(strategy)
    for rate in rates:
        factors = {"strategy": name, "learning_rate": rate}
        changed = with_strategy(recipe, strategy, rate)
        yield Variant(f"{name}, rate {rate:g}", f"{slug(name)}-{rate!r}", changed, factors)


def evaluated(recipe: Recipe, field: Literal["data", "dev"] = "data") -> str:
    """The folder of benchmarks that the comparison asks.

    Raises:
        InputError: the recipe names none.
    """
    if recipe.evaluate is None:
        raise InputError(
            "the recipe has no `evaluate` section, so there is nothing to compare by.\n"
            "Add evaluate: {benchmarks: [pope], data: DIR, dev: DIR}."
        )
    folder = getattr(recipe.evaluate, field)
    if folder is None:
        raise InputError(
            "the recipe has no `evaluate.dev`: learning rates are not chosen on the data that the table reports.\n"
            "Add a folder of other questions as evaluate.dev, or leave the rates to the recipe (no --learning-rates)."
        )
    return str(folder)


def numbered(labels: Iterable[str]) -> list[str]:
    """The labels, the second of a kind as `label (2)`."""
    counts: dict[str, itertools.count[int]] = {}
    found = []
    for label in labels:
        number = next(counts.setdefault(label, itertools.count(1)))
        found.append(label if number == 1 else f"{label} ({number})")
    return found


def slug(text: str) -> str:
    """A folder's name for a label; with a hash where characters had to go that may tell two labels apart."""
    plain = re.sub(r" \((\d+)\)$", r"-\1", text).replace("+", "-").replace(", ", "-").replace(" ", "-")
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", plain)[:60]
    return safe if safe == plain else f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
