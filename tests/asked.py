"""The benchmarks in their official layouts with a few noisy pictures: small enough for models of two layers."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

from PIL import Image

IMAGES = 4


def picture(number: int) -> Image.Image:
    """A noisy picture that no other number gives."""
    noise = random.Random(number).randbytes(40 * 40 * 3)
    return Image.frombytes("RGB", (40, 40), noise)


def write_benchmarks(root: Path) -> Path:
    """All benchmarks in their official layouts; no two questions have the same text."""
    for folder in ("val2014", "pope", "mme/existence", "mme/count", "vqav2", "coco", "text"):
        (root / folder).mkdir(parents=True)
    (root / "flickr30k" / "flickr30k-images").mkdir(parents=True)
    names = [f"COCO_val2014_{n:012d}.jpg" for n in range(IMAGES)]
    for n, name in enumerate(names):
        picture(n).save(root / "val2014" / name)
        picture(100 + n).save(root / "flickr30k" / "flickr30k-images" / f"{n}.jpg")
    number = itertools.count(1)

    def lines(records: list[dict[str, Any]]) -> str:
        return "".join(json.dumps(record) + "\n" for record in records)

    for split in ("random", "popular", "adversarial"):
        records = [
            {
                "question_id": k,
                "image": names[k // 2 % IMAGES],
                "text": f"Is thing {next(number)} there" + " now" * (k % 3) + "?",
                "label": "yes" if k % 2 else "no",
            }
            for k in range(2 * IMAGES)
        ]
        (root / "pope" / f"coco_pope_{split}.json").write_text(lines(records))
    for subtask, n in itertools.product(("existence", "count"), range(2)):
        # image 0 is the same photograph in both subtasks
        picture(200 + n if n == 0 or subtask == "count" else 300).save(root / "mme" / subtask / f"{n}.png")
        pair = [f"Is thing {next(number)} there? Please answer yes or no.\t{x}\n" for x in ("Yes", "No")]
        (root / "mme" / subtask / f"{n}.txt").write_text("".join(pair))
    questions, annotations = [], []
    for k in range(2 * IMAGES):
        questions.append({"question_id": k, "image_id": k % IMAGES, "question": f"What is thing {next(number)}?"})
        human = [{"answer": ("red", "blue")[k % 2], "answer_id": a} for a in range(10)]
        annotations.append({"question_id": k, "question_type": "what is", "answer_type": "other", "answers": human})
    vqa = root / "vqav2"
    (vqa / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": questions}))
    (vqa / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": annotations}))
    coco = {
        "images": [{"id": n, "file_name": name} for n, name in enumerate(names)],
        "annotations": [{"image_id": n, "caption": "A red shape."} for n in range(IMAGES)],
    }
    (root / "coco" / "captions_val2014.json").write_text(json.dumps(coco))
    flickr = [{"split": "test", "filename": f"{n}.jpg", "sentences": [{"raw": "A red shape ."}]} for n in range(IMAGES)]
    (root / "flickr30k" / "dataset_flickr30k.json").write_text(json.dumps({"images": flickr}))
    texts = [{"question_id": k, "text": f"Say thing {next(number)}.", "answer": "red"} for k in range(5)]
    (root / "text" / "questions.jsonl").write_text(lines(texts))
    return root
