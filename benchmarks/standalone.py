"""`python -m benchmarks.standalone RUN`: an exported folder in an environment of its own, with transformers alone.

Exports RUN (a run, adapter or MLLM folder; --format transformers), installs torch, transformers and pillow of
constraints.txt, and nothing else, into a fresh virtual environment (or takes --python of one), and asks both sides the
same questions about the same images, greedily: the tuned model here, through normtune, and the folder there. Exits
with 1 where an answer differs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "pillow")
TOKENS = 24
QUESTIONS = ("What is in the image?", "Describe the image.", "How many objects are there?")

ALONE = """
import importlib.util, json, sys
assert importlib.util.find_spec("normtune") is None, "normtune is installed here"
import torch, transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, asked = sys.argv[1], json.load(open(sys.argv[2]))
torch.set_num_threads(1)
model = AutoModelForImageTextToText.from_pretrained(folder).eval()
processor = AutoProcessor.from_pretrained(folder)
answers = []
for path, question in asked["questions"]:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=Image.open(path).convert("RGB"), text=text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=asked["tokens"], do_sample=False)
    answers.append(processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())
versions = {m.__name__: m.__version__ for m in (torch, transformers)}
json.dump({"answers": answers, "versions": versions, "dtype": str(model.dtype)}, open(sys.argv[3], "w"))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="run folder, adapter folder or MLLM folder")
    parser.add_argument("--images", type=Path, help="folder of images (default: the embedded world's)")
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--python", type=Path, help="of an environment with transformers and without normtune")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(arguments, Path(temporary))
    print(json.dumps({key: result[key] for key in ("images", "same", "distinct", "versions", "dtype")}, indent=2))
    for path, ours, theirs in result["different"][:5]:
        print(f"{path}: {ours!r} here, {theirs!r} there")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(1 if result["different"] else 0)


def measure(arguments: argparse.Namespace, temporary: Path) -> dict[str, Any]:
    """Both sides' answers, compared."""
    images = images_of(arguments.images, arguments.count)
    questions = [(str(path), QUESTIONS[i % len(QUESTIONS)]) for i, path in enumerate(images)]
    python = arguments.python or environment(temporary / "environment")
    exported = temporary / "exported"
    subprocess.run([sys.executable, "-m", "normtune", "export", arguments.run, "--out", str(exported)], check=True)
    asked, given, script = temporary / "asked.json", temporary / "given.json", temporary / "alone.py"
    asked.write_text(json.dumps({"questions": questions, "tokens": TOKENS}))
    script.write_text(ALONE)
    isolated = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    began = time.monotonic()
    subprocess.run([str(python), str(script), str(exported), str(asked), str(given)], check=True, env=isolated)
    theirs = json.loads(given.read_text())
    ours = here(arguments.run, questions)
    rows = zip((path for path, _ in questions), ours, theirs["answers"], strict=True)
    different = [row for row in rows if row[1] != row[2]]
    return {
        "images": len(questions),
        "same": len(questions) - len(different),
        "distinct": len(set(ours)),
        "different": different,
        "seconds_alone": round(time.monotonic() - began, 1),
        **{key: theirs[key] for key in ("versions", "dtype")},
    }


def images_of(folder: Path | None, count: int) -> list[Path]:
    from normtune.world import ensure

    root = folder or ensure() / "eval"
    found = [path for path in sorted(root.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png")][:count]
    if len(found) < count:
        sys.exit(f"{root} has {len(found)} images, not {count}")
    return found


def here(run: str, questions: list[tuple[str, str]]) -> list[str]:
    """The tuned model's greedy answers through normtune, one question at a time."""
    import torch

    from normtune.chat import Turn
    from normtune.evaluation import answer
    from normtune.tuned import open_tuned

    torch.set_num_threads(1)
    tuned = open_tuned(run)
    items = [([Turn("user", f"<image>\n{question}")], [Path(path)]) for path, question in questions]
    return answer(tuned.model, tuned.processor, items, TOKENS, batch_size=1)


def environment(folder: Path) -> Path:
    """The Python of a new virtual environment with three packages of constraints.txt."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pins = {
        line.split("==")[0].lower(): line for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
    }
    wanted = [pins[name] for name in PACKAGES]
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *wanted]
    subprocess.run([*command, "-c", str(ROOT / "constraints.txt")], check=True)
    listed = subprocess.run([*command[:3], "list"], check=True, capture_output=True, text=True).stdout
    assert not re.search(r"^normtune\b", listed, re.MULTILINE), "normtune is in the new environment"
    return folder / "bin" / "python"


if __name__ == "__main__":
    main()
