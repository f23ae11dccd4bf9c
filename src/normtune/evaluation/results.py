"""The document of an evaluation: scores, and all that one has to know to get them again.

Scope: identity of model and adapter, hashes of the benchmarks' files, prompts, generation settings, the paired
difference from another result. Not here: asking (`__init__`), the formats of predictions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from normtune.chat import Chat
from normtune.errors import InputError
from normtune.evaluation.answering import CHOICES, stop_tokens
from normtune.evaluation.engines import engine_for
from normtune.evaluation.journal import Given, read_answers
from normtune.evaluation.questions import Asked, Settings
from normtune.features import Store
from normtune.runlog import file_hash, provenance, read_json
from normtune.tasks import Measured, Rules

FORMAT = 1
SAMPLED = 4096  # values of a tensor that its fingerprint looks at
_LISTED = 20  # files of a benchmark that are listed one by one
_SUFFIXES = (".json", ".jsonl", ".txt", ".token", ".parquet")


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names, dtypes and shapes of all parameters and of up to SAMPLED evenly spaced values of each: the
    same for the same weights wherever they were loaded from, cheap at any size, another one after any training."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // SAMPLED)].contiguous().cpu()
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def preprocessing(processor: ProcessorMixin) -> dict[str, Any]:
    """What makes pixels of an image and tokens of a text: SHA-256 of the processor's settings with those of its image
    processor, and of the tokenizer without what calls leave in it (padding, truncation)."""
    settings = json.loads(json.dumps(processor.to_dict(), default=lambda value: type(value).__name__))
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    kept = {key: value for key, value in tokenizer.items() if key not in ("padding", "truncation")}
    return {
        "processor_sha256": _sha256_of(settings),
        "tokenizer_sha256": _sha256_of(kept),
        "vocabulary": len(processor.tokenizer),
    }


def _sha256_of(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def lengths(settings: Settings, asked: Sequence[Asked]) -> dict[str, Any]:
    """How long answers may get, where they are generated."""
    if settings.mode == "likelihood":
        return {}
    return {"max_new_tokens": {one.name: one.task.max_new_tokens for one in asked}}


def conditions(
    model: PreTrainedModel, processor: ProcessorMixin, settings: Settings, asked: Sequence[Asked]
) -> dict[str, Any]:
    """What the answers depend on: two evaluations that agree here have the same answers, but for the batches."""
    return {
        **settings.to_dict(),
        "model": fingerprint(model),
        "chat_template": hashlib.sha256(Chat.from_processor(processor).template.encode()).hexdigest(),
        "preprocessing": preprocessing(processor),
        "questions": {one.name: one.fingerprint() for one in asked},
        **lengths(settings, asked),
    }


def describe(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    settings: Settings,
    asked: Sequence[Asked],
    data: Path,
    store: Store | None = None,
) -> dict[str, Any]:
    """Model, prompts, generation, files, versions and hardware of a result."""
    chat = Chat.from_processor(processor)
    engine = engine_for(model, processor, chat, store)
    device = next(model.parameters()).device
    return {
        "settings": settings.to_dict(),
        "model": {
            "architecture": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(model.dtype).removeprefix("torch."),
            "fingerprint": fingerprint(model),
        },
        "preprocessing": preprocessing(processor),
        "prompts": {one.name: engine.text(one[0]) for one in asked if len(one)},
        "generation": {
            "method": "greedy, KV cache" if settings.mode == "generate" else f"log P of {' and '.join(CHOICES)}",
            **lengths(settings, asked),
            "stop_tokens": processor.tokenizer.convert_ids_to_tokens(stop_tokens(model, chat)),
            "chat_template_sha256": hashlib.sha256(chat.template.encode()).hexdigest(),
            "stored_features": None if engine.store is None else engine.store.folder.name,
        },
        "data": {
            one.name: {"files": file_hashes(data, one.name), "questions_sha256": one.fingerprint()} for one in asked
        },
        **provenance(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
    }


def file_hashes(data: Path, name: str) -> dict[str, str]:
    """SHA-256 of the benchmark's files (not of its images) by their paths below `data`; of many files in one."""
    files = sorted(path for path in (data / name).rglob("*") if path.suffix in _SUFFIXES and path.is_file())
    found = {path.relative_to(data).as_posix(): file_hash(path) for path in files}
    if len(found) <= _LISTED:
        return found
    together = hashlib.sha256("".join(f"{path} {digest}\n" for path, digest in found.items()).encode())
    return {f"{name}: {len(found)} files": together.hexdigest()}


def scores_of(asked: Asked, given: Given, measured: Measured, settings: Settings) -> dict[str, Any]:
    """The figures of a benchmark with intervals, and which answers hung on less than the last bits of a logit."""
    return {
        **measured.with_intervals(),
        "n": len(asked),
        "baseline": settings.baseline,
        "ties": {"count": len(given.ties), "ids": [asked.items[place].id for place in sorted(given.ties)[:_LISTED]]},
    }


def read_measured(path: Path, asked: Sequence[Asked], rules: Rules = "official") -> dict[str, Measured]:
    """What a result on disk (the file that `evaluate_into` wrote, with its folder of answers beside it) comes to on
    the questions `asked`, by benchmark, its answers read by `rules`; without benchmarks that it lacks.

    InputError where it is no result, has none of the benchmarks, or answers to other questions."""
    document = read_json(path, "result")
    folder = document.get("predictions") if isinstance(document, dict) else None
    if not isinstance(folder, str):
        raise InputError(f"{path} is no result of `normtune evaluate`.\nGive the JSON file of one.")
    answers = read_answers(path.parent / folder)
    found: dict[str, Measured] = {}
    for one in asked:
        if one.name not in answers:
            continue
        own = answers[one.name]
        missing = [item.id for item in one.items if item.id not in own]
        if missing or len(own) != len(one):
            what = f"no answer to '{missing[0]}'" if missing else f"{len(own)} answers for {len(one)} questions"
            raise InputError(
                f"{path}: {one.name}: {what}, so the two are not about the same questions.\n"
                "Compare results of the same files, limit, split and seed, both of them finished."
            )
        found[one.name] = one.task.measure(one.items, [own[item.id] for item in one.items], rules)
    if not found:
        raise InputError(f"{path} has none of {', '.join(one.name for one in asked)}.\nGive another result.")
    return found


def identity(path: str, recipe: str | None, record: Mapping[str, Any] | None, adapter: Path | None) -> dict[str, Any]:
    """Where a model came from: its path, the hash of its run's recipe, and what its adapter's record says of base and
    strategy, with the hash of the adapter's file."""
    found: dict[str, Any] = {"path": path}
    if recipe is not None:
        found["recipe"] = recipe
    if record is not None:
        kept = ("strategy", "parts", "base", "recipe")
        found["adapter"] = {key: record[key] for key in kept if key in record}
        if adapter is not None:
            files = sorted(file for file in adapter.rglob("*.safetensors"))
            found["adapter"]["files"] = {file.relative_to(adapter).as_posix(): file_hash(file) for file in files}
    return found
