"""Which images, which store, is it complete, and filling it: how a training with `cache_features: true` begins, and an
evaluation that shows images again and again.

Scope: from a recipe to a complete store. Non-scope: how a store is kept (store.py), whose it is (identity.py).
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from normtune.errors import InputError
from normtune.features.identity import identity, identity_key
from normtune.features.once import frozen, image_reader
from normtune.features.store import Store
from normtune.images import open_image
from normtune.layers import unwrapped
from normtune.probes import Features, probe_encoder
from normtune.progress import Bar, say
from normtune.runlog import cache_folder
from normtune.strategy import check, tuning

if TYPE_CHECKING:
    from normtune.recipe import ModelRecipe, Recipe, Stage

SHARD_BYTES = 64_000_000  # a shard is what a kill can lose: half a minute of an encoder on a CPU
SHARD_IMAGES = 512
BATCH = 16


class HasImages(Protocol):
    """A `data.Mixture`."""

    has_images: bool

    def images(self) -> Iterator[tuple[Path, str]]:
        """Files, each with what names it in messages."""
        ...


@dataclass
class Prepared:
    """Images, and where their features are kept: those of the stages with `cache_features`, or of an evaluation.

    `known` is what an MLLM can be built with when its encoder's weights need not be read; None: build it whole.
    `skip`: an image that cannot be opened is left out, and whoever asks for it is told (`Store.holds`).
    """

    store: Store
    identity: dict[str, Any]
    wanted: dict[Path, str]  # image -> what names it
    stages: tuple[Stage, ...]  # all up to the last that reads features; () without a training
    known: Features | None
    skip: bool = False

    @property
    def missing(self) -> dict[str, Path]:
        """SHA-256 -> one of the files with this content, of the images that are not stored yet."""
        return {key: path for key, path in self.store.contents(self.wanted).items() if key not in self.store}

    def check(self, model: nn.Module) -> None:
        """Raises InputError where features cannot stand for images: an encoder that is trained, or read in other ways.

        (Whether the connector alone is between encoder and LLM, `fill` finds by comparing.)
        """
        found = tuning(model).anatomy
        if not has_connector(model):
            raise InputError(
                "cache_features: the model has no single vision encoder and connector, so there is nothing to keep.\n"
                "Leave cache_features off."
            )
        encoder = {id(p) for p in unwrapped(model).get_submodule(found.vision[0]).parameters()}
        for stage in self.stages:
            for part, trained in check(model, stage.strategy, stage.lora.targets).items():
                if any(id(parameter) in encoder for parameter in trained):
                    raise InputError(
                        f"stage {stage.name} trains the vision encoder ({part}), so features that were kept would be "
                        "wrong.\nLeave cache_features off, in this stage and in later ones."
                    )

    def fill(self, model: nn.Module, processor: Any, *, rank: int = 0, ranks: int = 1, quiet: bool = False) -> None:
        """Encodes what is missing, on the model's device; process `rank` of `ranks` does its share.

        It may be killed at any moment: the next call goes on. All processes must be through before any looks up.

        Raises:
            InputError: not enough room on the disk, an image that cannot be opened (without `skip`), a model that puts
                more than a connector between encoder and LLM.
            JobError: writing failed.
        """
        self.store.refresh()
        contents = self.store.contents(self.wanted)
        # Shares of all images, not of the missing ones: what is missing may look different to another process.
        todo = [key for key in sorted(contents)[rank::ranks] if key not in self.store]
        # Not in one order: two trainings that start together would encode the same images at the same time.
        random.Random(os.getpid()).shuffle(todo)
        if not todo:
            return
        encode = Encoder(model, processor, self.wanted, self.skip)
        first = next((found for key in todo if (found := encode([contents[key]])) is not None), None)
        if first is None:  # not one of them can be opened
            return
        bytes_each = first.numel() * first.element_size()
        room = self.store.check_room(len(self.missing), bytes_each)
        if rank == 0 and not quiet:
            say(room)
        self.describe(encode, first, processor)
        per_shard = min(max(1, SHARD_BYTES // bytes_each), SHARD_IMAGES)
        with Bar("encoding images", len(todo), quiet=quiet or rank > 0) as bar:
            while left := [key for key in todo if key not in self.store and contents[key] not in encode.broken]:
                shard = left[:per_shard]
                features = encode([contents[key] for key in shard])
                if features is not None:
                    self.store.add([key for key in shard if contents[key] not in encode.broken], features)
                bar.update(len(todo) - len(left) + len(shard))
                self.store.refresh()  # another process may be at it, too

    def describe(self, encode: Encoder, features: torch.Tensor, processor: Any) -> None:
        """Writes down what the store will hold, from the `features` [n, P, D] of some images."""
        try:
            probed = asdict(probe_encoder(encode.tower, processor.image_processor, "of the model"))
        except InputError:  # an encoder that this package would not assemble: it is always loaded
            probed = None
        self.store.describe(
            {
                "tokens": encode.tokens,
                "shape": list(features.shape[1:]),
                "dtype": str(features.dtype),
                "probed": probed,
                "identity": self.identity,
            }
        )


class Encoder:
    """Image files to features [n, P, D] on the CPU: what the connector of `model` is given.

    With `skip`, files that cannot be opened are left out and kept in `broken`; None where nothing is left.
    """

    def __init__(self, model: nn.Module, processor: Any, wanted: Mapping[Path, str], skip: bool = False) -> None:
        self.skip, self.broken = skip, set[Path]()
        inner = unwrapped(model)
        found = tuning(inner).anatomy
        self.reader, self.processor, self.wanted = image_reader(inner, found), processor.image_processor, wanted
        self.tower, self.connector = inner.get_submodule(found.vision[0]), inner.get_submodule(found.connector[0])
        self.tokens = 0  # in the LLM's sequence, of one image

    def __call__(self, paths: Sequence[Path]) -> torch.Tensor | None:
        batches = [paths[i : i + BATCH] for i in range(0, len(paths), BATCH)]
        parts = []
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(self.pixels, batches[0])
            for number in range(len(batches)):
                pixels = ahead.result()
                if number + 1 < len(batches):
                    ahead = pool.submit(self.pixels, batches[number + 1])
                if pixels is not None:
                    parts.append(self.features(pixels))
        return torch.cat(parts) if parts else None

    def pixels(self, paths: Sequence[Path]) -> torch.Tensor | None:
        """As `data.Collator` makes them: [n, 3, h, w] float32."""
        opened = []
        for path in paths:
            try:
                opened.append(open_image(path, self.wanted[path]))
            except InputError:
                if not self.skip:
                    raise
                self.broken.add(path)
        if not opened:
            return None
        return self.processor(images=opened, return_tensors="pt")["pixel_values"].float()  # type: ignore[no-any-return]

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Of pixels [n, 3, h, w].

        Raises:
            InputError: where the connector's output is not what the model goes on with.
        """
        seen: list[Any] = []  # what the connector is given, and makes of it
        hook = self.connector.register_forward_hook(lambda module, args, output: seen.append((*args, output)))
        weight = next(self.tower.parameters())
        try:
            with torch.no_grad(), frozen(self.tower):
                out = self.reader.get_image_features(pixel_values=pixels.to(weight.device, weight.dtype))
        finally:
            hook.remove()
        answers = list(out.pooler_output)
        given, output = seen[0] if [len(call) for call in seen] == [2] else (None, answers)
        same = len(output) == len(answers) and all(map(torch.equal, answers, output))
        if not isinstance(given, torch.Tensor) or len(given) != len(answers) or not same:
            raise InputError(
                "cache_features: between encoder and LLM this model has more than a connector.\n"
                "Leave cache_features off."
            )
        self.tokens = len(answers[0])
        return given.cpu()


def prepare_features(
    recipe: Recipe, mixtures: Sequence[HasImages], *, quiet: bool = False, skip: bool = False
) -> Prepared | None:
    """The images that the stages with `cache_features` show (one mixture per stage), and what of them is stored.

    None where no such stage has images. Reads every image file once, for its SHA-256.

    Raises:
        InputError: a model folder that cannot be read; an image, unless `skip` leaves it out.
    """
    cached = [number for number, stage in enumerate(recipe.stages) if stage.cache_features]
    wanted = {path: where for number in cached for path, where in mixtures[number].images()}
    if not wanted:
        return None
    prepared = prepare_images(recipe.model, wanted, quiet=quiet, skip=skip)
    live = any(mixture.has_images for mixture, s in zip(mixtures, recipe.stages, strict=True) if not s.cache_features)
    return replace(prepared, stages=tuple(recipe.stages[: cached[-1] + 1]), known=None if live else prepared.known)


def prepare_images(
    recipe: ModelRecipe, wanted: dict[Path, str], *, quiet: bool = False, skip: bool = False
) -> Prepared:
    """These images (each with what names it), and what of them the store of the recipe's encoder has.

    Raises:
        InputError: as `prepare_features`.
    """
    facts = identity(recipe)
    store = Store(cache_folder() / "features" / identity_key(facts))
    store.recognize(wanted, quiet, skip)
    missing = any(key not in store for key in store.contents(wanted))
    probed = None if missing else store.facts.get("probed")
    return Prepared(store, facts, wanted, (), None if probed is None else Features(**probed), skip)


def fill_store(
    recipe: ModelRecipe,
    model: nn.Module,
    processor: Any,
    wanted: dict[Path, str],
    *,
    quiet: bool = False,
    skip: bool = False,
) -> Store | None:
    """The store of the recipe's encoder, with features of all images `wanted`; `model` encodes what is missing.

    Args:
        recipe: what `model` was built from; a training from it with `cache_features` has the same store.
        wanted: image file -> what names it, for messages.
        skip: leave out images that cannot be opened.

    Returns:
        None, and nothing is read or written, where stored features cannot stand for images (see `can_store`).

    Raises:
        InputError, JobError: as `Prepared.fill`.
    """
    if not can_store(model):
        return None
    prepared = prepare_images(recipe, wanted, quiet=quiet, skip=skip)
    prepared.fill(model, processor, quiet=quiet)
    return prepared.store


def has_connector(model: nn.Module) -> bool:
    """Whether the model has one vision encoder and one connector: else there is nothing to keep between them."""
    found = tuning(model).anatomy
    return image_reader(unwrapped(model), found) is not None and len(found.connector) == 1


def can_store(model: nn.Module) -> bool:
    """Whether features of the recipe's own encoder are this model's: it has one connector, and nothing in its encoder
    is trainable, was trained or came with an adapter."""
    state = tuning(model)
    inside = tuple(f"{name}." for name in state.anatomy.vision)
    return has_connector(model) and not any(name.startswith(inside) for name in state.tuned)
