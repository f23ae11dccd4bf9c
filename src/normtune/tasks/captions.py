"""Captioning on MSCOCO and Flickr30k: one sentence per image against several human ones, by ROUGE-L.

Scope: `coco/captions_val2014.json` in COCO's format with images in `val2014/`, and Karpathy's
`flickr30k/dataset_flickr30k.json` (split test) with images in `flickr30k/flickr30k-images/`. ROUGE-L is
coco-caption's, on tokens of our own: lower-cased, without punctuation. Not here: CIDEr and BLEU, and
coco-caption's Stanford tokenizer; they come with the caption scorers later, and figures of this module are
not to be compared with published ones. Source: tylin/coco-caption, `rouge.py`; Chen et al., arXiv 1504.00325.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normtune.errors import InputError
from normtune.tasks.items import Item, field, mean, paired, read_json, unique

PROMPT = "Provide a one-sentence caption for the provided image."
BETA = 1.2

# A word may have hyphens, apostrophes and full stops inside ("t-shirt", "man's", "5.00"), not at its ends.
_TOKEN = re.compile(r"[^\W_]+(?:[-'’.][^\W_]+)*")


def load_coco(data: Path) -> list[Item]:
    """The images of `coco/captions_val2014.json`; `answer` is the list of reference captions, one line each.
    InputError for a missing or malformed file, a caption of an unknown image, an image without a caption."""
    path = data / "coco" / "captions_val2014.json"
    content = read_json(path)
    images: dict[int | str, str] = {}
    for place, record in enumerate(field(content, "images", list, str(path))):
        where = f"{path}, image {place}"
        key = field(record, "id", (int, str), where)
        if key in images:
            raise InputError(f"{where}: id {key} occurs twice.\nRemove one of the two entries.")
        images[key] = field(record, "file_name", str, where)
    captions: dict[int | str, list[str]] = {key: [] for key in images}
    for place, record in enumerate(field(content, "annotations", list, str(path))):
        where = f"{path}, annotation {place}"
        key = field(record, "image_id", (int, str), where)
        if key not in captions:
            raise InputError(f"{where}: image_id {key} is not among the images.\nAdd the image or remove the caption.")
        captions[key].append(_one_line(field(record, "caption", str, where)))
    for key, references in captions.items():
        if not references:
            raise InputError(f"{path}: image {key} has no caption.\nAdd one or remove the image.")
    items = [Item(str(key), data / "val2014" / name, PROMPT, captions[key]) for key, name in images.items()]
    return unique(items, path)


def load_flickr30k(data: Path) -> list[Item]:
    """The test images (1,000 in the original) of Karpathy's `flickr30k/dataset_flickr30k.json`; `answer` is
    the list of raw reference captions. InputError for a missing or malformed file or an empty split."""
    path = data / "flickr30k" / "dataset_flickr30k.json"
    items = []
    for place, record in enumerate(field(read_json(path), "images", list, str(path))):
        where = f"{path}, image {place}"
        if field(record, "split", str, where) != "test":
            continue
        name = field(record, "filename", str, where)
        sentences = field(record, "sentences", list, f"{where} ({name})")
        references = [_one_line(field(s, "raw", str, f"{where} ({name})")) for s in sentences]
        if not references:
            raise InputError(f"{where} ({name}): no sentences.\nAdd a caption or remove the image.")
        items.append(Item(name, data / "flickr30k" / "flickr30k-images" / name, PROMPT, references))
    if not items:
        raise InputError(f"{path}: no image of split 'test'.\nUse Karpathy's file, unchanged.")
    return unique(items, path)


def _one_line(caption: str) -> str:
    # 83 captions of MSCOCO hold line breaks
    return " ".join(caption.split())


def tokens(caption: str) -> list[str]:
    """Lower-cased words without punctuation."""
    return _TOKEN.findall(caption.lower())


def rouge_l(candidate: str, references: Sequence[str]) -> float:
    """coco-caption's ROUGE-L, 0 to 1: the longest common subsequence with each reference gives precision and
    recall; the maximum of each is taken on its own, then F with beta 1.2. No common word gives 0.0."""
    words = tokens(candidate)
    pairs = [(_common(words, reference), len(reference)) for reference in map(tokens, references)]
    precision = max((common / len(words) for common, _ in pairs if common), default=0.0)
    recall = max((common / length for common, length in pairs if common), default=0.0)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for place, other in enumerate(second, start=1):
            above = row[place]
            row[place] = diagonal + 1 if word == other else max(above, row[place - 1])
            diagonal = above
    return row[-1]


def score(items: Sequence[Item], answers: Sequence[str]) -> dict[str, Any]:
    """The headline `score` is `rouge_l`, the mean over images, 0 to 1; `words` is the mean length of the
    captions given. Nothing to score gives 0.0."""
    found = [(rouge_l(answer, item.answer), len(tokens(answer))) for item, answer in paired(items, answers)]
    rouge = mean([value for value, _ in found])
    return {
        "score": rouge,
        "rouge_l": rouge,
        "words": mean([length for _, length in found]),
        "rules": "coco-caption's ROUGE-L on plain lower-case tokens",
    }
