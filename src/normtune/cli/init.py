"""`normtune init`: a commented recipe for a given LLM, vision encoder and data, on stdout."""

from __future__ import annotations

import json
from pathlib import Path
from string import ascii_letters, digits
from typing import Annotated

import typer
import yaml

TEMPLATE = """\
# A recipe for normtune. Check it, then: normtune train THIS_FILE
# Any value can be changed on the command line: normtune train THIS_FILE stages.1.learning_rate=1e-4
name: {name}
seed: 0

model:
  llm: {llm}       # text LLM: folder or hub id
  vision: {vision}       # vision encoder: folder or hub id
  connector: mlp            # mlp (LLaVA-1.5) or linear (the paper's)
  dtype: {dtype}          # of the frozen weights; trained tensors are float32 in any case

stages:
  # Stage 1 trains the connector alone, so that image features look like word embeddings to the LLM.
  - name: align
    strategy: connector
    data:
{align}
    learning_rate: 1.0e-3
    batch_size: {batch}         # samples per optimizer step; micro_batch_size sets how many run at once
    epochs: 1                 # the paper: 3

  # Stage 2 trains the gains of the LLM's norms with connector, word embedding and output head (the paper's
  # `layernorm`). Others: layernorm-simple (the gains alone), lora, attn-qv, attn-mlp, full, connector,
  # or a list of parts: [norms, connector].
  - name: instruct
    strategy: layernorm
    data:
{instruct}
    learning_rate: 3.0e-4     # try 1e-4 to 1e-2: norm gains bear far higher rates than matrices
    # learning_rates: {{connector: 2.0e-5}}   # by part
    batch_size: {batch}
    epochs: 1
    max_length: 2048          # tokens per sample, image tokens included; longer samples are cut at a turn

# evaluate: {{benchmarks: [pope, mme], data: eval/}}   # for `normtune evaluate`
save_every: 10m             # checkpoint: minutes (10m) or steps (200); `--resume` goes on from the last one
"""


def init(
    llm: Annotated[str, typer.Option(help="Text LLM: folder or hub id.")],
    vision: Annotated[str, typer.Option(help="Vision encoder: folder or hub id.")],
    data: Annotated[list[Path], typer.Option(help="LLaVA JSON or JSONL to tune on; may be repeated.")],
    images: Annotated[Path | None, typer.Option(help="Folder that image names are relative to.")] = None,
    align: Annotated[
        list[Path] | None, typer.Option(help="Captions for stage 1, LLaVA format (default: --data).")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run (default: from the models).")] = None,
) -> None:
    """Write a commented recipe for your own models and data to stdout.

    Example: normtune init --llm HuggingFaceTB/SmolLM2-360M-Instruct --vision google/siglip-base-patch16-224
    --data conversation_58k.json --images coco/train2017 > recipe.yaml
    """
    from normtune.data import read_samples
    from normtune.pretrained import locate
    from normtune.recipe import DataSource, load_recipe

    locate(llm, "LLM")
    locate(vision, "vision encoder")
    counts = {}
    for path in (*(align or []), *data):
        counts[path] = len(read_samples(DataSource(path=str(path), images=str(images) if images else None)))
    smallest = min(counts.values())
    batch = next((size for size in (128, 64, 32, 16, 8, 4, 2) if size * 8 <= smallest), 1)
    text = TEMPLATE.format(
        name=quoted(name or run_name(llm, vision)),
        llm=quoted(llm),
        vision=quoted(vision),
        dtype="bfloat16" if is_large(llm) else "float32",
        align=sources(align or data, images, counts),
        instruct=sources(data, images, counts),
        batch=batch,
    )
    load_recipe(yaml.safe_load(text))  # what is printed is a recipe that loads
    print(text, end="")


def sources(paths: list[Path], images: Path | None, counts: dict[Path, int]) -> str:
    lines = []
    for path in paths:
        where = f", images: {quoted(str(images))}" if images else ""
        lines.append(f"      - {{path: {quoted(str(path))}{where}}}   # {counts[path]:,} samples")
    return "\n".join(lines)


def quoted(text: str) -> str:
    """As a YAML scalar inside a flow mapping."""
    simple = set(text) <= set(ascii_letters + digits + "/._-") and yaml.safe_load(text) == text
    return text if simple else json.dumps(text)


def run_name(llm: str, vision: str) -> str:
    names = [Path(text.rstrip("/")).name.lower() for text in (llm, vision)]
    return "-".join("".join(c if c.isalnum() or c in "._" else "-" for c in n) or "model" for n in names).strip("-._")


def is_large(llm: str) -> bool:
    """Whether bf16 is the better default: not for a local folder with under 200 MB of weights."""
    folder = Path(llm).expanduser()
    if not folder.is_dir():
        return True
    weights = sum(p.stat().st_size for pattern in ("*.safetensors", "*.bin") for p in folder.glob(pattern))
    return weights > 200e6
