"""`python -m benchmarks.crash --kills 100`: kills trainings of the embedded world at random moments, resumes each time.

SIGKILL while a process starts, within a step, or while a checkpoint is being written (told by its temporary folder).
Each training is killed until it ends; its tensors must then be those of an uninterrupted one, bit for bit, and no kill
may have cost more than `save_every` steps. Writes `benchmarks/results/crash.json`. Exit code 1 where anything differs.
Not here: lost power, which tests whether the disk keeps what it says it has.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from normtune.progress import quiet_libraries, say
from normtune.recipe import Recipe, load_recipe
from normtune.runlog import provenance, read_lines
from normtune.training import train
from normtune.world import resolve

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "crash.json"
SAVE_EVERY = 4
STEPS = {"align": 8, "instruct": 16}
MOMENTS = ("start", "step", "write")


def small_world() -> Recipe:
    """The world's recipe with few and small steps."""
    stages = [f"stages.{n}.{key}" for n, steps in enumerate(STEPS.values()) for key in sizes(steps)]
    return resolve(load_recipe(ROOT / "recipes" / "world.yaml", [*stages, f"save_every={SAVE_EVERY}", "keep=2"]))


def sizes(steps: int) -> list[str]:
    return [f"max_steps={steps}", "batch_size=6", "micro_batch_size=2"]


def crash(folder: Path, kills: int, seed: int = 0) -> dict[str, Any]:
    """Kills so many times; what came of it.

    Returns:
        kills, by moment and in all, runs, `differing` tensors, `repeated` (steps after each kill, as counts).
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["normtune.training", "normtune.tuned", "transformers.models.llava"])
    chance, recipe = random.Random(seed), small_world()
    began = time.monotonic()
    process = start(context, recipe, folder / "whole")
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"the uninterrupted training failed with exit code {process.exitcode}")
    wanted, moments, differing, repeated, runs = tensors_of(folder / "whole"), Counter[str](), [], Counter[int](), 0
    while moments.total() < kills:
        runs += 1
        run = folder / f"run-{runs}"
        while not (run / "adapter" / "adapter.json").is_file():
            process = start(context, recipe, run)
            moment = chance.choice(MOMENTS) if moments.total() < kills else None
            if moment is not None and kill(process, run, moment, chance):
                moments[moment] += 1
                continue
            process.join()
            if process.exitcode != 0:
                raise SystemExit(f"resuming {run} failed with exit code {process.exitcode}")
        differing += [f"{run.name}: {name}" for name in different(wanted, tensors_of(run))]
        repeated.update(lost_steps(run))
        say(f"{run.name}: {moments.total()} kills so far, {len(differing)} tensors differ")
    return {
        "kills": moments.total(),
        "moments": dict(moments),
        "runs": runs,
        "tensors": len(wanted),
        "differing": differing,
        "repeated": {str(steps): count for steps, count in sorted(repeated.items())},
        "save_every": SAVE_EVERY,
        "steps": sum(STEPS.values()),
        "seconds": round(time.monotonic() - began, 1),
    }


def start(context: ForkServerContext, recipe: Recipe, folder: Path) -> ForkServerProcess:
    process = context.Process(target=child, args=(recipe, folder))
    process.start()
    return process


def child(recipe: Recipe, folder: Path) -> None:
    quiet_libraries()
    train(recipe, out=folder, resume=True, quiet=True)


def kill(process: ForkServerProcess, run: Path, moment: str, chance: random.Random) -> bool:
    """Ends the process with SIGKILL at a moment of a kind; False where it ended before."""
    logged, steps = len(read_lines(run / "log.jsonl")), chance.randint(1, 2 * SAVE_EVERY)
    if moment == "start":
        time.sleep(chance.uniform(0, 2))
    while moment != "start" and process.is_alive() and len(read_lines(run / "log.jsonl")) < logged + steps:
        time.sleep(0.002)
    if moment == "step":
        time.sleep(chance.uniform(0, 0.1))
    while moment == "write" and process.is_alive() and not list((run / "checkpoints").glob(".*.part")):
        pass  # a checkpoint of this size takes some milliseconds
    if moment == "write":
        time.sleep(chance.uniform(0, 0.005))
    alive = process.is_alive()
    process.kill()
    process.join()
    return alive and process.exitcode != 0


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter.safetensors")


def different(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not equal bit for bit, or not in both."""
    return sorted(
        name for name in a.keys() | b.keys() if name not in a or name not in b or not torch.equal(a[name], b[name])
    )


def lost_steps(run: Path) -> list[int]:
    """After each kill that found steps in the log: how many of them were made again, by the log's starts."""
    before = dict(zip(STEPS, [0, *STEPS.values()], strict=False))  # steps of the stages before
    found, last, ended = [], 0, False
    for line in read_lines(run / "log.jsonl"):
        if line.get("event") == "start":
            at = before[line["stage"]] + line["step"]
            if last and not (ended and at == last):  # else the next stage of the same process
                found.append(last - at)
            last = at  # what was repeated is not counted again where no step follows
        if "loss" in line:
            last = before[line["stage"]] + line["step"]
        ended = line.get("event") == "stage end"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="how often (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = crash(Path(folder), given.kills, given.seed)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**result, "seed": given.seed, "provenance": provenance()}, indent=1) + "\n")
    print(json.dumps(result))
    most = max(map(int, result["repeated"]), default=0)
    return int(bool(result["differing"]) or most > SAVE_EVERY)


if __name__ == "__main__":
    sys.exit(main())
