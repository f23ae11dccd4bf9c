"""What `benchmarks.serve` shows of its figures: on the terminal, in docs/serving.md and in the README."""

from __future__ import annotations

from typing import Any


def table(result: dict[str, Any]) -> str:
    """Both servers side by side, as Markdown."""
    settings, facts = result["settings"], result["provenance"]
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in ("torch", "fastapi", "uvicorn"))
    columns = {"batching": f"{settings['slots']} at a time", "alone": "one at a time"}
    rows = [result[key] for key in columns]
    memory = [row["resident_bytes"] for row in rows]
    lines: list[list[str]] = [
        ["", *columns.values()],
        ["---"] * 3,
        ["requests (with an image)", *(f"{row['requests']:,} ({row['with_image']})" for row in rows)],
        ["requests/s", *(f"{row['per_second']:.1f}" for row in rows)],
        *([p, *(f"{row['latency_seconds'][p]:.2f} s" for row in rows)] for p in ("p50", "p90", "p99")),
        ["wrong, lost", *(f"{row['wrong']}, {row['lost']}" for row in rows)],
        ["MiB in memory, start to end", *(f"{one['start'] >> 20} to {one['end'] >> 20}" for one in memory)],
    ]
    return "\n".join(
        [
            *(f"| {' | '.join(cells)} |" for cells in lines),
            "",
            f"{settings['clients']} clients, four adapters and the base of the embedded world mixed, answers of up to "
            f"{settings['max_tokens']} tokens, each compared with the offline one.",
            f"Server and clients on {facts['cores']} cores of {facts['processor']}; {versions}.",
        ]
    )


def in_short(result: dict[str, Any], banked: dict[str, Any]) -> str:
    """What the README says of this and of `benchmarks.bank`."""
    shape = banked["shapes"]["100M float32"]
    mixed = next(row for row in shape["rows"] if row["way"] == f"bank, {banked['batch']} adapters")
    row, facts = result["batching"], result["provenance"]
    rows, ratio, size = banked["batch"], mixed["decode_ratio"][1], f"{shape['parameters'] / 1e6:.0f} M parameters, fp32"
    clients, times = result["settings"]["clients"], f"{result['ratio']:.1f} times those without batching"
    return (
        f"{rows} rows on {rows} adapters take {ratio:.2f} times as long as on the base, {size};\n"
        f"{clients} clients of the server get {row['per_second']:.0f} answers/s, {times}; "
        f"of {row['requests']:,} answers {row['wrong']} were wrong, {row['lost']} lost.\n"
        f"{facts['cores']} cores of {facts['processor']}, torch {facts['versions']['torch']}."
    )


def show(result: dict[str, Any]) -> None:
    for name in ("batching", "alone"):
        row = result[name]
        latency = ", ".join(f"{key} {value:.2f} s" for key, value in row["latency_seconds"].items())
        memory = ", ".join(
            f"{key} {100 * value:.1f} %" if key == "growth" else f"{key} {value / 2**20:.0f} MiB"
            for key, value in row["resident_bytes"].items()
        )
        print(
            f"{name:9} {row['requests']:5} requests ({row['with_image']} with an image)  {row['per_second']:7.1f}/s  "
            f"{latency}  lost {row['lost']}, wrong {row['wrong']}, ties {row['ties_that_differ']}\n"
            f"{'':9} memory: {memory}"
        )
    print(f"batching x {result['ratio']:.2f}")
