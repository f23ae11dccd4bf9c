"""The demo's result for people: a summary in the terminal and one self-contained `report.html`."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from normtune.cli.output import human_bytes, print_table
from normtune.reporting import Block, Card, Code, Details, Document, Figure, Heading, Note, Table, Text, plots
from normtune.reporting.numbers import machine
from normtune.runlog import write_text

TITLES = {
    "chance": "chance (no look at the image)",
    "stage1": "stage 1 only (connector, captions)",
    "connector": "connector only",
    "connector+embed+head": "connector + embedding + head, no norms",
    "layernorm-simple": "layernorm-simple: norm gains alone",
    "layernorm": "layernorm: norm gains + connector + embedding + head",
    "blind": "baseline: layernorm, no image",
    "shuffled": "baseline: layernorm, another image",
}
SHOWN = {"base": "before", "stage1": "stage 1", "layernorm-simple": "layernorm-simple", "layernorm": "layernorm"}
LEAD = (
    "A tiny Llama that was pretrained on text alone, a tiny frozen vision encoder, and a connector between them. "
    "Stage 1 trains the connector on captions; then norm tuning trains the gains of the norms in the LLM's blocks."
)
COLUMNS = {"pope": "POPE", "mme": "MME", "vqav2": "VQAv2", "caption": "caption ROUGE-L", "text": "text kept"}


def table_rows(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the score table."""
    columns = [key for key in COLUMNS if any(key in row for row in result["scores"].values())]
    header = ["", *(COLUMNS[key] for key in columns), "trained parameters", "adapter"]
    rows = []
    for name, title in TITLES.items():
        scores = result["scores"][name]
        count, size = result["parameters"].get(name), result["adapter_bytes"].get(name)
        trained = f"{count:,} ({result['percent'][name]:.3g} %)" if count else ""
        numbers = [f"{scores[key]:.3f}" if key in scores else "" for key in columns]
        rows.append([title, *numbers, trained, human_bytes(size) if size else ""])
    return header, rows


def verdict(result: dict[str, Any]) -> str:
    """One sentence on the baselines, whatever came out."""
    if result["quick"]:
        return "Quick run: a few steps on a few questions; the figures mean nothing."
    worst = max(result["baselines"]["gaps"].items(), key=lambda item: item[1])
    if result["baselines"]["within"]:
        gap = f"(largest gap {worst[1]:.3f})"
        return f"Baselines hold: without the right image the model is within .05 of chance {gap}."
    return f"Baselines do NOT hold: {worst[0]} is {worst[1]:.3f} from chance; the questions leak their answers."


def print_summary(result: dict[str, Any]) -> None:
    for scene in result["scenes"]:
        print(f"\n{result['run']}/{scene['file']}: {scene['question']}".replace("\n", " "))
        for key, title in SHOWN.items():
            print(f"    {title:>17}: {scene['answers'][key]}")
        print(f"    {'truth':>17}: {scene['truth']}")
    header, rows = table_rows(result)
    print_table(header, rows, "\nScores on scenes that no training saw, 0 to 1")
    print(verdict(result))
    memory = human_bytes(result["peak_rss_bytes"])
    print(f"{result['seconds']:.0f} s, peak memory {memory}; report: {result['run']}/report.html")
    print(
        "next: normtune chat "
        f"{result['run']}/layernorm --image {result['run']}/scenes/1.png\n"
        "      normtune init --llm YOUR_LLM --vision YOUR_ENCODER --data YOUR_DATA.json --images DIR > recipe.yaml"
    )


def write_report(folder: Path, result: dict[str, Any]) -> None:
    """Writes `folder/report.html`: no script, no request to anywhere, light and dark."""
    seconds, memory = result["seconds"], human_bytes(result["peak_rss_bytes"])
    blocks: list[Block] = [
        Note(verdict(result)),
        Heading("Scores"),
        Text("On scenes that no training saw, 0 to 1. POPE is the mean accuracy of its three splits."),
        Table(*table_rows(result)),
        Heading("Answers"),
        *(scene_card(folder, scene) for scene in result["scenes"]),
        Heading("Loss per step"),
        Figure([curve(name, values) for name, values in result["losses"].items()]),
        Heading("Reproduce"),
        Text(f"{seconds:.0f} s on {machine(result['provenance'])}; peak memory {memory}."),
        Code("normtune demo"),
        Details("recipe", [Code(result["recipe"])]),
    ]
    write_text(folder / "report.html", Document("normtune demo: a text LLM learns to see", blocks, LEAD).to_html())


def scene_card(folder: Path, scene: dict[str, Any]) -> Card:
    picture = base64.b64encode((folder / scene["file"]).read_bytes()).decode()
    answers = [[title, scene["answers"][key]] for key, title in SHOWN.items()] + [["truth", scene["truth"]]]
    table = Table(["model", "answer"], answers)
    return Card(f"data:image/png;base64,{picture}", scene["question"], [table], alt="scene")


def curve(name: str, values: list[float]) -> str:
    """A loss curve from 0 to the largest loss."""
    label = f"{name}: {values[0]:.2f} to {values[-1]:.2f} in {len(values)} steps"
    line = plots.Series(name, range(1, len(values) + 1), values, "accent")
    return plots.lines([line], title=label, limits=(0, max(values) * 1.05 or 1.0), height=150, marked=False)
