"""What the README and the shipped recipes promise is true: recipes train, commands parse, the Python example runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from normtune.cli import app
from normtune.recipe import load_recipe
from normtune.training import train
from toys import toy_data

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_shipped_recipe_takes_a_step(path: Path, llm_folder: Path, vision_folder: Path, tmp_path: Path) -> None:
    data = toy_data(tmp_path / "toys", 8)
    recipe = load_recipe(path).model_dump(mode="json")
    assert recipe["name"]
    recipe["model"].update(llm=str(llm_folder), vision=str(vision_folder))
    for stage in recipe["stages"]:
        stage.update(data=[{"path": str(data / "data.json"), "images": str(data / "images")}], max_steps=1)
    run = train(recipe, out=tmp_path / "run", quiet=True)
    assert (run.folder / "adapter" / "adapter.json").is_file()


def test_there_are_the_three_recipes_and_two_extend() -> None:
    assert {path.name for path in RECIPES} >= {"world.yaml", "smollm2-siglip.yaml", "llama2-7b-clip.yaml"}
    assert any("extends:" in path.read_text() for path in RECIPES)


def commands() -> list[list[str]]:
    """Every `normtune ...` line of the README's code blocks, continued lines joined."""
    blocks = "\n".join(re.findall(r"```(?:bash|sh)?\n(.*?)```", README, re.S)).replace("\\\n", " ")
    lines = [line.split("#")[0].split(">")[0].strip() for line in blocks.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("normtune ")]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command_of_the_readme_parses(words: list[str]) -> None:
    group: Any = typer.main.get_command(app)
    command = group.commands[words[1]]
    command.make_context(words[1], list(words[2:]))


def test_make_commands_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([a-z-]+)\b", README)) <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_python_of_the_readme_runs(
    llm_folder: Path, vision_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    code = block.split("run = nt.train")[0]
    code = code.replace('llm="path-or-hub-id"', f"llm={str(llm_folder)!r}").replace(
        '"path-or-hub-id"', repr(str(vision_folder))
    )
    training = "for p in model.parameters():\n    p.data.add_(0.1 * p.requires_grad)\n"
    code = code.replace("...  ", training + "# ", 1)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "adapter" / "adapter.safetensors").is_file()
    assert names["report"].parameters == 4 * 32
