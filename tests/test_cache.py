"""Vision once: distinct images through a frozen encoder, features on disk, models without the encoder's weights."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

import zoo
from normtune.data import Collator, Mixture
from normtune.errors import InputError, JobError
from normtune.features import Prepared, Store, filling, images, prepare_features
from normtune.features.identity import identity, identity_key, weight_files, weights_key
from normtune.features.store import size
from normtune.recipe import load_recipe
from normtune.sharding import ignore_frozen
from normtune.step import supervised_loss
from normtune.strategy import apply, lean, tuning
from normtune.training import train
from normtune.tuned import attach_encoder, build, encoders_without_weights, move
from stubs import inputs, llava
from toys import toy_data, toy_recipe

pytestmark = pytest.mark.heavy

Batch = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 samples; their images are 24 files with 4 contents."""
    return toy_data(tmp_path_factory.mktemp("toys") / "data")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NORMTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def encoder_of(model: nn.Module) -> nn.Module:
    return model.get_submodule(tuning(model).anatomy.vision[0])


class Watch:
    """What went through the encoder of a model, forward by forward."""

    def __init__(self, model: nn.Module) -> None:
        self.images: list[int] = []
        self.graphs: list[bool] = []
        self.training: list[bool] = []
        encoder_of(model).register_forward_hook(self.note, with_kwargs=True)

    def note(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        self.images.append(len(args[0] if args else kwargs["pixel_values"]))
        self.graphs.append(out.last_hidden_state.requires_grad)
        self.training.append(any(part.training for part in module.modules()))


def forward(model: nn.Module, batch: Batch) -> torch.Tensor:
    batch = dict(batch)
    with images(model, batch):
        return model(**batch, use_cache=False).loss  # type: ignore[no-any-return]


def outcome(model: nn.Module, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss, and the gradient of every trainable tensor."""
    model.zero_grad()
    loss = forward(model, batch)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), grads


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], limit: float = 1e-6) -> None:
    assert ours.keys() == theirs.keys() and ours
    for name, grad in ours.items():
        assert (grad - theirs[name]).norm() <= limit * theirs[name].norm(), name


# One forward


def test_frozen_encoder_sees_each_image_once_in_eval_mode_without_graph() -> None:
    model = llava()
    batch = {**inputs(model), "image_index": torch.tensor([1, 1])}
    plain = {**batch, "pixel_values": batch["pixel_values"][[1, 1]]}
    del plain["image_index"]
    apply(model, "layernorm")
    for part in encoder_of(model).modules():  # dropout that would change every forward
        if hasattr(part, "dropout") and isinstance(part.dropout, float):
            part.dropout = 0.5
    wanted = outcome(model.eval(), plain)
    model.train()
    watch = Watch(model)
    batch["pixel_values"], batch["image_index"] = batch["pixel_values"][[1]], torch.tensor([0, 0])
    loss, grads = outcome(model, batch)
    assert loss == wanted[0]
    close(grads, wanted[1])
    assert (watch.images, watch.graphs, watch.training) == ([1], [False], [False])
    assert all(part.training for part in model.modules()) and "forward" not in vars(encoder_of(model))
    assert "get_image_features" not in vars(model.model)


def test_trainable_encoder_runs_as_the_model_does_on_distinct_images() -> None:
    model = llava()
    batch = inputs(model)
    batch["pixel_values"] = batch["pixel_values"][[0, 0]]
    apply(model, ["vision_norms", "norms"])
    model.train()
    wanted = outcome(model, batch)
    watch = Watch(model)
    loss, grads = outcome(
        model, {**batch, "pixel_values": batch["pixel_values"][:1], "image_index": torch.zeros(2).long()}
    )
    assert (watch.images, watch.graphs, watch.training) == ([1], [True], [True])
    assert loss == pytest.approx(wanted[0], rel=1e-6) and any("vision_tower" in name for name in grads)
    close(grads, wanted[1], 1e-5)


def test_everything_is_put_back_when_a_forward_fails() -> None:
    model = llava()
    apply(model, ["norms"])
    model.train()
    batch = inputs(model)
    batch["pixel_values"] = batch["pixel_values"][:, :, :5]
    with pytest.raises(Exception):  # noqa: B017
        forward(model, batch)
    assert all(part.training for part in model.modules()) and "forward" not in vars(encoder_of(model))
    assert "get_image_features" not in vars(model.model) and torch.is_grad_enabled()


def saved(model: nn.Module, batch: Batch) -> int:
    """Bytes that a forward keeps for backward."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(model, batch)
    return sum(kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_of_the_encoder_is_kept(checkpointing: bool) -> None:
    """As many bytes with the encoder in the forward as with its features given, even if embeddings ask for it."""
    model = llava()
    apply(model, ["norms"])
    model.train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = inputs(model)
    given = {key: value for key, value in batch.items() if key != "pixel_values"} | {"features": torch.randn(2, 16, 32)}
    assert saved(model, batch) == saved(model, given) > 0


def test_text_alone_passes_untouched() -> None:
    model = llava()
    apply(model, ["norms"])
    ids = torch.randint(3, 90, (2, 8))
    watch = Watch(model)
    assert forward(model, {"input_ids": ids, "labels": ids}) == model(input_ids=ids, labels=ids).loss
    assert watch.images == []


COLLATED = {"input_ids", "labels", "token_type_ids", "pixel_values"}  # what data.Collator supports
MLLMS = [pytest.param(name, marks=[] if name == "llava" else pytest.mark.heavy) for name in zoo.MLLM]


@pytest.mark.parametrize("name", MLLMS)
def test_every_mllm_computes_what_it_computed(name: str) -> None:
    """The zoo's models: the same loss; where images are [N, 3, h, w], also with one of them shown twice."""
    model = zoo.model(name)
    apply(model, ["norms"])
    batch = zoo.batch(name)
    torch.testing.assert_close(forward(model, batch), model(**batch, use_cache=False).loss, rtol=1e-6, atol=0)
    if batch["pixel_values"].shape != (2, 3, 32, 32) or not batch.keys() <= COLLATED:
        return
    twice = {**batch, "pixel_values": batch["pixel_values"][[1, 1]]}
    once = {**batch, "pixel_values": batch["pixel_values"][[1]], "image_index": torch.tensor([0, 0])}
    own = model(**twice, use_cache=False).loss
    torch.testing.assert_close(forward(model, once), own, rtol=1e-5, atol=1e-6)


# The store


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for number, path in enumerate(paths):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(path)
    return paths


def missing(store: Store, paths: list[Path]) -> dict[str, Path]:
    return {key: path for key, path in store.contents(paths).items() if key not in store}


def filled(folder: Path, paths: list[Path], dtype: torch.dtype = torch.float32) -> tuple[Store, torch.Tensor]:
    """A store of random features in two shards."""
    store = Store(folder)
    values = torch.randn(len(paths), 3, 5).to(dtype)
    store.describe({"tokens": 3, "shape": [3, 5], "dtype": str(dtype)})
    store.recognize(dict.fromkeys(paths, "test"))
    keys = list(missing(store, paths))
    store.add(keys[:2], values[:2])
    store.add(keys[2:], values[2:])
    return store, values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_store_gives_back_what_it_was_given(tmp_path: Path, pictures: list[Path], dtype: torch.dtype) -> None:
    store, values = filled(tmp_path / "s", pictures, dtype)
    fresh = Store(tmp_path / "s")
    for found in (store, fresh):
        assert torch.equal(found.lookup([pictures[i] for i in (3, 0, 3)]), values[[3, 0, 3]])
    assert fresh.lookup(pictures).dtype == dtype and fresh.tokens == 3
    assert not [path for path in (tmp_path / "s").iterdir() if path.name.startswith(".")]


def test_images_are_known_by_content(tmp_path: Path, pictures: list[Path]) -> None:
    store, values = filled(tmp_path / "s", pictures)
    copied = tmp_path / "other-name.png"
    shutil.copy(pictures[2], copied)
    assert torch.equal(store.lookup([copied])[0], values[2])
    Image.new("RGB", (4, 4), (99, 0, 0)).save(pictures[2])
    fresh = Store(tmp_path / "s")
    fresh.recognize(dict.fromkeys(pictures, "test"))
    assert list(missing(fresh, pictures).values()) == [pictures[2]]
    with pytest.raises(JobError, match="it changed while it was in use"):
        fresh.lookup([pictures[2]])


def test_a_process_sees_what_another_adds(tmp_path: Path, pictures: list[Path]) -> None:
    early = Store(tmp_path / "s")
    with pytest.raises(JobError, match="empty"):
        _ = early.tokens
    _, values = filled(tmp_path / "s", pictures)
    assert torch.equal(early.lookup(pictures), values) and early.tokens == 3


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def garble(path: Path) -> None:
    path.write_bytes(b"\xff" * 40)


def wrong_shape(path: Path) -> None:
    save_file({"features": torch.zeros(2, 3, 4)}, path, metadata={"images": json.dumps(["a", "b"])})


def wrong_dtype(path: Path) -> None:
    save_file({"features": torch.zeros(2, 3, 5).half()}, path, metadata={"images": json.dumps(["a", "b"])})


def no_names(path: Path) -> None:
    save_file(load_file(path), path)


@pytest.mark.parametrize("damage", [cut, garble, wrong_shape, wrong_dtype, no_names])
def test_a_damaged_shard_is_noticed_and_done_again(
    tmp_path: Path, pictures: list[Path], damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    filled(tmp_path / "s", pictures)
    shards = sorted((tmp_path / "s").glob("*.safetensors"))
    damage(shards[0])
    store = Store(tmp_path / "s")
    store.recognize(dict.fromkeys(pictures, "test"))
    assert "damaged" in capsys.readouterr().err and not shards[0].exists() and shards[1].exists()
    lost = missing(store, pictures)
    assert len(lost) == 2
    store.add(list(lost), torch.ones(2, 3, 5))
    assert store.lookup(list(lost.values())).eq(1).all()


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "s")
    assert store.check_room(3, 1_200_000).startswith("feature cache: 3 images x 1.2 MB each = 3.6 MB in ")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1_000_000))  # type: ignore
    with pytest.raises(InputError, match=r"take 3.6 MB .* 1 MB are free.\n.*NORMTUNE_CACHE"):
        store.check_room(3, 1_200_000)
    assert not (tmp_path / "s").exists()


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"item 7: image .*gone.png cannot be read"):
        Store(tmp_path / "s").recognize({tmp_path / "gone.png": "data.json, item 7"})


def test_sizes_in_words() -> None:
    assert [size(n) for n in (0, 999, 1000, 94e9, 2e12)] == ["0 bytes", "999 bytes", "1 kB", "94 GB", "2 TB"]


# Whose features


def key_of(model: dict[str, Any]) -> str:
    recipe = load_recipe({"model": model, "stages": [STAGE]}, [])
    return identity_key(identity(recipe.model))


STAGE = {"name": "a", "strategy": "layernorm-simple", "data": [{"path": "x.json"}], "learning_rate": 1e-3}


def change_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if key.endswith("patch_embedding.weight"))
    tensors[name][0, 0, 0, 0] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_processor(folder: Path) -> None:
    for path in (folder / "preprocessor_config.json", folder / "processor_config.json"):
        if path.exists():
            config = json.loads(path.read_text())
            config.get("image_processor", config)["image_mean"] = [0.4, 0.4, 0.4]
            path.write_text(json.dumps(config))


def change_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.get("vision_config", config)["layer_norm_eps"] = 1e-3
    (folder / "config.json").write_text(json.dumps(config))


def change_layer(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vision_feature_layer": -1}))


def change_llm(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if key.endswith("q_proj.weight") and "language_model" in key)
    tensors[name] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("change", [change_weights, change_processor, change_config])
def test_another_encoder_has_another_store(change: Any, llm_folder: Path, vision_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(vision_folder, tmp_path / "copy")
    own = key_of({"llm": str(llm_folder), "vision": str(vision_folder)})
    assert own == key_of({"llm": "any/other", "vision": str(folder)})
    assert own != key_of({"llm": str(llm_folder), "vision": str(vision_folder), "dtype": "float32"})
    change(folder)
    assert own != key_of({"llm": str(llm_folder), "vision": str(folder)})


@pytest.mark.parametrize("change", [change_weights, change_processor, change_config, change_layer, change_llm])
def test_an_mllm_is_known_by_its_encoder(change: Any, mllm_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(mllm_folder, tmp_path / "copy")
    own = key_of({"path": str(folder)})
    change(folder)
    assert (own == key_of({"path": str(folder)})) == (change is change_llm)


def test_how_weights_are_cut_into_files_does_not_matter(vision_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(vision_folder, tmp_path / "copy")
    AutoModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    assert len(weight_files(str(folder))) > 2
    assert weights_key(str(folder), "it", None) == weights_key(str(vision_folder), "it", None)


# From a recipe to losses


@pytest.fixture(params=["assembled", "loaded"])
def base(request: pytest.FixtureRequest, llm_folder: Path, vision_folder: Path, mllm_folder: Path) -> dict[str, Any]:
    """The model of a recipe: LLM and encoder, or an MLLM's folder."""
    if request.param == "loaded":
        return {"path": str(mllm_folder), "dtype": "float32"}
    return {"llm": str(llm_folder), "vision": str(vision_folder), "dtype": "float32"}


def recipe_of(base: dict[str, Any], data: Path, *strategies: Any, cached: bool = True) -> Any:
    recipe = toy_recipe(Path(), Path(), data, model=base)
    (stage, _) = recipe["stages"]
    names = strategies or ("layernorm",)
    recipe["stages"] = [
        {**stage, "name": f"s{n}", "strategy": strategy, "cache_features": cached} for n, strategy in enumerate(names)
    ]
    return load_recipe(recipe, [])


def begin(recipe: Any, fill: bool = True) -> tuple[Prepared, nn.Module, Any, Mixture]:
    """As a training begins."""
    mixtures = [Mixture(stage.data) for stage in recipe.stages]
    prepared = prepare_features(recipe, mixtures, quiet=True)
    assert prepared is not None
    model, processor = build(recipe.model, recipe.seed, prepared.known)
    prepared.check(model)
    move(model, torch.device("cpu"))
    if fill:
        prepared.fill(model, processor, quiet=True)
    return prepared, model, processor, mixtures[0]


def losses(model: nn.Module, collator: Collator, mixture: Mixture, steps: int = 3) -> list[float]:
    """Of a few steps of a training."""
    apply(model, "layernorm")
    lean(model)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for step in range(steps):
        batch = collator(mixture[step * 8 : step * 8 + 8])
        loss = supervised_loss(model, batch) / 20
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_stored_features_give_the_losses_of_the_live_path(base: dict[str, Any], data: Path) -> None:
    """Bit for bit in fp32: live, from a store just filled, and from a complete one without the encoder's weights."""
    recipe = recipe_of(base, data)
    model, processor = build(recipe.model, recipe.seed)
    wanted = losses(model, Collator(processor, None), Mixture(recipe.stages[0].data))
    assert wanted[0] > wanted[-1]
    for complete in (False, True):
        prepared, model, processor, mixture = begin(recipe)
        assert (prepared.known is not None) == complete == bool(encoders_without_weights(model))
        watch = Watch(model)
        assert losses(model, Collator(processor, None, prepared.store), mixture) == wanted
        assert watch.images == []


def test_a_complete_store_needs_no_weights_and_the_encoder_comes_back(
    base: dict[str, Any], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(base, data)
    whole = begin(recipe)[1]
    encoded: Counter[str] = Counter()
    monkeypatch.setattr(filling.Encoder, "__call__", lambda self, paths: encoded.update(paths))
    _, model, _, _ = begin(recipe)
    assert not encoded
    encoder = encoder_of(model)
    assert all(tensor.is_meta for tensor in [*encoder.parameters(), *encoder.buffers()])
    assert not any(p.is_meta for name, p in model.named_parameters() if "vision_tower" not in name)
    assert encoder.state_dict().keys() == encoder_of(whole).state_dict().keys()
    assert model.config.to_dict() == whole.config.to_dict()
    attach_encoder(model, recipe.model)
    assert not encoders_without_weights(model) and not encoder_of(model).training
    batch = inputs(whole)
    batch["input_ids"] = batch["input_ids"].where(batch["input_ids"] != 99, whole.config.image_token_id)
    assert torch.equal(model(**batch).logits, whole(**batch).logits)


def test_each_content_is_encoded_once(base: dict[str, Any], data: Path, cache: Path) -> None:
    recipe = recipe_of(base, data)
    prepared, model, processor, _ = begin(recipe, fill=False)
    assert (len(prepared.wanted), len(prepared.missing)) == (24, 4)
    watch = Watch(model)
    prepared.fill(model, processor, quiet=True)
    assert sum(watch.images) == 4 + 1 + 2  # one more for its size, two of noise for the shape of features
    assert len(list(cache.glob("features/*/*.safetensors"))) == 1


def test_several_processes_share_the_work(
    base: dict[str, Any], data: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(filling, "SHARD_BYTES", 1)
    recipe = recipe_of(base, data)
    prepared, model, processor, _ = begin(recipe, fill=False)
    for rank in range(3):  # one that comes late sees what the others have stored, and still does its own share
        late = begin(recipe, fill=False)[0]
        late.fill(model, processor, rank=rank, ranks=3, quiet=True)
    assert len(list(cache.glob("features/*/*.safetensors"))) == 4
    prepared.store.refresh()
    assert not prepared.missing


def test_two_trainings_fill_one_store(base: dict[str, Any], data: Path) -> None:
    recipe = recipe_of(base, data)
    one, two = begin(recipe, fill=False), begin(recipe, fill=False)
    one[0].fill(one[1], one[2], quiet=True)
    watch = Watch(two[1])
    two[0].fill(two[1], two[2], quiet=True)
    assert watch.images == []  # it looks again before it encodes
    paths = list(two[0].wanted)[:5]
    assert torch.equal(one[0].store.lookup(paths), two[0].store.lookup(paths))


def test_two_trainings_fill_one_store_at_once(
    base: dict[str, Any], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In lockstep, so that each encodes what the other has not finished yet."""
    monkeypatch.setattr(filling, "SHARD_BYTES", 1)
    recipe = recipe_of(base, data)
    both = [begin(recipe, fill=False) for _ in range(2)]
    together = threading.Barrier(2)
    own = Store.add

    def add(self: Store, keys: Any, features: torch.Tensor) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            together.wait(2)
        own(self, keys, features)

    monkeypatch.setattr(Store, "add", add)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda one: one[0].fill(one[1], one[2], quiet=True), both))
    assert all(not one[0].missing for one in both)
    assert torch.equal(*(one[0].store.lookup(list(one[0].wanted)) for one in both))


def test_the_cost_is_printed_before(base: dict[str, Any], data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepared, model, processor, _ = begin(recipe_of(base, data), fill=False)
    prepared.fill(model, processor)
    said = capsys.readouterr().err
    assert "feature cache: 4 images x 2.05 kB each = 8.19 kB in" in said and "encoding images 4/4" in said


def test_no_room_is_an_input_error(base: dict[str, Any], data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, model, processor, _ = begin(recipe_of(base, data), fill=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 8000))  # type: ignore
    with pytest.raises(InputError, match=r"4 images take 8.19 kB"):
        prepared.fill(model, processor, quiet=True)
    assert not prepared.store.folder.exists()


def test_a_broken_image_is_named(llm_folder: Path, vision_folder: Path, tmp_path: Path) -> None:
    broken = toy_data(tmp_path / "data", 3)
    (broken / "images" / "1.png").write_bytes(b"nothing")
    recipe = recipe_of({"llm": str(llm_folder), "vision": str(vision_folder)}, broken)
    with pytest.raises(InputError, match=r"item 2 \(id '1'\): image .*1.png cannot be read"):
        begin(recipe)


def test_broken_images_are_left_out_by_policy(
    llm_folder: Path, vision_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same samples are left out, for the same reasons, and the same is trained as from the images themselves."""
    data = toy_data(tmp_path / "data", 12)
    for n in (1, 2, 5):
        (data / "images" / f"{n}.png").write_bytes(b"nothing" + bytes([n]))
    real = Store.recognize

    def recognize(store: Store, wanted: Any, *rest: Any) -> None:
        real(store, wanted, *rest)
        store._keys.pop(data / "images" / "5.png", None)  # as where it cannot even be read

    monkeypatch.setattr(Store, "recognize", recognize)
    ledgers, states = [], []
    for cached in (True, True, False):  # filling a store, from one that is there, without
        recipe = toy_recipe(llm_folder, vision_folder, data, bad_samples="skip", max_bad=12)
        recipe["stages"] = [{**recipe["stages"][0], "cache_features": cached, "strategy": "layernorm"}]
        out = tmp_path / f"run{len(states)}"
        train(recipe, out=out, quiet=True)
        ledgers.append(sorted((out / "skipped.jsonl").read_text().splitlines()))
        states.append(load_file(out / "adapter" / "adapter.safetensors"))
    assert ledgers[0] == ledgers[1] == ledgers[2] and len(ledgers[0]) == 3
    for state in states[1:]:
        assert all(torch.equal(state[name], tensor) for name, tensor in states[0].items())


def test_not_one_image_can_be_opened(llm_folder: Path, vision_folder: Path, tmp_path: Path) -> None:
    data = toy_data(tmp_path / "data", 3)
    for n in range(3):
        (data / "images" / f"{n}.png").write_bytes(b"nothing")
    recipe = recipe_of({"llm": str(llm_folder), "vision": str(vision_folder)}, data)
    mixture = Mixture(recipe.stages[0].data)
    prepared = prepare_features(recipe, [mixture], quiet=True, skip=True)
    assert prepared is not None
    model, processor = build(recipe.model, recipe.seed, prepared.known)
    prepared.fill(model, processor, quiet=True)
    left: list[str] = []
    collator = Collator(processor, None, prepared.store, lambda where, why: left.append(f"{where}: {why}"))
    assert list(map(len, collator.encode(mixture))) == [1, 1, 1] and collator.counts["bad"] == 3
    assert all("cannot be read: it is no image" in what for what in left)


@pytest.mark.parametrize("strategies", [(["vision_norms"],), (["norms", "regex:vision_tower.*fc1"], ["norms"])])
def test_a_trained_encoder_is_refused(base: dict[str, Any], data: Path, strategies: tuple[Any, ...]) -> None:
    with pytest.raises(InputError, match="stage s0 trains the vision encoder"):
        begin(recipe_of(base, data, *strategies), fill=False)


def test_an_encoder_is_loaded_where_another_stage_needs_it(base: dict[str, Any], data: Path) -> None:
    recipe = recipe_of(base, data, "connector", ["norms"])
    begin(recipe)
    assert begin(recipe, fill=False)[0].known is not None
    live = recipe.stages[0].model_copy(update={"cache_features": False})
    mixed = recipe.model_copy(update={"stages": [live, recipe.stages[1]]})
    prepared = begin(mixed, fill=False)[0]
    assert prepared.known is None and not prepared.missing
    none = recipe.model_copy(update={"stages": [live]})
    assert prepare_features(none, [Mixture(live.data)]) is None


def test_more_than_a_connector_is_refused(base: dict[str, Any], data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by comparing: here the model scales what its connector gives."""
    prepared, model, processor, _ = begin(recipe_of(base, data), fill=False)
    own = model.model.get_image_features  # type: ignore[union-attr,operator]

    def scaled(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        out.pooler_output = [2 * part for part in out.pooler_output]
        return out

    monkeypatch.setattr(model.model, "get_image_features", scaled)
    with pytest.raises(InputError, match="more than a connector"):
        prepared.fill(model, processor, quiet=True)
    assert not prepared.store.folder.exists()


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("nf4", marks=pytest.mark.heavy)])
def test_a_bf16_base_stores_bf16(base: dict[str, Any], data: Path, dtype: str) -> None:
    """The same losses bit for bit here, too."""
    recipe = recipe_of({**base, "dtype": dtype}, data)
    model, processor = build(recipe.model, recipe.seed)
    wanted = losses(model, Collator(processor, None), Mixture(recipe.stages[0].data))
    for _ in range(2):
        prepared, model, processor, mixture = begin(recipe)
        assert prepared.store.lookup(list(prepared.wanted)[:1]).dtype == torch.bfloat16
        assert losses(model, Collator(processor, None, prepared.store), mixture) == wanted
    attach_encoder(model, recipe.model)
    assert {p.dtype for p in encoder_of(model).parameters()} == {torch.bfloat16}


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_training_leaves_the_empty_encoder_out(
    llm_folder: Path, vision_folder: Path, data: Path, process_group: None
) -> None:
    recipe = recipe_of({"llm": str(llm_folder), "vision": str(vision_folder), "dtype": "float32"}, data)
    begin(recipe)
    prepared, model, processor, mixture = begin(recipe)
    apply(model, "layernorm")
    batch = Collator(processor, None, prepared.store)(mixture[:4])
    wanted = supervised_loss(model, batch)
    ignore_frozen(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    loss = supervised_loss(wrapped, batch)
    loss.backward()
    assert torch.equal(loss, wanted) and all(p.grad is not None for p in model.parameters() if p.requires_grad)


FILL = """
import sys, time
import torch
from pathlib import Path
from normtune.data import Mixture
from normtune.features import filling
from normtune.recipe import load_recipe
from normtune.tuned import build

slow = float(sys.argv[2])
filling.SHARD_BYTES = 1
encode = filling.Encoder.features

def slowly(self, pixels):
    print("encoded", len(pixels), flush=True)
    time.sleep(slow)
    return encode(self, pixels)

filling.Encoder.features = slowly
recipe = load_recipe(sys.argv[1], [])
prepared = filling.prepare_features(recipe, [Mixture(stage.data) for stage in recipe.stages], quiet=True)
model, processor = build(recipe.model, recipe.seed, prepared.known)
prepared.fill(model, processor, quiet=True)
print("missing", len(prepared.missing), flush=True)
"""


@pytest.mark.slow
def test_killed_while_it_is_written_it_goes_on(
    llm_folder: Path, vision_folder: Path, tmp_path: Path, cache: Path
) -> None:
    """kill -9: what was finished is kept, and never encoded again; the losses are those of the live path."""
    many = toy_data(tmp_path / "data", 24)
    for number in range(24):
        Image.new("RGB", (32, 32), (10 * number, 0, 99)).save(many / "images" / f"{number}.png")
    recipe = recipe_of({"llm": str(llm_folder), "vision": str(vision_folder), "dtype": "float32"}, many)
    path = tmp_path / "recipe.json"
    path.write_text(recipe.model_dump_json())
    command = [sys.executable, "-c", FILL, str(path)]
    with subprocess.Popen([*command, "0.15"], stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 100
        while len(list(cache.glob("features/*/*.safetensors"))) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    (folder,) = (cache / "features").iterdir()
    (folder / ".left.safetensors.part").write_bytes(b"half")
    done = len(list(folder.glob("*.safetensors")))
    assert 5 <= done < 24
    again = subprocess.run([*command, "0"], capture_output=True, text=True, check=True).stdout.splitlines()
    assert again.count("encoded 1") == 24 - done + 1 and again[-1] == "missing 0"  # one more for its size
    assert len(list(folder.glob("*.safetensors"))) == 24

    model, processor = build(recipe.model, recipe.seed)
    wanted = losses(model, Collator(processor, None), Mixture(recipe.stages[0].data))
    prepared, model, processor, mixture = begin(recipe)
    assert prepared.known is not None
    assert losses(model, Collator(processor, None, prepared.store), mixture) == wanted
