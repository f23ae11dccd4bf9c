"""What the demo runs: one stage 1, four strategies from it, scores with baselines and chance, answers to show."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

import normtune
from normtune.chat import Turn
from normtune.errors import InputError
from normtune.evaluation import answer, evaluate_model, shuffled_images
from normtune.progress import Bar
from normtune.recipe import load_recipe, to_yaml
from normtune.runlog import peak_rss, provenance, read_lines, write_json
from normtune.tasks import TASKS
from normtune.training import Trained, train
from normtune.tuned import build
from normtune.world import resolve

EXTRAS = ["connector", "embed", "head"]
VARIANTS: dict[str, str | list[str]] = {  # row of the table -> strategy of the last stage
    "connector": "connector",
    "connector+embed+head": EXTRAS,
    "layernorm-simple": "layernorm-simple",
    "layernorm": "layernorm",
}
COLUMNS = {"pope": "pope", "mme": "mme", "vqav2": "vqav2", "coco": "caption", "text": "text"}
SCENES = 8
QUICK = {"stages.0.max_steps": 8, "stages.1.max_steps": 8, "evaluate.limit": 24}


def recipe_file(name: str) -> Path:
    """A recipe that ships with the package, also from a checkout."""
    package = Path(normtune.__file__).parent
    for folder in (package / "recipes", package.parents[1] / "recipes"):
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"recipe {name} is missing from this installation; install normtune again")


class Demo:
    """One run of the demo into `folder`."""

    def __init__(self, folder: Path, quick: bool) -> None:
        overrides = [f"{key}={value}" for key, value in QUICK.items()] if quick else []
        self.folder, self.quick = folder, quick
        self.source = load_recipe(recipe_file("world.yaml"), overrides)
        self.recipe = resolve(self.source)
        assert self.recipe.evaluate is not None  # world.yaml has it
        self.data = Path(self.recipe.evaluate.data)
        self.limit = self.recipe.evaluate.limit
        self.adapter_bytes: dict[str, int] = {}
        self.parameters: dict[str, int] = {}
        self.percent: dict[str, float] = {}
        self.losses: dict[str, list[float]] = {}

    def run(self, began: float | None = None) -> dict[str, Any]:
        """Everything; returns the facts of the report, which are also written to `demo.json`."""
        began = time.monotonic() if began is None else began
        items = self.pick_items()
        scores: dict[str, dict[str, float]] = {"chance": self.chance()}
        answers: dict[str, list[str]] = {}
        model, processor = build(self.recipe.model, self.recipe.seed)
        answers["base"] = self.answers(model, processor, items)
        stage1 = self.train_variant("stage1", None)
        scores["stage1"] = self.score(stage1, "stage 1")
        answers["stage1"] = self.answers(stage1.model, stage1.processor, items)
        for name, strategy in VARIANTS.items():
            tuned = self.train_variant(name, strategy)
            scores[name] = self.score(tuned, name)
            if name.startswith("layernorm"):
                answers[name] = self.answers(tuned.model, tuned.processor, items)
        for baseline in ("blind", "shuffled"):  # of the last model, layernorm
            scores[baseline] = self.score(tuned, baseline, baseline)
        result = {
            "scores": scores,
            "quick": self.quick,
            "baselines": self.judge(scores),
            "scenes": self.save_scenes(items, answers),
            "parameters": self.parameters,
            "percent": self.percent,
            "adapter_bytes": self.adapter_bytes,
            "losses": self.losses,
            "recipe": to_yaml(self.source),
            "run": str(self.folder),
            "seconds": round(time.monotonic() - began, 1),
            "peak_rss_bytes": peak_rss(),
            "provenance": provenance(),
        }
        write_json(self.folder / "demo.json", result)
        return result

    def train_variant(self, name: str, strategy: str | list[str] | None) -> Trained:
        """Stage 1 alone (`strategy` None), or the last stage with `strategy` from stage 1's end."""
        data = self.recipe.model_dump(mode="json")
        data["name"] = f"demo-{name.replace('+', '-')}"
        if strategy is None:
            data["stages"] = data["stages"][:1]
        else:
            last = data["stages"][-1]
            last["strategy"] = strategy
            last["learning_rate"] = data["compare"]["learning_rates"].get(name, last["learning_rate"])
            data["start_from"] = str(self.folder / "stage1")
        trained = train(load_recipe(data), out=self.folder / name.replace("+", "-"))
        assert trained.report is not None  # a new run has trained something
        files = (trained.folder / "adapter").rglob("*")
        self.adapter_bytes[name] = sum(path.stat().st_size for path in files if path.is_file())
        self.parameters[name], self.percent[name] = trained.report.parameters, trained.report.percent
        log = read_lines(trained.folder / "log.jsonl")
        self.losses[name] = [line["loss"] for line in log if "loss" in line]
        return trained

    def score(self, trained: Trained, title: str, baseline: Any = "none") -> dict[str, float]:
        """Scores of a model, 0 to 1, by column of the table."""
        names = [name for name in COLUMNS if (self.data / name).is_dir()]
        with Bar(f"asking {title}", len(names)) as bar:
            done: set[str] = set()

            def progress(name: str, answered: int, total: int) -> None:
                if answered == total:
                    done.add(name)
                    bar.update(len(done))

            result = evaluate_model(
                trained.model, trained.processor, names, self.data,
                limit=self.limit, baseline=baseline, batch_size=128, progress=progress,
            )  # fmt: skip
        return {COLUMNS[name]: round(float(result[name]["score"]), 4) for name in names}

    def chance(self) -> dict[str, float]:
        """What answers without a look would score: the commonest answer, or another picture's caption."""
        scores = {}
        for name in COLUMNS:
            if not (self.data / name).is_dir():
                continue
            task, items = TASKS[name], TASKS[name].load(self.data)
            if name == "coco":
                images = [item.image for item in items if item.image is not None]
                other = shuffled_images(images, 0)
                caption = {item.image: task.reference(item) for item in items}
                given = [caption[other[image]] for image in images]
            else:
                truths = [task.reference(item) for item in items]
                given = [Counter(truths).most_common(1)[0][0]] * len(items)
            scores[COLUMNS[name]] = round(float(task.score(items, given)["score"]), 4)
        return scores

    def judge(self, scores: dict[str, dict[str, float]]) -> dict[str, Any]:
        """Whether the baselines are within .05 of chance on the yes/no benchmarks; printed whatever comes out."""
        gaps = {
            f"{baseline} {column}": round(abs(scores[baseline][column] - scores["chance"][column]), 4)
            for baseline in ("blind", "shuffled")
            for column in ("pope", "mme")
            if column in scores[baseline]
        }
        return {"gaps": gaps, "within": all(gap <= 0.05 for gap in gaps.values())}

    def pick_items(self) -> list[tuple[Path, str, str]]:
        """A few (image, question, truth) on scenes that no training saw, one scene each."""
        chosen: dict[Path, tuple[Path, str, str]] = {}
        names = [name for name in ("vqav2", "pope", "coco", "mme") if (self.data / name).is_dir()]
        pools = {name: TASKS[name].load(self.data) for name in names}
        for number in range(SCENES):
            name = names[number % len(names)]
            pool = pools[name]
            for item in pool[number * 37 % len(pool) :]:
                if item.image is not None and item.image not in chosen:
                    truth = TASKS[name].reference(item)
                    chosen[item.image] = (item.image, item.question, truth)
                    break
        return list(chosen.values())

    def answers(self, model: Any, processor: Any, items: list[tuple[Path, str, str]]) -> list[str]:
        asked = [
            ([Turn("user", f"<image>\n{question}")], [Image.open(path).convert("RGB")]) for path, question, _ in items
        ]
        return answer(model, processor, asked, max_new_tokens=40, batch_size=len(asked))

    def save_scenes(self, items: list[tuple[Path, str, str]], answers: dict[str, list[str]]) -> list[dict[str, Any]]:
        """The shown scenes as PNG, enlarged, with question, truth and every model's answer."""
        (self.folder / "scenes").mkdir(parents=True, exist_ok=True)
        shown = []
        for number, (path, question, truth) in enumerate(items):
            file = f"scenes/{number + 1}.png"
            with Image.open(path) as image:
                image.convert("RGB").resize((192, 192), Image.Resampling.NEAREST).save(self.folder / file)
            given = {name: texts[number] for name, texts in answers.items()}
            shown.append({"file": file, "question": question, "truth": truth, "answers": given})
        return shown
