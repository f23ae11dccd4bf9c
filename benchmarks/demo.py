"""`python -m benchmarks.demo`: runs the demo, keeps its figures, and writes the README's table from them.

The figures go to `benchmarks/results/demo.json`; `--table` only rewrites the README from the stored ones.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.readme import write_table

RESULTS = Path(__file__).parent / "results" / "demo.json"
KEPT = ("scores", "baselines", "parameters", "percent", "adapter_bytes", "seconds", "peak_rss_bytes", "provenance")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="only rewrite the README's table")
    if not parser.parse_args().table:
        measure()
    result = json.loads(RESULTS.read_text())
    write_table("demo", table(result))
    print(table(result))


def measure() -> None:
    from normtune.cli.demo_runs import Demo
    from normtune.cli.output import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        result = Demo(Path(folder) / "demo", quick=False).run()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({key: result[key] for key in KEPT}, indent=1) + "\n")


def table(result: dict[str, Any]) -> str:
    """The scores as Markdown, with the hardware named."""
    from normtune.cli.demo_report import table_rows, verdict
    from normtune.reporting.numbers import human_bytes, machine

    header, rows = table_rows(result)
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    took = f"{result['seconds']:.0f} s, peak memory {human_bytes(result['peak_rss_bytes'])}"
    where = machine(result["provenance"])
    return "\n".join([*lines, "", verdict({**result, "quick": False}), f"Measured in {took}, on {where}."])


if __name__ == "__main__":
    main()
