"""The recipe: schema, `extends`, overrides, and what a user reads when something is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from normtune.errors import InputError
from normtune.recipe import load_recipe, parse_interval, recipe_hash, to_yaml

STAGE = {"name": "align", "strategy": "connector", "data": [{"path": "a.json"}], "learning_rate": 1e-3}
BASE = {"name": "r", "model": {"llm": "l", "vision": "v"}, "stages": [STAGE, {**STAGE, "name": "instruct"}]}


def write(path: Path, data: object) -> Path:
    path.write_text(yaml.safe_dump(data))
    return path


def test_resolved_recipe_reads_back_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(BASE, ["stages.1.learning_rates={connector: 2e-5}", "save_every=50"])
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe))
    assert load_recipe(path) == recipe
    assert recipe_hash(load_recipe(path)) == recipe_hash(recipe)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("stages.1.learning_rate=1e-4", lambda r: r.stages[1].learning_rate == 1e-4),
        ("stages.1.strategy=[norms, connector]", lambda r: r.stages[1].strategy == ["norms", "connector"]),
        ("stages.0.strategy=[norms, 'regex:.*bias']", lambda r: r.stages[0].strategy[1] == "regex:.*bias"),
        ("model={path: x}", lambda r: r.model.path == "x" and r.model.llm is None),
        ("evaluate.data=eval", lambda r: r.evaluate.data == "eval"),
        ("stages.0.data.0.limit=7", lambda r: r.stages[0].data[0].limit == 7),
        ("stages.0.lora.rank=8", lambda r: r.stages[0].lora.rank == 8 and r.stages[0].lora.alpha == 128),
    ],
)
def test_override(override: str, read) -> None:
    assert read(load_recipe(BASE, [override]))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.0.learnin_rate=1", ["stages.0.learnin_rate", "'learning_rate'"]),
        ("modle=1", ["modle", "'model'"]),
        ("stages.0.data.0.lmit=3", ["stages.0.data.0.lmit", "'limit'"]),
        ("stages.1.strategy=layernrom", ["stages.1", "'layernrom'", "'layernorm'"]),
        ("stages.1.strategy=[norms, conector]", ["'conector'", "'connector'"]),
        ("stages.1.strategy=[]", ["empty"]),
        ("stages.1.learning_rates={norm: 1e-3}", ["'norm'", "'norms'"]),
        ("stages.0.learning_rate=-1", ["stages.0.learning_rate", "greater than 0", "-1"]),
        ("stages.0.learning_rate=fast", ["stages.0.learning_rate", "'fast'"]),
        ("stages.0.learning_rate=.nan", ["stages.0.learning_rate"]),
        ("stages.3.epochs=2", ["no item stages.3", "1 (instruct)"]),
        ("stages.0.name=instruct", ["same name"]),
        ("model.path=x", ["path is an existing"]),
        ("model.vision=null", ["llm and vision"]),
        ("model.dtype=float16", ["model.dtype", "bfloat16"]),
        ("save_every=soon", ["save_every", "10m"]),
        ("evaluate={benchmarks: [popes], data: d}", ["'popes'", "'pope'"]),
        ("stages.0.data=[]", ["stages.0.data"]),
        ("device=cpu:0", ["cpu:0", "cuda:0"]),
        ("seed", ["KEY=VALUE"]),
        ("seed.x=1", ["seed"]),
        ("seed=[1", ["YAML"]),
    ],
)
def test_wrong_value_names_field_and_remedy(override: str, words: list[str]) -> None:
    base = {**BASE, "seed": 0}
    with pytest.raises(InputError) as error:
        load_recipe(base, [override])
    message = str(error.value)
    assert all(word in message for word in words), message
    assert len(message.splitlines()) <= 3
    assert error.value.exit_code == 2


def test_extends_merges_stages_by_name(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "base.yaml", BASE)
    child = {"extends": "../base.yaml", "name": "child", "stages": [{"name": "instruct", "strategy": "lora"}]}
    recipe = load_recipe(write(tmp_path / "sub" / "child.yaml", child))
    assert recipe.name == "child"
    assert [stage.strategy for stage in recipe.stages] == ["connector", "lora"]
    assert recipe.stages[1].learning_rate == 1e-3


def test_extends_in_a_circle_and_missing_parent(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", {"extends": "b.yaml"})
    write(tmp_path / "b.yaml", {"extends": "a.yaml"})
    with pytest.raises(InputError, match="circle"):
        load_recipe(tmp_path / "a.yaml")
    with pytest.raises(InputError, match=r"no recipe at .*nowhere.yaml"):
        load_recipe(write(tmp_path / "c.yaml", {"extends": "nowhere.yaml"}))


@pytest.mark.parametrize("text", ["name: [1", "- 1\n- 2", "", "\t", "name: &a [*b]", "\x00"])
def test_wrong_yaml(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"r\.yaml"):
        load_recipe(path)


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: !!python/object/apply:os.system ['true']")
    with pytest.raises(InputError, match="not valid YAML"):
        load_recipe(path)


@given(st.one_of(st.integers(-5, 5), st.text(max_size=5), st.floats(allow_nan=True)))
def test_interval_is_steps_or_minutes_or_refused(value: int | str | float) -> None:
    try:
        steps, seconds = parse_interval(str(value))
    except ValueError:
        return
    assert (steps is None) != (seconds is None)
    assert (steps or seconds or 0) > 0


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda c: (
            st.lists(c, max_size=3)
            | st.dictionaries(st.sampled_from(["name", "model", "stages", "data", "x"]), c, max_size=3)
        ),
        max_leaves=12,
    )
)
def test_any_yaml_value_is_refused_cleanly(value: object) -> None:
    data = value if isinstance(value, dict) else {"stages": value}
    with pytest.raises(InputError):
        load_recipe(data)
