"""The house rules that a machine can check: ranks of imports, sizes of modules, start-up, what ships."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "normtune"
# A module may import modules of a lower rank only; a package (recipe, kernels, tasks, ...) counts as one module.
RANKS = {
    "errors": -1,
    "layers": -1,
    **dict.fromkeys(("recipe", "structure", "chat", "kernels", "tasks", "runlog", "progress", "images"), 0),
    "reporting": 0,
    **dict.fromkeys(("data", "encoders", "model", "pretrained", "probes", "processors", "templates", "skeletons"), 1),
    "strategy": 2,
    **dict.fromkeys(("adapter", "step", "tuned", "checkpoint", "accounting", "features", "flops", "memory"), 3),
    **dict.fromkeys(("sharding", "bank"), 3),
    **dict.fromkeys(("training", "evaluation", "analysis", "comparison", "serving", "exporting", "world"), 4),
    **dict.fromkeys(("cli", "__init__"), 5),
    "__main__": 6,
}
# Neighbours of one rank that may be used by another of that rank: parts of one room that outgrew one file.
WITHIN = {
    "model": {"encoders", "pretrained", "probes", "processors", "templates"},
    "encoders": {"pretrained"},
    "probes": {"pretrained"},
    "processors": {"pretrained"},
    "templates": {"pretrained"},
    "skeletons": {"model", "pretrained"},
    "tuned": {"adapter"},
    "checkpoint": {"adapter"},
    "step": {"features", "flops", "sharding"},
    "features": {"tuned"},
    "memory": {"step", "flops", "accounting", "sharding"},
    "bank": {"adapter"},
    "analysis": {"evaluation"},
    "serving": {"evaluation"},
    "comparison": {"training", "evaluation", "analysis"},
}
FILES = sorted(SOURCE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Names of our own top-level modules that a file imports anywhere, type checking included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "normtune" else [base]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("normtune.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_down(path: Path) -> None:
    own = room(path)
    assert own in RANKS, f"give {own} a rank, here and in docs/design.md"
    for other in imports(path) - {own, "__version__"}:
        down = RANKS[other] < RANKS[own]
        assert down or other in WITHIN.get(own, ()), f"{own} (rank {RANKS[own]}) imports {other} ({RANKS[other]})"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= 75, f"{node.name} has {length} lines"


@pytest.mark.slow
def test_core_needs_no_pydantic() -> None:
    code = "import sys, normtune.strategy, normtune.memory; assert 'pydantic' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_and_help_need_no_torch() -> None:
    code = "import sys, normtune, normtune.recipe; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = (
        "import sys\nfrom normtune.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_public_name_exists() -> None:
    import normtune

    assert set(normtune._HOMES) | {"train", "evaluate", "plan", "compare", "analyze"} == set(normtune.__all__)
    for name in normtune.__all__:
        assert callable(getattr(normtune, name))


def test_constraints_pin_what_the_project_needs() -> None:
    pins = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {item.split(">")[0].split("[")[0].strip().lower() for item in wanted}
    assert names <= pins | {"jinja2"}
    assert "torchvision" not in pins


def test_no_path_of_a_machine_and_nothing_large() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False).stdout
    files = [ROOT / name.decode() for name in listed.split(b"\0") if name]
    if not files:
        pytest.skip("not a git checkout")
    assert sum(f.stat().st_size for f in files if f.is_file()) < 14e6
    for file in files:
        assert file.stat().st_size < 5e6, file
        if file.suffix in (".py", ".md", ".yaml", ".toml"):
            text = file.read_text()
            assert not any(f"/{name}/" in text for name in ("home/user", "root/.")), file
