"""`python -m benchmarks.serve`: the server under load, every answer compared with the offline one.

Four adapters of the embedded world (gains alone; gains with connector, embedding and head; a connector; gains and
connector; trained briefly) and the base behind one `normtune serve`, a process of its own. Clients that each keep one
connection ask a model drawn at random, about half of them for a stream: a third questions of the benchmarks without the
image, a third with it (a few words each), a third for a description in detail (40 tokens and more); the next as soon as
an answer is there. Every answer must be the greedy one that `normtune evaluate` gives offline in fp32 on that adapter
alone; a tie (a second-best token within 1e-4 somewhere) is counted apart. Then the same server with --no-batching gets
a part of the same requests. Resident memory of the server is read five times a second. Figures go to
benchmarks/results/serve.json (or --json FILE) and, with `--docs`, into docs/serving.md and the
README; `--table` measures nothing. `--runs` keeps the adapters for another time.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx

from benchmarks import bank
from benchmarks.readme import DOCS, write_table
from benchmarks.serve_tables import in_short, show, table
from normtune.progress import quiet_libraries
from normtune.runlog import provenance, write_json

PAGE = DOCS / "serving.md"
RESULTS = Path(__file__).parent / "results" / "serve.json"
RECIPE = Path(__file__).parents[1] / "recipes" / "world.yaml"
ADAPTERS: dict[str, dict[str, Any]] = {  # what differs from the recipe's last stage
    "gains": {"strategy": "layernorm-simple", "learning_rate": 6.0e-2},
    "everything": {"strategy": "layernorm"},
    "connector": {"strategy": "connector", "learning_rate": 2.5e-3},
    "other": {"strategy": ["norms", "connector"], "learning_rate": 2.0e-3},
}
BENCHMARKS = ("pope", "vqav2", "coco", "text")
BASE = "base"
LENGTH = 48  # tokens of an answer at most
WARM = 0.1  # of the requests are not yet counted as a steady state of memory
PACKAGES = ("fastapi", "starlette", "uvicorn", "httpx", "pydantic", "prometheus-client")


@dataclass(frozen=True)
class Asked:
    """A question to a model, its image (or None), the offline answer and by how much that led (logits)."""

    model: str
    text: str
    image: Path | None
    answer: str
    margin: float


@dataclass
class Outcome:
    """What came of a request: seconds, status (0: no answer), text."""

    seconds: float
    status: int
    text: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the figures go")
    parser.add_argument("--runs", type=Path, help="folder of the trained adapters, kept (default: made anew)")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--alone", type=int, help="requests to the server without batching (default: a quarter)")
    parser.add_argument("--questions", type=int, default=60, help="of each benchmark, asked of each model")
    parser.add_argument("--steps", type=int, default=30, help="of each training stage")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1, help="of the server's matrix products")
    parser.add_argument("--docs", action="store_true", help="write what docs/serving.md and the README show, too")
    parser.add_argument("--table", action="store_true", help="measure nothing: take the stored figures")
    options = parser.parse_args()
    result = json.loads(options.json.read_text()) if options.table else measured(options)
    if not options.table:
        options.json.parent.mkdir(exist_ok=True)
        write_json(options.json, result)
    show(result)
    if options.docs:
        write_table("serve", table(result), PAGE)
        write_table("serving", in_short(result, json.loads(bank.RESULTS.read_text())))


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of both servers, and how they were made."""
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        runs = trained(options.runs or Path(folder), options.steps)
        questions = with_answers(runs, options.questions)
        jobs = random.Random(0).choices(questions, k=options.requests)
        few = jobs[: options.alone or max(1, options.requests // 4)]
        result: dict[str, Any] = {"batching": measure(runs, jobs, options, [])}
        result["alone"] = measure(runs, few, options, ["--no-batching"])
    result["ratio"] = round(result["batching"]["per_second"] / result["alone"]["per_second"], 2)
    kept = ("requests", "clients", "slots", "threads", "steps", "questions")
    result["settings"] = {name: getattr(options, name) for name in kept} | {"max_tokens": LENGTH}
    result["provenance"] = provenance()
    result["provenance"]["versions"] |= {name: metadata.version(name) for name in PACKAGES}
    return result


def trained(folder: Path, steps: int) -> dict[str, Path]:
    """A run folder for each of ADAPTERS, those that are there already as they are."""
    import normtune as nt
    from normtune.recipe import load_recipe

    runs = {}
    for name, changes in ADAPTERS.items():
        runs[name] = folder / name
        if (runs[name] / "adapter" / "adapter.json").is_file():
            continue
        data = load_recipe(RECIPE).model_dump(mode="json")
        stages = [{**stage, "max_steps": steps} for stage in data["stages"]]
        stages[-1] |= changes
        nt.train(load_recipe({**data, "name": f"serve-{name}", "stages": stages}), out=runs[name])
    return runs


def with_answers(runs: dict[str, Path], count: int) -> list[Asked]:
    """`count` questions of each benchmark with the offline answers of every model, about an image and without one."""
    import torch

    from normtune.chat import Turn
    from normtune.evaluation.answering import generate
    from normtune.evaluation.engines import Request
    from normtune.serving import open_base
    from normtune.tasks import TASKS
    from normtune.tuned import open_tuned
    from normtune.world import resolve_path
    from normtune.world.text import DETAIL_PROMPTS

    torch.set_num_threads(1)
    data, items = Path(resolve_path("world:eval")), []
    for name in BENCHMARKS:
        found = TASKS[name].load(data)
        items += random.Random(1).sample(found, min(count, len(found)))
    asked = []
    for model in (BASE, *runs):
        tuned = open_base(next(iter(runs.values())))[0] if model == BASE else open_tuned(runs[model])
        # before any training the connector's output is noise to the base, so it is asked about text alone
        blind = [model == BASE or n % 3 == 0 or item.image is None for n, item in enumerate(items)]
        long = [DETAIL_PROMPTS[n % len(DETAIL_PROMPTS)] if n % 3 == 2 else None for n in range(len(items))]
        ways = [
            (item.question, None) if none else (detail or item.question, item.image)
            for item, none, detail in zip(items, blind, long, strict=True)
        ]
        ways = list(dict.fromkeys(ways))
        requests = [
            Request(
                (Turn("user", text if image is None else f"<image>\n{text}"),), () if image is None else (image,), ""
            )
            for text, image in ways
        ]
        for batch in generate(tuned.model, tuned.processor, requests, LENGTH, 32):
            asked += [Asked(model, *ways[place], answer.text, answer.margin) for place, answer in batch]
    return asked


def measure(runs: dict[str, Path], jobs: Sequence[Asked], options: Any, words: list[str]) -> dict[str, Any]:
    """One server, all requests, its memory meanwhile."""
    with server(runs, options, words) as (url, process):
        asyncio.run(load(url, jobs[:20], 4, []))  # the first forwards are slower
        memory: list[tuple[float, int]] = []
        began = time.perf_counter()
        outcomes = asyncio.run(load(url, jobs, options.clients, memory, process.pid))
        seconds = time.perf_counter() - began
        metrics = httpx.get(f"{url}/metrics", trust_env=False).text
    answered = [(job, outcome) for job, outcome in zip(jobs, outcomes, strict=True) if outcome.status == 200]
    different = [job for job, outcome in answered if outcome.text.strip() != job.answer]
    times = sorted(outcome.seconds for _, outcome in answered)
    ties = [job for job in different if job.margin < 1e-4]
    return {
        "requests": len(jobs),
        "lost": len(jobs) - len(answered),
        "reasons": dict(Counter(f"{o.status} {o.text[:200]}" for o in outcomes if o.status != 200)),
        "wrong": len(different) - len(ties),
        "ties_that_differ": len(ties),
        "with_image": sum(job.image is not None for job in jobs),
        "seconds": round(seconds, 2),
        "per_second": round(len(answered) / seconds, 2),
        "latency_seconds": {f"p{p}": round(quantile(times, p / 100), 3) for p in (50, 90, 99)},
        "resident_bytes": phases(memory),
        "steps": counted(metrics, "normtune_decoding_steps_total"),
        "tokens": counted(metrics, "normtune_generated_tokens_total"),
        "images_encoded": counted(metrics, "normtune_images_encoded_total"),
    }


@contextmanager
def server(runs: dict[str, Path], options: Any, words: list[str]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`normtune serve` on the base of the runs; ended by SIGTERM, which must be a good end."""
    first, *rest = runs.items()
    given = [word for name, run in rest for word in ("--adapter", f"{name}={run}")]
    limits = ["--slots", str(options.slots), "--max-queue", str(options.clients), "--timeout", "900", "--port", "0"]
    command = [sys.executable, "-m", "normtune", "serve", str(first[1]), *given, *limits, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    try:
        found = next((m for line in process.stderr if (m := re.search(r"at (http://\S+)/v1", line))), None)
        assert found is not None, "the server did not start"
        yield found.group(1), process
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, "the server did not end well"
    finally:
        process.kill()
        process.wait()


async def load(
    url: str, jobs: Sequence[Asked], clients: int, memory: list[tuple[float, int]], pid: int | None = None
) -> list[Outcome]:
    """Answers in the order of `jobs`, by so many clients at once; `memory` gets (share of requests done, bytes)."""
    outcomes: list[Outcome | None] = [None] * len(jobs)
    waiting = iter(enumerate(jobs))
    bodies = {job: json.dumps(document(job)).encode() for job in set(jobs)}

    async def client() -> None:
        # a pool of its own: one of 200 connections kept the process that measures busy for seconds at a time
        async with httpx.AsyncClient(base_url=url, timeout=900, trust_env=False, verify=False) as http:
            for place, job in waiting:
                outcomes[place] = await one(http, bodies[job])

    async def watch() -> None:
        while pid is not None:
            memory.append((sum(outcome is not None for outcome in outcomes) / len(jobs), resident_of(pid)))
            await asyncio.sleep(0.2)

    watcher = asyncio.create_task(watch())
    await asyncio.gather(*(client() for _ in range(clients)))
    watcher.cancel()
    return [outcome for outcome in outcomes if outcome is not None]


def document(job: Asked) -> dict[str, Any]:
    """A request in OpenAI's form; half of them ask for a stream."""
    parts: list[Any] = [{"type": "text", "text": job.text}]
    if job.image is not None:
        kind = "jpeg" if job.image.suffix in (".jpg", ".jpeg") else job.image.suffix[1:]
        url = f"data:image/{kind};base64,{base64.b64encode(job.image.read_bytes()).decode()}"
        parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
    asked = {"model": job.model, "messages": [{"role": "user", "content": parts}], "max_tokens": LENGTH}
    return {**asked, "temperature": 0, "stream": len(job.text) % 2 == 0}


async def one(http: httpx.AsyncClient, body: bytes) -> Outcome:
    began = time.perf_counter()
    try:
        reply = await http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    except httpx.HTTPError as error:
        return Outcome(time.perf_counter() - began, 0, type(error).__name__)
    return Outcome(time.perf_counter() - began, reply.status_code, text_of(reply))


def text_of(reply: httpx.Response) -> str:
    if not reply.headers["content-type"].startswith("text/event-stream"):
        found = reply.json()
        return str(found["choices"][0]["message"]["content"] if "choices" in found else found)
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
    if lines[-1] != "[DONE]":
        return f"broken off: {lines[-1]}"
    return "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1])


def resident_of(pid: int) -> int:
    """Bytes of a process in memory (Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def phases(memory: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """Median in the first, middle and last third of the run once it is warm, and the growth between first and last."""
    thirds: list[list[int]] = [[], [], []]
    for share, size in memory:
        if share >= WARM:
            thirds[min(2, int(3 * (share - WARM) / (1 - WARM)))].append(size)
    if not all(thirds):
        return {"at_the_end": memory[-1][1]}
    start, middle, end = (int(statistics.median(third)) for third in thirds)
    return {"start": start, "middle": middle, "end": end, "growth": round(end / start - 1, 4)}


def quantile(times: Sequence[float], share: float) -> float:
    return times[min(len(times) - 1, int(share * len(times)))] if times else float("nan")


def counted(metrics: str, name: str) -> int:
    return next(int(float(line.split()[1])) for line in metrics.splitlines() if line.startswith(f"{name} "))


if __name__ == "__main__":
    main()
