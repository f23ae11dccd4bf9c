"""The rows of a comparison: strategies, rates, controls, kinds of data, sweeps."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normtune.comparison.kinds import apportion, kind_variants, supervised_tokens
from normtune.comparison.sweeps import (
    align_sweep,
    data_sweep,
    norm_count_variants,
    norm_role_variants,
    norms_part,
    rate_sweep,
    vision_sweep,
)
from normtune.comparison.variants import (
    ALL,
    Variant,
    default_rate,
    evaluated,
    label_of,
    parse_strategy,
    rate_candidates,
    search_variants,
    strategy_variants,
    with_strategy,
)
from normtune.data import Collator, Sample, read_samples
from normtune.errors import InputError
from normtune.recipe import PARTS, STRATEGIES, DataSource, Recipe, load_recipe, to_yaml
from normtune.strategy import apply, resolve
from normtune.structure import anatomy
from normtune.tuned import build
from stubs import llava
from toys import toy_data, toy_recipe

STAGE: dict[str, Any] = {"data": [{"path": "a.json"}], "learning_rate": 1e-3, "batch_size": 4, "max_steps": 6}
ALIGN = {**STAGE, "name": "align", "strategy": "connector"}
LAST = {**STAGE, "name": "instruct", "strategy": "layernorm"}


def recipe_of(last: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    base: dict[str, Any] = {
        "model": {"llm": "l", "vision": "v"},
        "stages": [ALIGN, {**LAST, **(last or {})}],
        "evaluate": {"data": "eval", "dev": "dev"},
        "compare": {"learning_rates": {"layernorm-simple": 3e-2, "full": 1e-4, "connector+embed+head": 3e-3}},
    }
    return load_recipe({**base, **changes})


def by_label(variants: Sequence[Variant]) -> dict[str, Variant]:
    found = {variant.label: variant for variant in variants}
    assert len(found) == len(variants) == len({variant.folder for variant in variants})
    return found


def last_of(variant: Variant) -> Any:
    return variant.recipe.stages[-1]


@pytest.mark.parametrize(
    ("text", "strategy"),
    [
        ("layernorm", "layernorm"),
        ("lora", "lora"),  # a strategy and a part: the strategy goes first
        ("norms", ["norms"]),
        (" norms + lora ", ["norms", "lora"]),
        ("norms+norms", ["norms"]),
        (r"regex:a+b", ["regex:a+b"]),
        (r"connector+regex:x+y+norms+regex:z+", ["connector", "regex:x+y", "norms", "regex:z+"]),
    ],
)
def test_a_strategy_is_a_name_or_parts(text: str, strategy: Any) -> None:
    assert parse_strategy(text) == strategy
    resolve(strategy)  # the model's side takes it as well


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("layernrm", "unknown strategy 'layernrm' (did you mean 'layernorm'?)"),
        ("norms+lroa", "unknown part 'lroa' in 'norms+lroa' (did you mean 'lora'?)"),
        ("layernorm+lora", "unknown part 'layernorm'"),
        ("norms+", "unknown part ''"),
    ],
)
def test_a_misspelt_strategy_is_named(text: str, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        parse_strategy(text)


def test_every_name_comes_back_from_its_label() -> None:
    for strategy in (*STRATEGIES, [*PARTS], ["regex:a|b", "head"]):
        assert parse_strategy(label_of(strategy)) == strategy


def test_all_strategies_with_their_controls() -> None:
    rows = by_label(strategy_variants(recipe_of(), ["all"]))
    assert [*rows] == [*ALL, "stage 1 only", "connector+embed+head"]
    assert set(ALL) == set(STRATEGIES)
    assert [label for label, row in rows.items() if row.control] == ["stage 1 only", "connector+embed+head"]
    assert [label for label, row in rows.items() if not row.trains] == ["stage 1 only"]
    assert {label: row.baselines for label, row in rows.items() if row.baselines} == {
        "layernorm": ("blind", "shuffled")
    }
    rates = {label: last_of(row).learning_rate for label, row in rows.items() if row.trains}
    assert rates["layernorm-simple"] == 3e-2 and rates["full"] == 1e-4 and rates["connector+embed+head"] == 3e-3
    assert rates["lora"] == rates["layernorm"] == 1e-3  # the stage's
    assert all(row.factors["learning_rate"] == rates[label] for label, row in rows.items() if row.trains)


def test_listed_twice_is_trained_twice_and_alike() -> None:
    rows = by_label(strategy_variants(recipe_of(), ["layernorm", "norms+lora", "layernorm"]))
    one, two = rows["layernorm"], rows["layernorm (2)"]
    assert one.recipe == two.recipe and one.factors == two.factors and one.folder != two.folder
    assert two.baselines == ()
    assert "connector" in rows and rows["connector"].control
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", row.folder) for row in rows.values())


def test_a_control_that_is_listed_is_no_control() -> None:
    rows = by_label(strategy_variants(recipe_of(), ["head+embed+connector", "connector"]))
    assert {label: row.control for label, row in rows.items()} == {
        "head+embed+connector": False,
        "connector": False,
        "stage 1 only": True,
    }
    assert rows["head+embed+connector"].baselines  # the first, where layernorm is not there


@pytest.mark.parametrize(
    "changes",
    [{"model": {"path": "m"}, "stages": [LAST]}, {"start_from": "runs/x"}],
    ids=["one stage", "stage 1 of another run"],
)
def test_without_a_stage_1_of_its_own_there_is_no_such_control(changes: dict[str, Any]) -> None:
    assert all(row.trains for row in strategy_variants(recipe_of(**changes), ["full"]))
    assert all(row.trains for row in rate_sweep(recipe_of(**changes), ["full"]))


@pytest.mark.parametrize(
    ("strategy", "rate"),
    [
        ("layernorm-simple", 3e-2),
        (["norms"], 3e-2),  # the same parts
        (["head", "connector", "embed"], 3e-3),  # in another order
        (["norms", "connector"], 1e-3),
    ],
)
def test_rate_of_a_strategy(strategy: Any, rate: float) -> None:
    assert default_rate(recipe_of(), strategy) == rate


def test_a_rate_for_an_unknown_strategy_is_told() -> None:
    recipe = recipe_of(compare={"learning_rates": {"layernorn": 1e-3}})
    with pytest.raises(InputError, match=r"compare.learning_rates: unknown strategy 'layernorn' \(did you mean"):
        strategy_variants(recipe, ["full"])


@pytest.mark.parametrize(
    ("strategy", "rates", "decays"),
    [
        ("layernorm", {"connector": 2e-5, "norms": 1e-2}, {"head": 0.1}),
        ("full", {"connector": 2e-5}, {}),
        ("layernorm-simple", {}, {}),  # its only part has a rate of its own: the searched one would mean nothing
        (["norms", "connector"], {}, {}),
    ],
)
def test_rates_by_part_of_what_is_trained(strategy: Any, rates: Any, decays: Any) -> None:
    last = {"learning_rates": {"connector": 2e-5, "norms": 1e-2}, "weight_decays": {"head": 0.1}, "evaluate_every": 2}
    changed = with_strategy(recipe_of(last), strategy, 0.5).stages[-1]
    assert (changed.learning_rates, changed.weight_decays) == (rates, decays)
    assert (changed.strategy, changed.learning_rate, changed.evaluate_every) == (strategy, 0.5, None)


@pytest.mark.parametrize(
    ("strategy", "cached"),
    [
        ("layernorm", [True, True]),
        (["norms", "lora"], [True, True]),
        (["vision_norms"], [True, False]),  # stage 1 is the same for all rows
        (["connector", "regex:norm"], [True, False]),
    ],
)
def test_features_are_cached_while_the_encoder_is_frozen(strategy: Any, cached: list[bool]) -> None:
    assert [stage.cache_features for stage in with_strategy(recipe_of(), strategy).stages] == cached


def test_an_earlier_stage_that_tunes_the_encoder_ends_the_cache() -> None:
    first = {**ALIGN, "strategy": ["connector", "vision_norms"]}
    changed = with_strategy(recipe_of(stages=[first, LAST]), "full")
    assert [stage.cache_features for stage in changed.stages] == [False, False]


@pytest.mark.parametrize("cached", [True, False])
def test_a_whole_model_keeps_its_own_setting(cached: bool) -> None:
    recipe = recipe_of(model={"path": "m"}, stages=[{**LAST, "cache_features": cached}])
    assert with_strategy(recipe, "full").stages[0].cache_features is cached
    assert not with_strategy(recipe, ["vision_norms"]).stages[0].cache_features


def test_candidates_are_as_many_for_each_strategy() -> None:
    found = search_variants(recipe_of(), ["full", "layernorm-simple", "full"])
    assert [*found] == ["full", "layernorm-simple", "connector", "connector+embed+head"]
    rates = {label: [last_of(row).learning_rate for row in rows] for label, rows in found.items()}
    assert rates["full"] == [1e-5, 3.16e-5, 1e-4, 3.16e-4, 1e-3]
    assert rates["layernorm-simple"] == [3e-3, 9.49e-3, 3e-2, 9.49e-2, 0.3]
    assert all(len(own) == 5 for own in rates.values())
    for count in range(1, 10):
        own = rate_candidates(recipe_of(), "full", "auto", count)
        assert len(set(own)) == count and own == sorted(own) and 1e-4 in own


def test_a_candidate_is_the_training_that_the_table_has() -> None:
    """The same recipe in the same folder, so that it is not trained again."""
    for label, rows in search_variants(recipe_of(), ["norms+lora", "layernorm"], [1e-3, 1e-5, 1e-3]).items():
        assert [row.factors["learning_rate"] for row in rows] == [1e-5, 1e-3]
        for row in rows:
            chosen = strategy_variants(recipe_of(), ["norms+lora", "layernorm"], {label: row.factors["learning_rate"]})
            final = by_label(chosen)[label]
            assert (final.folder, final.recipe) == (row.folder, row.recipe)


@pytest.mark.parametrize("rates", ["best", [], [0.0], [1e-3, -1], [10.0]])
def test_rates_that_are_none(rates: Any) -> None:
    with pytest.raises(InputError, match="learning rates"):
        rate_candidates(recipe_of(), "full", rates)


@pytest.mark.parametrize(
    ("evaluate", "field", "said"),
    [
        (None, "data", "no `evaluate` section"),
        (None, "dev", "no `evaluate`"),
        ({"data": "eval"}, "dev", "evaluate.dev"),
    ],
)
def test_nothing_to_ask(evaluate: Any, field: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        evaluated(recipe_of(evaluate=evaluate), field)
    if field == "dev":
        with pytest.raises(InputError, match=said):
            search_variants(recipe_of(evaluate=evaluate), ["full"])


@pytest.mark.parametrize("strategies", [[], [" "]])
def test_no_strategies(strategies: list[str]) -> None:
    with pytest.raises(InputError, match="no strategies"):
        strategy_variants(recipe_of(), strategies)


def texts(folder: Path, sizes: dict[str, int]) -> None:
    """Text-only files; the answer of sample n of a file has 1 + n % 7 words."""
    for name, count in sizes.items():
        turns = [
            [{"from": "human", "value": "Say."}, {"from": "gpt", "value": "word " * (1 + n % 7)}] for n in range(count)
        ]
        (folder / f"{name}.json").write_text(json.dumps([{"conversations": own} for own in turns]))


def words(samples: Sequence[Sample]) -> list[int]:
    return [len(sample.turns[-1].text.split()) for sample in samples]


@pytest.fixture
def kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Kinds a (30 samples), b (two files, 20 and 40) and c (50); limits and weights are not to count."""
    texts(tmp_path, {"a": 30, "b1": 20, "b2": 40, "c": 50})
    monkeypatch.chdir(tmp_path)
    data = [
        {"path": "a.json", "limit": 3},
        {"path": "b1.json", "kind": "b", "weight": 2},
        {"path": "b2.json", "kind": "b"},
        {"path": "c.json", "kind": "c"},
    ]
    return recipe_of({"data": data})


def used(variant: Variant) -> list[tuple[str, int | None, float]]:
    return [(source.path, source.limit, source.weight) for source in last_of(variant).data]


def test_kinds_at_equal_samples(kinds: Recipe) -> None:
    rows = by_label(kind_variants(kinds, ["a", "b", "c", "mixed"]))
    assert used(rows["a"]) == [("a.json", 30, 1.0)]
    assert used(rows["b"]) == [("b1.json", 10, 1.0), ("b2.json", 20, 1.0)]
    assert used(rows["mixed"]) == [("a.json", 10, 1), ("b1.json", 3, 1), ("b2.json", 7, 1), ("c.json", 10, 1)]
    assert all(last_of(row).max_steps == 6 and row.factors["samples"] == 30 for row in rows.values() if row.trains)
    assert all(last_of(row).strategy == "layernorm" for row in rows.values())
    assert [label for label, row in rows.items() if row.control] == ["stage 1 only"]
    assert rows["a"].baselines == ("blind", "shuffled") and not rows["b"].baselines


def test_mixed_is_of_the_kinds_that_are_compared(kinds: Recipe) -> None:
    rows = by_label(kind_variants(kinds, ["b", "c", "mixed"]))
    assert used(rows["mixed"]) == [("b1.json", 8, 1), ("b2.json", 17, 1), ("c.json", 25, 1)]
    alone = by_label(kind_variants(kinds, ["c", "mixed", "c"]))
    assert {path for path, _, _ in used(alone["mixed"])} == {"a.json", "b1.json", "b2.json", "c.json"}
    assert used(alone["c"]) == used(alone["c (2)"]) == [("c.json", 50, 1)]


def test_kinds_at_equal_supervised_tokens(kinds: Recipe) -> None:
    """To within one sample, the smallest kind whole; passes are equal, so that steps follow the samples."""
    rows = by_label(kind_variants(kinds, ["a", "b", "c", "mixed"], "supervised-tokens", words))
    largest = 7
    total = sum(words(read_samples(DataSource(path="a.json"))))
    for label in ("a", "b", "c", "mixed"):
        row = rows[label]
        tokens = sum(sum(words(read_samples(source))) for source in last_of(row).data)
        assert tokens == row.factors["supervised_tokens"]
        assert abs(tokens - total) <= largest / 2 * (3 if label == "mixed" else 1)
        samples = sum(source.limit for source in last_of(row).data)
        assert samples == row.factors["samples"]
        passes = 6 * 4 / 30  # of the smallest kind, in the recipe's steps
        assert abs(last_of(row).max_steps - passes * samples / 4) <= 0.5
    assert rows["a"].factors["samples"] == 30


def test_steps_of_epochs(kinds: Recipe) -> None:
    last = kinds.stages[-1].model_copy(update={"max_steps": None, "epochs": 3})
    recipe = kinds.model_copy(update={"stages": [kinds.stages[0], last]})
    equal = by_label(kind_variants(recipe, ["a", "c"]))
    assert all(last_of(row).max_steps is None and last_of(row).epochs == 3 for row in equal.values())
    tokens = by_label(kind_variants(recipe, ["a", "c"], "supervised-tokens", lambda own: [2] * len(own)))
    assert last_of(tokens["a"]).max_steps == round(3 * 30 / 4)


@pytest.mark.parametrize(
    ("asked", "equal", "said"),
    [
        (["conversation"], "samples", "no data of kind 'conversation'.\nThere are a, b, c, mixed"),
        (["a", "mixd"], "samples", r"kind 'mixd' \(did you mean 'mixed'\?\)"),
        ([], "samples", "no kinds to compare; the recipe has a, b, c"),
        (["a"], "tokens", "equal 'tokens' is unknown"),
    ],
)
def test_kinds_that_the_recipe_lacks(kinds: Recipe, asked: list[str], equal: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        kind_variants(kinds, asked, equal)


def test_a_kind_without_supervised_tokens(kinds: Recipe) -> None:
    with pytest.raises(InputError, match="max_length"):
        kind_variants(kinds, ["a", "b"], "supervised-tokens", lambda own: [0] * len(own))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(any), st.data())
def test_shares_are_fair(sizes: list[int], data: Any) -> None:
    count = data.draw(st.integers(0, sum(sizes)))
    parts = apportion(count, sizes).tolist()
    assert sum(parts) == count
    for part, size in zip(parts, sizes, strict=True):
        assert 0 <= part <= size and abs(part - count * size / sum(sizes)) < 1


@pytest.mark.parametrize("cut", [0, 3])
def test_supervised_tokens_are_those_of_training(
    llm_folder: Path, vision_folder: Path, tmp_path: Path, cut: int
) -> None:
    """Without opening the images, also where max_length cuts."""
    data = toy_data(tmp_path / "data", 12)
    recipe = load_recipe(toy_recipe(llm_folder, vision_folder, data))
    samples = read_samples(recipe.stages[-1].data[0])
    _, processor = build(recipe.model)
    length = max(map(len, Collator(processor, None).encode(samples))) - cut
    expected = [sum(row.supervised) for row in Collator(processor, length).encode(samples)]
    assert len(set(expected)) > 1
    count = supervised_tokens(load_recipe(recipe, [f"stages.1.max_length={length}"]))
    for path in samples[1].images:
        path.write_bytes(b"no image")  # only the first image is looked at
    assert count(samples) == expected


def test_sweep_of_rates() -> None:
    rows = rate_sweep(recipe_of(), ["layernorm", "full", "layernorm"])
    for name in ("layernorm", "full"):
        own = [row for row in rows if row.factors["strategy"] == name]
        rates = [row.factors["learning_rate"] for row in own]
        assert len(rates) == 8 and rates[-1] / rates[0] == pytest.approx(10**3.5, rel=0.01)
        assert [last_of(row).learning_rate for row in own] == rates
    assert len(by_label(rows)) == 17
    assert {row.factors["strategy"] for row in rate_sweep(recipe_of(), [])} == {*STRATEGIES, "none"}
    with pytest.raises(InputError, match="2 points make no curve"):
        rate_sweep(recipe_of(), ["full"], 2)


def test_sweep_of_stage_1(kinds: Recipe) -> None:
    texts(Path(), {"align": 16})
    align = {**ALIGN, "data": [{"path": "align.json"}], "max_steps": None, "epochs": 2}
    recipe = recipe_of(stages=[align, LAST], start_from="runs/x")
    rows = by_label(align_sweep(recipe, ["full", "none", "norms+connector"]))
    steps = {label: row.factors["align_steps"] for label, row in rows.items()}
    assert {label: number for label, number in steps.items() if label.startswith("none")} == {
        f"none, stage 1 of {n} steps": n for n in (2, 4, 8, 16)
    }
    assert {number for label, number in steps.items() if label.startswith("full")} == {0, 2, 4, 8, 16}
    assert [stage.name for stage in rows["full, no stage 1"].recipe.stages] == ["instruct"]
    assert [stage.max_steps for stage in rows["full, stage 1 of 16 steps"].recipe.stages] == [16, 6]
    assert all(row.recipe.start_from is None and not row.control for row in rows.values())
    assert {row.factors["strategy"] for row in rows.values() if not row.trains} == {"none"}
    assert {row.factors["strategy"] for row in align_sweep(recipe, [])} == {"layernorm", "none"}
    assert {row.factors["align_steps"] for row in align_sweep(recipe, [], [0.01])} == {1}  # short is not none


@pytest.mark.parametrize("fractions", [[], [-0.5]])
def test_lengths_that_are_none(fractions: list[float]) -> None:
    with pytest.raises(InputError, match="fractions"):
        align_sweep(recipe_of(), ["full"], fractions)


def test_a_recipe_of_one_stage_has_no_stage_1_to_sweep() -> None:
    with pytest.raises(InputError, match="one stage only"):
        align_sweep(recipe_of(stages=[LAST]), ["full"])


def test_sweep_of_encoders() -> None:
    rows = by_label(vision_sweep(recipe_of(start_from="runs/x"), ["hub/other"]))
    assert len(rows) == 8 and {row.recipe.model.vision for row in rows.values()} == {"v", "hub/other"}
    assert {row.factors["strategy"] for row in rows.values() if row.trains} == {
        *("layernorm-simple", "connector", "norms+connector")
    }
    assert rows["stage 1 only, other"].control and rows["connector, other"].recipe.start_from is None
    assert "full, a/x" in by_label(vision_sweep(recipe_of(), ["a/x", "b/x"], ["full"]))  # one name, two folders
    for encoders, model in (
        (["v"], {"llm": "l", "vision": "v"}),
        ([], {"llm": "l", "vision": "v"}),
        (["w"], {"path": "m"}),
    ):
        with pytest.raises(InputError, match="--sweep vision"):
            vision_sweep(recipe_of(model=model), encoders)


def test_sweep_of_data(kinds: Recipe) -> None:
    """The recipe's limit is the whole of a file, its steps are those of every row."""
    rows = by_label(data_sweep(kinds, ["full", "layernorm"], (0.02, 0.5, 1)))
    assert [row.factors["samples"] for row in rows.values() if row.factors["strategy"] == "full"] == [2, 56, 113]
    assert used(rows["full, 113 samples"]) == [
        ("a.json", 3, 1),
        ("b1.json", 20, 2),
        ("b2.json", 40, 1),
        ("c.json", 50, 1),
    ]
    assert used(rows["full, 56 samples"]) == [  # seen as much oftener as they are fewer: epochs as long as the whole's
        ("a.json", 1, 3),
        ("b1.json", 10, 4),
        ("b2.json", 20, 2),
        ("c.json", 25, 2),
    ]
    assert used(rows["full, 2 samples"]) == used(rows["layernorm, 2 samples"])
    assert sum(limit or 0 for _, limit, _ in used(rows["full, 2 samples"])) == 2
    assert {last_of(row).max_steps for row in rows.values()} == {6}
    last = kinds.stages[-1].model_copy(update={"max_steps": None, "epochs": 2})
    epochs = kinds.model_copy(update={"stages": [kinds.stages[0], last]})
    trained = [row for row in data_sweep(epochs, ["full"]) if row.trains]
    assert {last_of(row).max_steps for row in trained} == {2 * 34}  # ceil((3 + 2 x 20 + 40 + 50) / 4) an epoch


@pytest.mark.parametrize("fractions", [[], [0.0], [0.5, 1.5]])
def test_shares_that_are_none(kinds: Recipe, fractions: list[float]) -> None:
    with pytest.raises(InputError, match="fractions of the data"):
        data_sweep(kinds, ["full"], fractions)


def test_norms_by_name_are_these_and_no_others() -> None:
    """The part trains the gains of the named modules; dots are dots, and a name is the whole name."""
    model = llava()
    names = anatomy(model).norms
    for chosen in (names[:1], names[1:3], names):
        report = apply(model, [norms_part(chosen)])
        assert {name.rpartition(".")[0] for name in report.trainable} == set(chosen)
    pattern = norms_part(["a.1.norm"]).removeprefix("regex:")
    for name in ("a.11.norm.weight", "xa.1.norm.weight", "a.1.norm.b.weight", "aX1.norm.weight", "a.1.norm2.weight"):
        assert not re.search(pattern, name)


def test_norms_by_role_and_by_count() -> None:
    roles = {"b.0.first": "input", "b.0.second": "post_attention", "b.1.first": "input", "v.0": "vision", "n": "final"}
    rows = by_label(norm_role_variants(recipe_of(), roles))
    assert [*rows] == ["input norms (2)", "post-attention norms (1)", "vision norms (1)", "final norms (1)"]
    assert last_of(rows["input norms (2)"]).strategy == [norms_part(["b.0.first", "b.1.first"])]
    assert all(last_of(row).learning_rate == 3e-2 for row in rows.values())  # of layernorm-simple
    cached = {label: last_of(row).cache_features for label, row in rows.items()}
    assert [label for label, on in cached.items() if not on] == ["vision norms (1)"]
    ranking = [f"n.{n}" for n in range(12)]
    counted = by_label(norm_count_variants(recipe_of(), ranking))
    assert [row.factors["count"] for row in counted.values()] == [1, 2, 4, 8, 12]
    assert last_of(counted["2 of 12 norms"]).strategy == [norms_part(["n.0", "n.1"])]
    assert [row.factors["count"] for row in norm_count_variants(recipe_of(), ranking[:8])] == [1, 2, 4, 8]
    assert [row.factors["count"] for row in norm_count_variants(recipe_of(), ranking[:1])] == [1]
    for wrong in ([0], [13]):
        with pytest.raises(InputError, match="12 norms"):
            norm_count_variants(recipe_of(), ranking, wrong)
    for empty in (lambda: norm_role_variants(recipe_of(), {}), lambda: norm_count_variants(recipe_of(), [])):
        with pytest.raises(InputError, match="no norms"):
            empty()


def test_every_row_is_a_recipe_that_reads_back(kinds: Recipe, tmp_path: Path) -> None:
    texts(tmp_path, {"align": 8})
    align = {**ALIGN, "data": [{"path": "align.json"}]}
    recipe = recipe_of(stages=[align, kinds.stages[-1].model_dump(mode="json")])
    rows = [
        *strategy_variants(recipe, ["all", "norms+lora"]),
        *kind_variants(recipe, ["a", "mixed"]),
        *align_sweep(recipe, ["full"]),
        *vision_sweep(recipe, ["w"]),
        *data_sweep(recipe, ["full"]),
        *norm_role_variants(recipe, {"a.n": "input"}),
    ]
    for row in rows:
        path = tmp_path / "recipe.yaml"
        path.write_text(to_yaml(row.recipe))
        assert load_recipe(path) == row.recipe
        assert (row.recipe.name, row.recipe.seed) == (recipe.name, recipe.seed)
