"""Reading a recipe: YAML, `extends`, dotted overrides, and messages that name the field and the closest key."""

from __future__ import annotations

import hashlib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from normtune.errors import InputError, did_you_mean
from normtune.recipe.schema import Recipe


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file (or takes a mapping), follows `extends`, applies `KEY=VALUE` overrides, validates.

    Raises:
        InputError: missing file, wrong YAML, unknown key, wrong value; with file and field.
    """
    if isinstance(source, Recipe):
        data: dict[str, Any] = source.model_dump(mode="json")
        where = "recipe"
    elif isinstance(source, Mapping):
        data, where = json.loads(json.dumps(source)), "recipe"
    else:
        data, where = read_with_parents(Path(source), ()), str(source)
    for override in overrides:
        apply_override(data, override)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise InputError(explain(error, where)) from None


def read_with_parents(path: Path, children: tuple[Path, ...]) -> dict[str, Any]:
    """One recipe file merged over the file that it `extends` (a path relative to its own folder)."""
    if path.resolve() in children:
        raise InputError(f"{path}: `extends` goes in a circle; remove one of the `extends` lines")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no recipe at {path}; `normtune init --help` shows how to write one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{path}{place}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: a recipe is a mapping of keys (name, model, stages, ...), not {kind_of(data)}")
    parent = data.pop("extends", None)
    if parent is None:
        return data
    if not isinstance(parent, str):
        raise InputError(f"{path}: extends: give one file name, not {kind_of(parent)}")
    return merge(read_with_parents(path.parent / parent, (*children, path.resolve())), data)


def merge(base: Any, over: Any) -> Any:
    """`over` on top of `base`: mappings by key, lists of mappings that have a name (stages) by name; else `over`.

    A child that names a stage of its parent changes only the keys that it gives; a new name is appended.
    """
    if isinstance(base, dict) and isinstance(over, dict):
        return {key: merge(base.get(key), over[key]) if key in over else base[key] for key in {**base, **over}}
    if named(base) and named(over):
        merged = {item["name"]: item for item in base}
        for item in over:
            merged[item["name"]] = merge(merged.get(item["name"]), item)
        return list(merged.values())
    return over


def named(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) and "name" in item for item in value)


def override_texts(overrides: Mapping[str, Any]) -> list[str]:
    """`{"seed": 1}` as the command line writes it: `["seed=1"]`."""
    return [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]


def apply_override(data: dict[str, Any], override: str) -> None:
    """Sets `a.b.0.c=VALUE` in place; VALUE is YAML: `1e-4`, `true`, `[norms, connector]` mean what they say."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"override {override!r} is not KEY=VALUE; example: stages.1.learning_rate=1e-4")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(
            f"override {override!r}: the value is not valid YAML: {getattr(error, 'problem', error)}"
        ) from None
    node: Any = data
    *path, last = key.split(".")
    for depth, part in enumerate(path):
        if isinstance(node, dict) and part not in node:
            node[part] = {}
        node = step_into(node, part, ".".join(path[: depth + 1]), override)
    if isinstance(node, list):
        step_into(node, last, key, override)
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise InputError(f"override {override!r}: {'.'.join(path)} is {kind_of(node)} and has no keys")


def step_into(node: Any, part: str, where: str, override: str) -> Any:
    if isinstance(node, list):
        if not part.isdigit() or int(part) >= len(node):
            names = ", ".join(
                f"{i} ({item['name']})" for i, item in enumerate(node) if isinstance(item, dict) and "name" in item
            )
            raise InputError(
                f"override {override!r}: no item {where}; there are {len(node)}: {names or 'numbered from 0'}"
            )
        return node[int(part)]
    if not isinstance(node, dict):
        raise InputError(f"override {override!r}: {where} is below {kind_of(node)}, which has no keys")
    return node[part]


def kind_of(value: Any) -> str:
    names = {
        dict: "a mapping",
        list: "a list",
        str: "text",
        bool: "true/false",
        int: "a number",
        float: "a number",
    }
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def explain(error: ValidationError, where: str) -> str:
    """The first three faults of a recipe, a line each: file, field, what is wrong, what to do."""
    lines = []
    for fault in error.errors()[:3]:
        field = ".".join(str(part) for part in fault["loc"] if part not in ("str", "int", "list[str]"))
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            known = keys_at(fault["loc"][:-1])
            message = f"unknown key{did_you_mean(str(fault['loc'][-1]), known)}; known: {', '.join(known)}"
        elif fault["type"] == "missing":
            message = "missing; add it"
        elif fault["type"] in ("bool_parsing", "bool_type"):
            message = f"it is true or false, not {fault['input']!r}"
        elif "input" in fault and isinstance(fault["input"], str | int | float | bool | None) and field:
            message = f"{message}, not {fault['input']!r}" if not fault["type"].startswith("value_error") else message
        lines.append(f"{where}: {field}: {message}" if field else f"{where}: {message}")
    more = error.error_count() - len(lines)
    if more > 0:
        lines[-1] += f" (and {more} more)"
    return "\n".join(dict.fromkeys(lines))


def keys_at(location: Sequence[str | int]) -> list[str]:
    """The known keys of the recipe node at a pydantic error's location."""
    node: type[BaseModel] = Recipe
    for part in location:
        if isinstance(part, str) and part in node.model_fields:
            found = find_model(node.model_fields[part].annotation)
            if found is not None:
                node = found
    return list(node.model_fields) + (["extends"] if node is Recipe else [])


def find_model(annotation: Any) -> type[BaseModel] | None:
    if (
        isinstance(annotation, type)
        and not isinstance(annotation, types.GenericAlias)
        and issubclass(annotation, BaseModel)
    ):
        return annotation
    for argument in typing.get_args(annotation):
        if (found := find_model(argument)) is not None:
            return found
    return None


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def recipe_hash(recipe: Recipe) -> str:
    """Twelve hex digits that change with anything in the resolved recipe."""
    text = json.dumps(recipe.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
