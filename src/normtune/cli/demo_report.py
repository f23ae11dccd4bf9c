"""The demo's result for people: a summary in the terminal and one self-contained `report.html`."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

from normtune.cli.output import human_bytes, print_table
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
    header, rows = table_rows(result)
    parts = [
        f"<p class='note'>{html.escape(verdict(result))}</p>",
        "<h2>Scores</h2><p>On scenes that no training saw, 0 to 1. POPE is the mean accuracy of its three splits.</p>",
        html_table(header, rows),
        "<h2>Answers</h2>",
        *(scene_card(folder, scene) for scene in result["scenes"]),
        "<h2>Loss per step</h2>",
        "<div class='curves'>" + "".join(curve(name, values) for name, values in result["losses"].items()) + "</div>",
        "<h2>Reproduce</h2>",
        f"<p>{html.escape(machine(result))}</p>",
        "<pre>normtune demo</pre><details><summary>recipe</summary>"
        f"<pre>{html.escape(result['recipe'])}</pre></details>",
    ]
    write_text(folder / "report.html", PAGE.replace("{{body}}", "\n".join(parts)))


def machine(result: dict[str, Any]) -> str:
    facts = result["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"{result['seconds']:.0f} s on {facts['cores']} cores of {facts['processor']}, peak memory "
        f"{human_bytes(result['peak_rss_bytes'])}; Python {facts['python']}, {versions}."
    )


def html_table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def scene_card(folder: Path, scene: dict[str, Any]) -> str:
    picture = base64.b64encode((folder / scene["file"]).read_bytes()).decode()
    answers = [[title, scene["answers"][key]] for key, title in SHOWN.items()] + [["truth", scene["truth"]]]
    question = html.escape(scene["question"])
    return (
        f"<div class='card'><img alt='scene' width='192' height='192' src='data:image/png;base64,{picture}'>"
        f"<div><p><b>{question}</b></p>{html_table(['model', 'answer'], answers)}</div></div>"
    )


def curve(name: str, values: list[float]) -> str:
    """A loss curve as SVG, 260 x 110, from 0 to the largest loss."""
    top = max(values) or 1.0
    points = " ".join(
        f"{10 + 240 * i / max(1, len(values) - 1):.1f},{100 - 85 * value / top:.1f}" for i, value in enumerate(values)
    )
    label = f"{html.escape(name)}: {values[0]:.2f} to {values[-1]:.2f} in {len(values)} steps"
    return (
        f"<figure><svg viewBox='0 0 260 110' role='img' aria-label='{label}'>"
        f"<path d='M10 10V100H250' class='axis'/><polyline points='{points}' class='line'/></svg>"
        f"<figcaption>{label}</figcaption></figure>"
    )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>normtune demo</title><style>
:root { color-scheme: light dark; --ink: #1c1c1e; --paper: #fdfdfb; --line: #d6d6d2; --accent: #2a6fb0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e6; --paper: #17181a; --line: #3a3b3e; --accent: #7ab4e8; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 62rem; padding: 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td:first-child { min-width: 8rem; } td:last-child { overflow-wrap: anywhere; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: left; vertical-align: top; }
.wide { overflow-x: auto; } .note { border-left: 4px solid var(--accent); padding-left: .8rem; }
.card { display: flex; flex-wrap: wrap; gap: 1rem; border-top: 1px solid var(--line); padding: 1rem 0; }
.card > div { flex: 1 1 18rem; min-width: 0; } .card p { margin: 0 0 .4rem; white-space: pre-line; }
.curves { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; width: 17rem; max-width: 100%; }
svg { width: 100%; } .axis { fill: none; stroke: var(--line); } .line { fill: none; stroke: var(--accent); }
figcaption { font-size: .85rem; } pre { overflow-x: auto; border: 1px solid var(--line); padding: .6rem; }
</style></head><body>
<h1>normtune demo: a text LLM learns to see</h1>
<p>A tiny Llama that was pretrained on text alone, a tiny frozen vision encoder, and a connector between them. Stage 1
trains the connector on captions; then norm tuning trains the gains of the norms in the LLM's blocks.</p>
{{body}}
</body></html>
"""
