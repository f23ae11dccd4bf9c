"""Reading pretrained folders: where they are, whether they are whole, and one clear error when they are not.

Scope: resolve "path or hub id", check JSON files and weight files of a local folder before transformers reads
them, whose code may run, translate whatever transformers raises. Non-scope: what is in the models (`model.py`,
`encoders.py`).
Source: the file layout that `save_pretrained` of transformers writes; the safetensors header format.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants as hub_constants
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from normtune.errors import InputError, JobError
from normtune.structure import dissect

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "nf4": torch.bfloat16, "int8": torch.bfloat16}
"""Name in a recipe -> dtype of activations and of every weight that is not quantized."""
QUANTIZED: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}

_TRUSTED: ContextVar[frozenset[str]] = ContextVar("trusted", default=frozenset())

_JSON_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
)
_WHOLE, _SHARDED = "model.safetensors", "model.safetensors.index.json"


@contextmanager
def trusting(references: Iterable[str]) -> Iterator[None]:
    """Within, what is loaded from these models (folders or hub ids, as a recipe names them) may run their own code."""
    before = _TRUSTED.set(frozenset(_source(reference) for reference in references))
    try:
        yield
    finally:
        _TRUSTED.reset(before)


def trusted(source: str) -> dict[str, Any]:
    """Options of every `from_pretrained`: whether the code at `source` (from `locate`) may run. transformers never asks
    the person at the terminal; outside of `trusting` nothing runs."""
    return {"trust_remote_code": source in _TRUSTED.get()}


def checked(source: str) -> dict[str, Any]:
    """Options of a model's `from_pretrained`: no pickle, and an answer from which `check_complete` names what does not
    fit."""
    return {**trusted(source), "use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of frozen weights by its name in a recipe (for `nf4` and `int8`, of those that stay unquantized).

    Raises InputError for any other name, and where bitsandbytes is needed and missing.
    """
    if name == "float16":
        raise InputError(
            "dtype 'float16' is not available: beyond 65504 its activations overflow, and its gradients need a scaled "
            "loss.\nChoose bfloat16 (as small, and every float32 fits), float32, nf4 or int8."
        )
    if name not in DTYPES:
        raise InputError(f"dtype {name!r} is not available.\nChoose one of: {', '.join(DTYPES)}.")
    if name in QUANTIZED and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"dtype {name!r} needs bitsandbytes, which is missing.\nRun: pip install 'normtune[quant]'")
    return DTYPES[name]


def weights_in(name: str, config: Any, kind: Any) -> dict[str, Any]:
    """Options of `kind.from_pretrained` for weights in dtype `name`: what is quantized are the LLM's block linears."""
    options: dict[str, Any] = {"dtype": torch_dtype(name)}
    if name in QUANTIZED:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # int8 warns in every layer of every step
        with torch.device("meta"):
            empty = kind.from_config(copy.deepcopy(config), **trusted(config.name_or_path))
        inside = set(dissect(empty).linears)
        others = [n for n, m in empty.named_modules() if isinstance(m, nn.Linear) and n not in inside]
        skipped = [re.escape(n) for n in others]  # transformers reads them as patterns
        options["quantization_config"] = BitsAndBytesConfig(**QUANTIZED[name], llm_int8_skip_modules=skipped)
        options["device_map"] = {"": "cpu"}
    return options


def locate(reference: str | os.PathLike[str], what: str, weights: bool = True) -> str:
    """Turn "path or hub id" into what transformers' `from_pretrained` takes.

    A local folder is checked first (JSON files, weight files), so that its faults are named. A string that is
    no folder and can only be meant as one is an InputError here, never a confusing answer from the hub.
    `what` names the reference in messages, for example "LLM". Without `weights` a config is enough.
    """
    text = os.fspath(reference)
    if not text:
        raise InputError(f"{what}: the path is empty.\nGive a model folder or a hub id.")
    path = Path(text).expanduser()
    if path.is_dir():
        _check_folder(path, what, weights)
        return _source(text)
    if path.exists():
        raise InputError(f"{what} {text} is a file, not a model folder.\nGive the folder that holds config.json.")
    looks_local = text.startswith((".", "/", "~", "\\")) or text.count("/") > 1 or text.endswith("/")
    if looks_local or path.is_absolute():
        raise InputError(f"{what} folder {text} does not exist.\nCheck the path (relative to {Path.cwd()}).")
    return text


def _source(reference: str) -> str:
    """What stands for a model wherever it is loaded: its folder, or the hub id as it is."""
    path = Path(reference).expanduser()
    return str(path) if path.is_dir() else reference


def read_config(source: str, what: str) -> Any:
    """The configuration at `source` (from `locate`) as a transformers config object."""
    with reading(what, source):
        config = AutoConfig.from_pretrained(source, **trusted(source))
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{what} {source} is quantized already.\nGive the folder with the unquantized weights.")
    return config


@contextmanager
def reading(what: str, source: str) -> Iterator[None]:
    """Translate every failure of a transformers loader within into an InputError of at most three lines.

    Not being able to get the memory is a JobError. transformers' own report of unused weights (the text tower
    of CLIP) is kept quiet: missing ones are an error that `check_complete` raises.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except (InputError, JobError):
        raise
    except MemoryError as error:
        raise JobError(f"{what} {source}: not enough memory to load it.") from error
    except Exception as error:
        reason = _first_line(error)
        if "can't allocate memory" in reason or isinstance(error, torch.OutOfMemoryError):
            raise JobError(f"{what} {source}: not enough memory to load it.\n{reason}") from error
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{what} {source} comes with custom code, which is not run unless the recipe says so by name.\n"
                f"Read that code; if you trust it, set model.trust_remote_code: [{source}]"
            ) from error
        if not Path(source).is_dir() and isinstance(error, OSError):
            network = "this machine is offline and it is not in the cache" if hub_constants.HF_HUB_OFFLINE else reason
            raise InputError(
                f"{what} {source!r}: no such folder here, and not available from the hub ({network}).\n"
                "Give the path of a model folder, or a hub id that can be reached."
            ) from error
        raise InputError(
            f"{what} {source} cannot be loaded: {reason}\n"
            "Check that the folder holds an unmodified, complete model that this transformers version knows."
        ) from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def check_complete(info: dict[str, Any], what: str, source: str) -> None:
    """Raise InputError if `from_pretrained(..., **checked(source))` had to make up any weight."""
    mismatched = (key if isinstance(key, str) else key[0] for key in info.get("mismatched_keys", ()))
    if missing := sorted([*info.get("missing_keys", ()), *mismatched]):
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise InputError(
            f"{what} {source}: {len(missing)} weights are missing or of another shape ({names}).\n"
            "The weight files do not belong to its config.json, or are incomplete; copy or download them again."
        )


def _check_folder(folder: Path, what: str, weights: bool) -> None:
    """Name the file that is missing, not JSON, or cut short."""
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{what} folder {folder} has no config.json.\nGive a folder in Hugging Face format, as save_pretrained "
            "writes it."
        )
    for name in _JSON_FILES:
        if (folder / name).is_file():
            _read_json(folder / name, what)
    if not weights:
        return
    if (folder / _SHARDED).is_file():
        shards = _read_json(folder / _SHARDED, what).get("weight_map")
        names = list(shards.values()) if isinstance(shards, dict) else []
        if not names or not all(isinstance(name, str) and name == os.path.basename(name) for name in names):
            raise InputError(
                f"{what}: {folder / _SHARDED} has no table 'weight_map' of file names.\nCopy or download it again."
            )
        for shard in sorted(set(names)):
            _check_weights(folder / shard, what)
        return
    if (folder / _WHOLE).is_file():
        return _check_weights(folder / _WHOLE, what)
    if any(folder.glob("pytorch_model*.bin*")):
        raise InputError(
            f"{what} folder {folder} has its weights in pickles (pytorch_model.bin), which may run any code.\n"
            "If you trust them, convert them: load the model with transformers and save_pretrained it to a new folder."
        )
    raise InputError(
        f"{what} folder {folder} has no weights (model.safetensors or model.safetensors.index.json).\n"
        "Copy or download the weight files as well."
    )


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{what}: {path} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}.\n"
            "Correct the file, or copy or download it again."
        ) from None
    except (ValueError, RecursionError, OSError) as error:  # no UTF-8, numbers of thousands of digits, endless nesting
        raise InputError(f"{what}: {path} cannot be read: {error}.\nCopy or download it again.") from None
    if not isinstance(content, dict):
        raise InputError(f"{what}: {path} holds a {type(content).__name__}, not a JSON object.\nDownload it again.")
    return content


def _check_weights(path: Path, what: str) -> None:
    """Is the file there, and as long as its header says? Reads the header only."""
    if not path.is_file():
        raise InputError(f"{what}: weight file {path} is missing.\nCopy or download it as well.")
    with path.open("rb") as file:
        start = file.read(32)
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{what}: {path} is a Git LFS pointer, not the weights.\nRun `git lfs pull` there.")
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{what}: weight file {path} is truncated or damaged ({_first_line(error)}).\nCopy or download it again."
        ) from None


def _first_line(error: BaseException) -> str:
    """What an error's message says first: one line, one sentence, at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text.partition(". ")[0][:300]
