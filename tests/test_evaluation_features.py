"""Evaluation from stored features: the encoder runs once per image and comparison, and the answers are the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from asked import write_benchmarks
from normtune.data import Mixture
from normtune.errors import InputError
from normtune.evaluation import (
    Settings,
    ask,
    engines,
    evaluate_into,
    evaluate_model,
    read_measured,
    stored_features,
)
from normtune.features import Store, can_store, fill_store, prepare_features
from normtune.recipe import Recipe, load_recipe
from normtune.strategy import apply, tuning
from normtune.training import train
from normtune.tuned import build, encoders_without_weights, open_tuned
from toys import toy_data, toy_recipe

pytestmark = pytest.mark.heavy

FIVE = ("pope", "mme", "vqav2", "coco", "flickr30k", "text")
PICTURES = 4 + 4 + 3  # val2014, Flickr30k, MME (one of its four files is a copy)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmarks(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NORMTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def recipe(llm_folder: Path, vision_folder: Path, tmp_path: Path) -> Recipe:
    return load_recipe(toy_recipe(llm_folder, vision_folder, toy_data(tmp_path / "toys")))


@contextmanager
def encoded(model: nn.Module) -> Iterator[list[int]]:
    """How many images went through the encoder, forward by forward."""
    seen: list[int] = []
    encoder = model.get_submodule(tuning(model).anatomy.vision[0])
    hook = encoder.register_forward_hook(lambda module, args, kwargs, out: seen.append(len(out[0])), with_kwargs=True)
    yield seen
    hook.remove()


def store_of(recipe: Recipe, model: Any, processor: Any, data: Path, names: tuple[str, ...] = FIVE) -> Store:
    store = stored_features(recipe.model, model, processor, ask(Settings(names), data))
    assert store is not None
    return store


@pytest.mark.parametrize("mode, names", [("generate", FIVE), ("likelihood", ("pope", "mme"))])
def test_scores_are_the_same_and_a_second_evaluation_encodes_nothing(
    mode: Any, names: tuple[str, ...], recipe: Recipe, data: Path
) -> None:
    model, processor = build(recipe.model)
    ask_all = {"benchmarks": names, "data": data, "mode": mode, "batch_size": 7, "predictions": True}
    with encoded(model) as seen:
        wanted = evaluate_model(model, processor, **ask_all)
    assert sum(seen) >= 3 * 4 if mode == "generate" else seen
    with encoded(model) as seen:
        store = store_of(recipe, model, processor, data, names)
    pictures = PICTURES if mode == "generate" else 7
    assert sum(seen) == pictures + 1 + 2  # one more for its size, two of noise for the shape of features
    with encoded(model) as seen:
        assert evaluate_model(model, processor, store=store, **ask_all) == wanted
    assert seen == []
    again, processor = build(recipe.model)
    with encoded(again) as seen:
        store = store_of(recipe, again, processor, data, names)
        assert evaluate_model(again, processor, store=store, **ask_all) == wanted
    assert seen == []


def test_images_that_are_not_stored_are_encoded(recipe: Recipe, data: Path) -> None:
    model, processor = build(recipe.model)
    wanted = evaluate_model(model, processor, ["coco", "flickr30k", "text"], data)
    store = store_of(recipe, model, processor, data, ("coco", "text"))
    with encoded(model) as seen:
        assert evaluate_model(model, processor, ["coco", "flickr30k", "text"], data, store=store) == wanted
    assert sum(seen) == 4
    with encoded(model) as seen:
        shown = evaluate_model(model, processor, ["coco"], data, store=store, baseline="shuffled", predictions=True)
        blind = evaluate_model(model, processor, ["coco"], data, store=store, baseline="blind", predictions=True)
    assert seen == [] and shown["coco"]["predictions"] != blind["coco"]["predictions"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_features_from_the_store_are_the_models(dtype: str, recipe: Recipe, data: Path) -> None:
    """To rounding: the encoder sees batches of another size, the connector a dense tensor instead of a slice."""
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": dtype})})
    model, processor = build(recipe.model)
    asked = ask(Settings(("pope", "flickr30k")), data)
    store = store_of(recipe, model, processor, data)
    requests = [one[place] for one in asked for place in range(len(one))]
    with torch.inference_mode():
        live, stored = (engines.engine_for(model, processor, chat_of(processor), s) for s in (None, store))
        pairs = zip(live.prepare(requests, 5), stored.prepare(requests, 5), strict=True)
    for (length, (ids, ours)), (other, (same_ids, theirs)) in pairs:
        assert length == other and ids == same_ids
        assert ours[0].dtype == theirs[0].dtype
        assert (ours[0] - theirs[0]).norm() <= (1e-5 if dtype == "float32" else 1e-2) * ours[0].norm()


def chat_of(processor: Any) -> Any:
    from normtune.chat import Chat

    return Chat.from_processor(processor)


def test_a_training_and_its_evaluation_share_a_store(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    """What a comparison does: everything is encoded before the first cell; a cell trains without the encoder's weights
    and scores the run without a forward of the encoder."""
    stages = [stage.model_copy(update={"cache_features": True}) for stage in recipe.stages]
    recipe = recipe.model_copy(update={"stages": stages})
    asked = ask(Settings(FIVE), data)
    model, processor = build(recipe.model)
    mixtures = [Mixture(stage.data) for stage in recipe.stages]
    shown = {image: where for one in mixtures for image, where in one.images()}
    assert fill_store(recipe.model, model, processor, shown, quiet=True) is not None
    stored_features(recipe.model, model, processor, asked)
    prepared = prepare_features(recipe, mixtures, quiet=True)
    assert prepared is not None and not prepared.missing and prepared.known is not None
    assert encoders_without_weights(build(recipe.model, 0, prepared.known)[0])
    run = train(recipe, out=tmp_path / "run", quiet=True)
    with encoded(run.model) as seen:
        store = stored_features(recipe.model, run.model, run.processor, asked)
        settings = Settings(FIVE)
        document = evaluate_into(tmp_path / "with.json", run.model, run.processor, settings, data, store=store)
    assert seen == [] and store is not None and document["generation"]["stored_features"] == store.folder.name
    tuned = open_tuned(tmp_path / "run")
    without = evaluate_into(tmp_path / "without.json", tuned.model, tuned.processor, settings, data)
    assert document["scores"] == without["scores"] and without["generation"]["stored_features"] is None
    assert read_measured(tmp_path / "with.json", asked).keys() == set(FIVE)


def test_an_interrupted_evaluation_may_go_on_from_a_store(recipe: Recipe, data: Path, tmp_path: Path) -> None:
    model, processor = build(recipe.model)
    settings = Settings(("pope", "mme"))
    into = {"settings": settings, "data": data, "batch_size": 5}
    whole = evaluate_into(tmp_path / "whole.json", model, processor, **into)
    evaluate_into(tmp_path / "r.json", model, processor, **into)
    journal = tmp_path / "r" / "journal.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:4]))
    with encoded(model) as seen:
        store = store_of(recipe, model, processor, data, ("pope", "mme"))
        seen.clear()
        again = evaluate_into(tmp_path / "r.json", model, processor, **into, store=store)
    assert seen == [] and again["scores"] == whole["scores"]
    assert len(journal.read_text().splitlines()) == len((tmp_path / "whole" / "journal.jsonl").read_text().splitlines())


@pytest.mark.parametrize("how", ["trained", "loaded"])
def test_a_tuned_encoder_runs(how: str, recipe: Recipe, data: Path, tmp_path: Path) -> None:
    """A store that others filled is not read, and nothing is put into it."""
    base, processor = build(recipe.model)
    store = store_of(recipe, base, processor, data, ("coco",))
    before = sorted(store.folder.iterdir())
    raw = json.loads(recipe.model_dump_json())
    raw["stages"][1]["strategy"] = ["vision_norms", "norms"]
    run = train(raw, out=tmp_path / "run", quiet=True)
    tuned = run if how == "trained" else open_tuned(tmp_path / "run")
    assert not can_store(tuned.model) and can_store(base)
    assert stored_features(recipe.model, tuned.model, tuned.processor, ask(Settings(("pope",)), data)) is None
    wanted = evaluate_model(tuned.model, tuned.processor, ["coco"], data, predictions=True)
    with encoded(tuned.model) as seen:
        assert evaluate_model(tuned.model, tuned.processor, ["coco"], data, predictions=True, store=store) == wanted
    assert sum(seen) == 4 and sorted(store.folder.iterdir()) == before


@pytest.mark.parametrize(
    "parts, stored",
    [
        (["norms"], True),
        ("full", True),
        ("lora", True),
        (["vision_norms"], False),
        (["regex:vision_tower.*fc1"], False),
    ],
)
def test_who_may_use_a_store(parts: Any, stored: bool, recipe: Recipe) -> None:
    model, _ = build(recipe.model)
    apply(model, parts)
    assert can_store(model) == stored
    apply(model, ["norms"])  # nothing of it was trained
    assert can_store(model)


def test_other_models_go_their_own_way(
    recipe: Recipe, data: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = build(recipe.model)
    store = store_of(recipe, model, processor, data, ("coco",))
    before = sorted(path for path in cache.rglob("*"))
    monkeypatch.setattr(engines, "takes_features", lambda *both: False)
    monkeypatch.setattr("normtune.evaluation.takes_features", lambda *both: False)
    assert stored_features(recipe.model, model, processor, ask(Settings(("pope",)), data)) is None
    with encoded(model) as seen:
        evaluate_model(model, processor, ["coco"], data, store=store)
    assert sum(seen) == 4 and sorted(cache.rglob("*")) == before


def test_a_broken_image_is_named_before_anything_is_asked(recipe: Recipe, tmp_path: Path) -> None:
    data = write_benchmarks(tmp_path / "data")
    next((data / "val2014").iterdir()).write_bytes(b"nothing")
    model, processor = build(recipe.model)
    with pytest.raises(InputError, match=r"pope, item '\S+': image .*val2014.* cannot be read"):
        stored_features(recipe.model, model, processor, ask(Settings(("pope",)), data))
