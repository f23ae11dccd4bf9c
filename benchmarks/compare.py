"""`python -m benchmarks.compare`: all strategies on the embedded world, and the README's table from what came out.

The whole result goes to `benchmarks/results/compare.json`; `--from FOLDER` takes a comparison that is there (or goes
on with it) instead of a new one, `--table` only rewrites the README from the stored result.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.readme import write_table

RESULTS = Path(__file__).parent / "results" / "compare.json"
COMMAND = ["compare", "recipes/world.yaml", "--strategies", "all,norms+connector", "--seeds", "3"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="folder", type=Path, help="the folder of a comparison with this command")
    parser.add_argument("--table", action="store_true", help="only rewrite the README's table")
    arguments = parser.parse_args()
    if not arguments.table:
        measure(arguments.folder)
    table = table_of(json.loads(RESULTS.read_text()))
    write_table("comparison", table)
    print(table)


def measure(folder: Path | None) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        out = folder or Path(temporary) / "compare"
        subprocess.run([sys.executable, "-m", "normtune", *COMMAND, "--out", str(out)], check=True)
        shutil.copy(out / "report.json", RESULTS)


def table_of(result: dict[str, Any]) -> str:
    """The main table as Markdown, with the hardware named."""
    names = result["benchmarks"]
    names = [name for name in names if any(name in row["scores"] for row in result["rows"])]
    header = ["", *names, "average", "against LoRA", "text", "trained parameters", "peak MB", "step ms", "adapter"]
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header))]
    for row in result["rows"]:
        lines.append("| " + " | ".join([row["label"], *(cells_of(row, names, result["winners"]))]) + " |")
    facts = result["provenance"]
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "transformers", "peft"))
    command = " ".join(["normtune", *COMMAND])
    return "\n".join(
        [
            *lines,
            "",
            f"`{command}`: {len(result['seeds'])} seeds, 95 % intervals over seeds and images in brackets; bold where "
            "they tell the best strategy from all others.",
            f"{result['seconds'] / 60:.0f} minutes on {facts['cores']} cores of {facts['processor']}; {versions}.",
        ]
    )


def cells_of(row: dict[str, Any], names: list[str], winners: dict[str, Any]) -> list[str]:
    cost = row["cost"]
    relative = row["relative"].get("lora")
    return [
        *(figure(row["scores"].get(name), winners.get(name), row["label"]) for name in names),
        figure(row["average"], winners.get("average"), row["label"]),
        f"{100 * relative['mean']:+.1f} %" if relative and row["label"] != "lora" else "",
        f"{row['text']['after']:.3f}" if row["text"] else "",
        f"{cost['trainable_parameters']:,} ({cost['percent']:.3g} %)" if cost else "",
        f"{cost['peak_bytes'] / 1e6:.0f}" if cost else "",
        f"{1000 * cost['step_seconds']:.0f}" if cost else "",
        f"{cost['adapter_bytes'] / 1e3:.0f} kB" if cost else "",
    ]


def figure(score: dict[str, Any] | None, winner: dict[str, Any] | None, label: str) -> str:
    if score is None:
        return ""
    low, high = score["interval"]
    best = winner is not None and winner["best"] == label and not winner["tied"]
    mean = f"**{score['mean']:.3f}**" if best else f"{score['mean']:.3f}"
    return f"{mean} ({low:.3f}, {high:.3f})"


if __name__ == "__main__":
    main()
