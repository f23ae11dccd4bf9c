"""The README of an exported model folder: a model card as the Hugging Face hub reads them.

What the model is, what it was made of, how it was tuned and on which kinds of data, its scores with intervals, what
rounding left of the tuning, how to load it. Facts only, from the adapter's record, the recipe and the evaluations of
the run; names of local folders, never their paths. Not here: the folder (model.save).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from normtune.adapter import Survival
from normtune.errors import InputError
from normtune.recipe import ModelRecipe, Recipe, Stage, recipe_hash
from normtune.reporting.numbers import human_count
from normtune.runlog import read_json

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
LOADING = """```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("FOLDER")
processor = AutoProcessor.from_pretrained("FOLDER")
image = Image.open("image.jpg").convert("RGB")
content = [{"type": "image", "image": image}, {"type": "text", "text": "What is in the image?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1]:]
print(processor.decode(ids, skip_special_tokens=True))
```"""


def model_card(
    title: str,
    model: ModelRecipe | None,
    record: Mapping[str, Any] | None,
    recipe: Recipe | None,
    survival: Survival,
    total: int,
    dtype: str,
    evaluations: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The card as Markdown.

    Args:
        title: name of the model.
        model: what it was assembled from, where that is known.
        record: `adapter.json`; recipe: of the run, where there is one.
        survival: of the merge; total: parameters of the model; dtype: of the written weights.
        evaluations: results of `normtune evaluate` (see `read_evaluations`).
    """
    record = record or {}
    blocks = [
        front_matter(model),
        f"# {title}",
        "A text LLM that was taught to see by tuning the gains of its normalization layers (and what is named below), "
        "with normtune. The tuning is folded into the weights: the folder loads "
        "with transformers alone.",
        "## Made of\n\n" + bullets(made_of(model)),
        "## Tuning\n\n" + bullets(tuning_facts(record, recipe, total)),
    ]
    if recipe is not None:
        blocks.append("| stage | trained | learning rate | data |\n|---|---|---|---|\n" + stage_rows(recipe.stages))
    blocks += [
        f"## Rounding\n\nWeights are {dtype}. What merging left of the tuning: {survival}.",
        "## Scores\n\n" + scores(evaluations),
        "## Loading\n\n" + LOADING,
        "## Licences\n\nThe licences of the base LLM, of the vision encoder and of the training data hold for this "
        "model, too: look them up before you pass it on, and state them in `license` above.",
    ]
    return "\n\n".join(blocks) + "\n"


def read_evaluations(folder: Path, files: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """The results in a folder, by name; files of other kinds are left out, and so are results of another adapter.

    Args:
        files: SHA-256 of the adapter's files by their names, as a result states them; None: of any.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            document = read_json(path, "result")
        except InputError:
            continue
        if not (isinstance(document, dict) and isinstance(document.get("scores"), dict)):
            continue
        stated: Any = document
        for key in ("model", "adapter", "files"):
            stated = stated.get(key) if isinstance(stated, Mapping) else None
        if files is None or stated is None or stated == files:
            found.append({"name": path.stem, **document})
    return found


def front_matter(model: ModelRecipe | None) -> str:
    parts = [] if model is None else [p for p in (model.path, model.llm, model.vision) if p is not None]
    facts: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    hub = [part for part in parts if is_hub_id(part)]
    if hub:
        facts["base_model"] = hub
    facts["tags"] = ["normtune", "llava", "norm-tuning"]
    return "---\n" + yaml.safe_dump(facts, sort_keys=False).strip() + "\n---"


def is_hub_id(reference: str) -> bool:
    return HUB_ID.fullmatch(reference) is not None and not Path(reference).exists()


def named(reference: str) -> str:
    """A hub id or `world:` name as it is, of a local folder the name alone."""
    return reference if is_hub_id(reference) or reference.startswith("world:") else Path(reference).name


def made_of(model: ModelRecipe | None) -> list[str]:
    if model is None:
        return ["a multimodal LLM; its adapter does not say which"]
    if model.path is not None:
        return [f"base: {named(model.path)}"]
    return [
        f"LLM: {named(model.llm or '')}",
        f"vision encoder: {named(model.vision or '')} (frozen unless named below)",
        f"connector: {model.connector}",
    ]


def tuning_facts(record: Mapping[str, Any], recipe: Recipe | None, total: int) -> list[str]:
    strategy = record.get("strategy") or "unknown"
    facts = [f"strategy: {strategy} (trained: {', '.join(record.get('parts') or []) or 'nothing'})"]
    number = record.get("parameters")
    if number:
        facts.append(f"tuned values: {human_count(number)} of {human_count(total)} ({number / total:.3%})")
    if record.get("lora"):
        facts.append(f"LoRA: rank {record['lora'].get('rank')}, folded in")
    how = record.get("made")
    if isinstance(how, Mapping):
        facts.append(f"made of other adapters: {how.get('how')}")
    if record.get("gate") == "image":
        facts.append("the tuning was meant for requests with an image; folded in, it holds for text as well")
    if recipe is not None:
        facts.append(f"recipe: {recipe.name}, seed {recipe.seed}, SHA-256 {recipe_hash(recipe)[:16]}")
    return facts


def stage_rows(stages: Iterable[Stage]) -> str:
    rows = []
    for stage in stages:
        trained = stage.strategy if isinstance(stage.strategy, str) else " + ".join(stage.strategy)
        data = ", ".join(source.kind or Path(source.path).name for source in stage.data)
        named_data = data.replace("|", "\\|")
        rows.append(f"| {stage.name} | {trained} | {stage.learning_rate:g} | {named_data} |")
    return "\n".join(rows)


def scores(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """A table of every benchmark's score with its 95 % interval."""
    rows = []
    for document in evaluations:
        for benchmark, facts in document["scores"].items():
            if not isinstance(facts, Mapping):
                continue
            value, span = facts.get("score"), (facts.get("intervals") or {}).get("score")
            if isinstance(value, int | float):
                interval = f"{span[0]:.3f} to {span[1]:.3f}" if span and None not in span else ""
                shown = "" if facts.get("baseline", "none") == "none" else f" ({facts['baseline']})"
                rows.append(f"| {benchmark}{shown} | {value:.3f} | {interval} | {facts.get('n', '')} |")
    if not rows:
        return "None were measured (`normtune evaluate RUN` writes them where the next export finds them)."
    head = "| benchmark | score | 95 % interval | items |\n|---|---|---|---|\n"
    return head + "\n".join(dict.fromkeys(rows)) + "\n\nMeasured before merging, in the dtype of training."


def bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
