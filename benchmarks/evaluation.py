"""`python -m benchmarks.evaluation`: questions per second against one-by-one `generate`, and memory by their number.

Throughput: the embedded world's tuned model on its five benchmarks, batched as `normtune evaluate` asks, beside
transformers as its users run it, a question at a time; the answers of both are compared. Scoring is in neither time.
Memory: peak resident memory of an evaluation of 200 and of 20,000 synthetic POPE questions (six per image), each in a
process of its own. Figures go to benchmarks/results/evaluation.json (or --json FILE). `--run` takes a tuned run of
recipes/world.yaml instead of training one.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.resident import in_a_process
from normtune.runlog import resident

RESULTS = Path(__file__).parent / "results" / "evaluation.json"
BENCHMARKS = ("pope", "mme", "vqav2", "coco", "flickr30k")
COUNTS = (200, 20_000)
PER_IMAGE = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the figures go")
    parser.add_argument("--run", type=Path, help="a tuned run of recipes/world.yaml")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=int, help="questions per benchmark (default: all)")
    parser.add_argument("--one-by-one", type=int, default=60, help="questions per benchmark asked one by one")
    parser.add_argument("--counts", type=int, nargs="*", default=COUNTS, help="questions whose memory is measured")
    parser.add_argument("--measure", type=Path, help="(a child process) evaluate POPE in this folder, print the peak")
    options = parser.parse_args()
    if options.measure is not None:
        print(peak_of(options.run, options.measure, options.threads))
        return
    from normtune.runlog import provenance

    with tempfile.TemporaryDirectory() as folder:
        run = options.run or tuned_world(Path(folder) / "run")
        result: dict[str, Any] = {"throughput": throughput(run, options.threads, options.one_by_one, options.limit)}
        result["memory"] = memory(run, options.counts, Path(folder), options.threads)
    result |= {"threads": options.threads, "provenance": provenance()}
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    show(result)


def tuned_world(folder: Path) -> Path:
    """The shipped recipe, trained."""
    import normtune as nt

    nt.train(Path(__file__).parents[1] / "recipes" / "world.yaml", out=folder)
    return folder


def throughput(run: Path, threads: int, sample: int, limit: int | None) -> dict[str, Any]:
    """By benchmark and over all: questions per second both ways, and how many answers differ."""
    import torch

    from normtune.evaluation import BATCH, Settings, collect
    from normtune.evaluation.journal import Given
    from normtune.evaluation.questions import ask
    from normtune.tuned import open_tuned
    from normtune.world import resolve_path

    torch.set_num_threads(threads)
    tuned = open_tuned(run)
    settings = Settings(BENCHMARKS, limit)
    asked = ask(settings, resolve_path("world:eval"))
    one_by_one(tuned, asked[0], 4)  # the first calls are slower
    collect(tuned.model, tuned.processor, settings, asked[1], Given(len(asked[1])), BATCH)
    rows: dict[str, Any] = {}
    for one in asked:
        texts, alone = one_by_one(tuned, one, sample)
        given = Given(len(one))
        began = time.perf_counter()
        collect(tuned.model, tuned.processor, settings, one, given, BATCH)
        seconds = time.perf_counter() - began
        other = [n for n, text in enumerate(texts) if text != given.texts[n]]
        rows[one.name] = {
            "questions": len(one),
            "one_by_one_per_second": round(len(texts) / alone, 1),
            "batched_per_second": round(len(one) / seconds, 1),
            "ratio": round(len(one) / seconds * alone / len(texts), 2),
            "answers_compared": len(texts),
            "answers_that_differ": len(other),
            "of_these_ties": len(set(other) & set(given.ties)),
            "ties": len(given.ties),
        }
    total = sum(row["questions"] for row in rows.values())
    keys = ("one_by_one_per_second", "batched_per_second")
    ways = [sum(row["questions"] / row[key] for row in rows.values()) for key in keys]
    rows["all"] = {"questions": total, "ratio": round(ways[0] / ways[1], 2)}
    rows["all"] |= {key: round(total / seconds, 1) for key, seconds in zip(keys, ways, strict=True)}
    return {"batch_size": BATCH, "benchmarks": rows}


def one_by_one(tuned: Any, asked: Any, count: int) -> tuple[list[str], float]:
    """The answers of plain transformers to the first `count` questions, and the seconds that they took."""
    import torch

    from normtune.images import open_image

    model, processor = tuned.model, tuned.processor
    texts: list[str] = []
    began = time.perf_counter()
    for item, image in list(zip(asked.items, asked.images, strict=True))[:count]:
        content = [{"type": "image"}, {"type": "text", "text": item.question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=text, images=[open_image(image, "")], return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=asked.task.max_new_tokens, do_sample=False)
        own = ids[0, inputs["input_ids"].shape[1] :]
        texts.append(processor.tokenizer.decode(own, skip_special_tokens=True).strip())
    return texts, time.perf_counter() - began


def memory(run: Path, counts: list[int], folder: Path, threads: int) -> dict[str, Any]:
    """Peak resident bytes by number of questions."""
    peaks = {}
    for count in counts:
        data = synthetic_pope(folder / str(count), count)
        words = ["--measure", str(data), "--run", str(run.resolve()), "--threads", str(threads)]
        peaks[count] = in_a_process("benchmarks.evaluation", words)
    found: dict[str, Any] = {"peak_bytes": peaks}
    if len(peaks) > 1:
        found["growth"] = round(peaks[max(peaks)] / peaks[min(peaks)] - 1, 4)
    return found


def synthetic_pope(folder: Path, count: int) -> Path:
    """One split with `count` questions about noisy pictures, six a picture."""
    from PIL import Image

    (folder / "pope").mkdir(parents=True)
    (folder / "val2014").mkdir()
    lines = []
    for number in range(count):
        name = f"COCO_val2014_{number // PER_IMAGE:012d}.jpg"
        if number % PER_IMAGE == 0:
            noise = random.Random(number).randbytes(48 * 48 * 3)
            Image.frombytes("RGB", (48, 48), noise).save(folder / "val2014" / name)
        text = f"Is there a {('red', 'green', 'blue')[number % 3]} {('circle', 'square')[number % 2]} in the image?"
        record = {"question_id": number + 1, "image": name, "text": text, "label": ("yes", "no")[number % 2]}
        lines.append(json.dumps(record) + "\n")
    (folder / "pope" / "coco_pope_random.json").write_text("".join(lines))
    return folder


def peak_of(run: Path, data: Path, threads: int) -> int:
    """Evaluates as the command does, into files, and looks at the most memory that was resident."""
    import torch

    from normtune.evaluation import Settings, evaluate_into
    from normtune.tuned import open_tuned

    torch.set_num_threads(threads)
    tuned = open_tuned(run)
    evaluate_into(data / "result.json", tuned.model, tuned.processor, Settings(("pope",)), data)
    return resident("VmHWM")


def show(result: dict[str, Any]) -> None:
    for name, row in result["throughput"]["benchmarks"].items():
        differ = f", {row['answers_that_differ']} answers differ" if "answers_that_differ" in row else ""
        print(
            f"{name:10} {row['questions']:6} questions  one by one {row['one_by_one_per_second']:7.1f}/s  "
            f"batched {row['batched_per_second']:7.1f}/s  x {row['ratio']:.2f}{differ}"
        )
    for count, peak in result["memory"]["peak_bytes"].items():
        print(f"{count:>6} questions: {peak / 2**20:.1f} MiB")
    if "growth" in result["memory"]:
        print(f"growth {100 * result['memory']['growth']:.2f} %")


if __name__ == "__main__":
    main()
