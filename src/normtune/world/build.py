"""Makes the world's weights from nothing: `python -m normtune.world.build --out DIR [--minutes N] [--seed N]`.

DIR gets `llm`, `vision` and `vision2` (ordinary model folders in bf16) and `build.json` (arguments, versions, figures).
Started again after an interruption, it goes on. Copied over the package's `assets`, DIR is the shipped world.
Not here: the trainings themselves (`pretrain`, `vision`).
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch

from normtune.errors import InputError, NormtuneError
from normtune.progress import say
from normtune.runlog import provenance, write_json
from normtune.world import pretrain, vision

MINUTES = pretrain.MINUTES + vision.MINUTES  # with which the shipped weights were made


def build(out: Path, minutes: float = MINUTES, seed: int = 0) -> dict[str, Any]:
    """Trains what is missing in `out`; returns what `build.json` says.

    The numbers of steps are proportional to `minutes`; a machine with other speed takes more or less than that.

    Raises:
        InputError: no time given, or a folder that cannot be written. JobError: the disk is full.
    """
    if not (minutes > 0 and math.isfinite(minutes)):
        raise InputError(f"minutes is {minutes}; give how long the trainings may take, for example 48")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}; choose another --out") from None
    torch.set_num_threads(1)  # tensors are small: a second thread costs more than it gives
    encoders = vision.build(out, minutes * vision.MINUTES / MINUTES, seed)
    llm = pretrain.build(out, minutes * pretrain.MINUTES / MINUTES, seed)
    facts = {"minutes": minutes, "seed": seed, **provenance(), "llm": llm, **encoders}
    write_json(out / "build.json", facts)
    return facts


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m normtune.world.build",
        description="Make the embedded world's tiny LLM and vision encoders from nothing.",
        epilog="example: python -m normtune.world.build --out world-assets --minutes 48",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for llm, vision, vision2")
    parser.add_argument(
        "--minutes",
        type=float,
        default=MINUTES,
        help="scale of all trainings, in minutes of a core (default %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights, texts and scenes (default %(default)s)")
    given = parser.parse_args(arguments)
    try:
        build(given.out, given.minutes, given.seed)
    except NormtuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    say(f"built {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
