"""The embedded world: rendered scenes, a text LLM, two vision encoders, training and evaluation files, all offline.

`path` finds the shipped weights, `ensure` writes the files once into a cache folder, `resolve` puts real paths where
a recipe says `world:...`. Not here: how the weights are made (`python -m normtune.world.build`), what the files hold
(`files`). Imports no torch.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

from normtune.errors import InputError, did_you_mean
from normtune.recipe import Recipe

PREFIX = "world:"
ASSETS = ("llm", "vision", "vision2")
DATA = (
    *("train/align.json", "train/conversation.json", "train/detail.json", "train/reasoning.json", "train/images"),
    *("eval", "eval-dev"),
)
_SOURCES = ("scenes.py", "text.py", "phrases.py", "files.py")  # what the files' bytes depend on


def path(name: str) -> Path:
    """The shipped model folder `llm`, `vision` or `vision2`.

    Raises:
        InputError: another name, or weights that are not in this installation.
    """
    if name not in ASSETS:
        raise InputError(f"the world has no model {name!r}{did_you_mean(name, ASSETS)}; it has {', '.join(ASSETS)}")
    folder = Path(__file__).parent / "assets" / name
    if not (folder / "config.json").is_file():
        raise InputError(
            f"the world's {name} is not in {folder.parent}\nInstall normtune again, or make it: "
            "python -m normtune.world.build --out DIR"
        )
    return folder


def ensure(folder: str | os.PathLike[str] | None = None) -> Path:
    """The folder with the world's training and evaluation files, written on first use (about 5 s).

    Args:
        folder: where to keep it (default: `$NORMTUNE_CACHE`, else `$XDG_CACHE_HOME/normtune`, else
            `~/.cache/normtune`); the files lie in its subfolder `world-HASH`, where HASH stands for what wrote them.

    Raises:
        InputError: the folder cannot be written. JobError: the disk is full.
    """
    from normtune.world import files

    home = Path(folder) if folder is not None else cache()
    target = home / f"world-{version()}"
    if not (target / files.MARK).is_file():
        files.write(target)
    return target


def cache() -> Path:
    """The default folder for what normtune can write again at any time."""
    named, shared = os.environ.get("NORMTUNE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named).expanduser()
    return Path(shared).expanduser() / "normtune" if shared else Path("~/.cache/normtune").expanduser()


@functools.cache
def version() -> str:
    """Twelve hexadecimal digits that change with the sources (and so the sizes) of the files."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()[:12]


def resolve(recipe: Recipe) -> Recipe:
    """The recipe with every `world:NAME` among its paths replaced; writes the files if one of them is named.

    Raises:
        InputError: a name that the world does not have, with the field; see also `path` and `ensure`.
    """
    data = recipe.model_dump(mode="json")
    for key in ("llm", "vision", "path"):
        _replace(data["model"], key, "model", ASSETS)
    for number, stage in enumerate(data["stages"]):
        for place, source in enumerate(stage["data"]):
            for key in ("path", "images"):
                _replace(source, key, f"stages.{number}.data.{place}", DATA)
    if data["evaluate"] is not None:
        for key in ("data", "dev"):
            _replace(data["evaluate"], key, "evaluate", DATA)
    return Recipe.model_validate(data)


def resolve_path(text: str) -> str:
    """The real path of a `world:NAME`, any of its names; any other text as it is.

    Raises:
        InputError: a name that the world does not have; see also `path` and `ensure`.
    """
    return _real(text, "", (*ASSETS, *DATA))


def _replace(node: dict[str, Any], key: str, where: str, known: tuple[str, ...]) -> None:
    """Puts the real path in the place of a `world:` name, in place."""
    if node.get(key) is not None:
        node[key] = _real(node[key], f"{where}.{key}: ", known)


def _real(text: str, where: str, known: tuple[str, ...]) -> str:
    """As `resolve_path`, for the names `known`; `where` begins an error's message."""
    if not text.startswith(PREFIX):
        return text
    name = text.removeprefix(PREFIX).rstrip("/")
    if name not in known:
        names = ", ".join(PREFIX + other for other in known)
        raise InputError(f"{where}the embedded world has no {text!r}{did_you_mean(name, known)}\nThere are {names}.")
    return str(path(name) if name in ASSETS else ensure() / name)
