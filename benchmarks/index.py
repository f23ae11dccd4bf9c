"""How long the first and the second start take with a data file of LLaVA's size, and how much memory.

Run: `python -m benchmarks.index` (665,000 conversations, 1 GB each as JSON and as JSONL, in a temporary folder). Each
start is a process of its own; its memory is what it takes above the imports, at most. Prints a table and writes
`results/index.json`. Non-scope: the models' part of a start.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from normtune.runlog import forget_peak, provenance, resident, write_json

RESULTS = Path(__file__).parent / "results" / "index.json"
CONVERSATIONS, IMAGES, PER_FOLDER = 665_000, 20_000, 1000
READ = 2000  # samples read in the order of an epoch
TEXT = "a the of man dog street red holding next to image two shows standing with on table window large colour"


def conversations(number: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """As llava_v1_5_mix665k has them: several turns, 1.5 kB, most with an image, shared by some conversations."""
    draw, words = random.Random(seed), TEXT.split()
    for n in range(number):
        turns = []
        for turn in range(draw.choice((1, 2, 4, 5))):
            question = " ".join(draw.choices(words, k=12)) + "?"
            turns.append({"from": "human", "value": f"<image>\n{question}" if turn == 0 and n % 17 else question})
            turns.append({"from": "gpt", "value": " ".join(draw.choices(words, k=draw.randrange(10, 125))) + "."})
        image = n * 7919 % IMAGES
        shown = {"image": name_of(image)} if n % 17 else {}
        yield {"id": f"{n:012d}", **shown, "conversations": turns}


def name_of(image: int) -> str:
    return f"{image // PER_FOLDER:02d}/{image:08d}.jpg"


def write(folder: Path, number: int) -> list[Path]:
    """The images folder and the two files."""
    for image in range(IMAGES):
        path = folder / "images" / name_of(image)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\xff\xd8")  # nothing opens it here
    paths = [folder / "mix.json", folder / "mix.jsonl"]
    with paths[0].open("w") as listed, paths[1].open("w") as lines:
        for n, item in enumerate(conversations(number)):
            text = json.dumps(item)
            listed.write((",\n" if n else "[\n") + text)
            lines.write(text + "\n")
        listed.write("\n]\n")
    return paths


def start(path: Path) -> dict[str, Any]:
    """What a training does with the file before its first step, and READ samples of its first epoch."""
    from normtune.data import Mixture
    from normtune.recipe import DataSource

    forget_peak()
    before, began = resident("VmRSS"), time.monotonic()
    mixture = Mixture([DataSource(path=str(path), images=str(path.parent / "images"))])
    ready = time.monotonic()
    order = mixture.order(0, 0)
    ordered = time.monotonic()
    checked = sum(len(mixture[place].turns) for place in order[:READ])
    read = time.monotonic()
    return {
        "samples": len(mixture),
        "seconds": round(ready - began, 3),
        "order_seconds": round(ordered - ready, 2),
        "microseconds_per_sample": round((read - ordered) / min(READ, len(order)) * 1e6),
        "megabytes": round((resident("VmHWM") - before) / 1e6),
        "turns": checked,
    }


def measure(number: int) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {**os.environ, "NORMTUNE_CACHE": str(folder / "cache")}
        for path in write(folder, number):
            for which in ("first", "second"):
                command = [sys.executable, "-m", "benchmarks.index", "--start", str(path)]
                out = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
                row = {"file": path.suffix[1:], "bytes": path.stat().st_size, "start": which, **json.loads(out)}
                rows.append(row)
                print(
                    f"{row['file']:6} {row['bytes'] / 1e9:5.2f} GB  {which:7} {row['seconds']:7.2f} s  "
                    f"{row['megabytes']:5} MB  {row['microseconds_per_sample']:5} us per sample",
                    flush=True,
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conversations", type=int, default=CONVERSATIONS)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the figures go")
    given = parser.parse_args()
    if given.start is not None:
        print(json.dumps(start(given.start)))
        return
    write_json(given.json, {"rows": measure(given.conversations), "provenance": provenance()})


if __name__ == "__main__":
    main()
