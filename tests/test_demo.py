"""The demo at smoke size: what it writes, what it prints, and that the report needs nothing from outside."""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest

from command import run
from normtune.cli import demo_runs
from normtune.cli.demo import next_folder
from normtune.cli.demo_report import verdict

pytestmark = pytest.mark.heavy
ROWS = ("chance", "stage1", "connector", "connector+embed+head", "layernorm-simple", "layernorm", "blind", "shuffled")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("demo") / "out"
    printed = io.StringIO()
    small = {"stages.0.max_steps": 3, "stages.1.max_steps": 3, "evaluate.limit": 24}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(demo_runs, "QUICK", small)
        assert run("demo", "--quick", "--json", "--out", str(folder)) == 0
    return json.loads(printed.getvalue())  # type: ignore[no-any-return]


def test_json_has_every_row_and_column(result: dict[str, Any]) -> None:
    assert set(result["scores"]) == set(ROWS)
    for row in ROWS:
        assert {"pope", "mme", "vqav2", "caption"} <= set(result["scores"][row])
        assert all(0 <= score <= 1 for score in result["scores"][row].values())
    assert result["seconds"] > 0 and result["peak_rss_bytes"] > 1e8
    sizes = result["adapter_bytes"]
    assert sizes["layernorm-simple"] < sizes["layernorm"]


def test_folder_holds_runs_scenes_and_report(result: dict[str, Any]) -> None:
    folder = Path(result["run"])
    for name in ("stage1", "connector", "connector-embed-head", "layernorm-simple", "layernorm"):
        assert (folder / name / "adapter" / "adapter.safetensors").is_file()
    assert len(list((folder / "scenes").glob("*.png"))) >= 4
    facts = json.loads((folder / "demo.json").read_text())
    assert set(facts["scenes"][0]["answers"]) == {"base", "stage1", "layernorm-simple", "layernorm"}


def test_report_is_one_file_that_asks_nobody(result: dict[str, Any]) -> None:
    page = (Path(result["run"]) / "report.html").read_text()
    HTMLParser().feed(page)
    assert not re.search(r"(src|href)=['\"](?!data:|#)|url\((?!#)", page) and "<script" not in page
    assert page.count("<svg") == 5 and page.count("data:image/png;base64") >= 4
    for row in (
        "stage 1 only",
        "connector only",
        "no norms",
        "norm gains alone",
        "no image",
        "another image",
        "chance",
    ):
        assert row in page


def test_runs_can_be_talked_to(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    scene = str(Path(result["run"]) / "scenes" / "1.png")
    assert run("chat", f"{result['run']}/layernorm", "Is there a red circle in the image?", "--image", scene) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_a_finished_demo_is_served_with_its_page(result: dict[str, Any]) -> None:
    pytest.importorskip("gradio", reason="needs gradio (pip install 'normtune[ui]')")
    command = [sys.executable, "-m", "normtune", "demo", "--ui", "--port", "0", "--out", result["run"]]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        ready = next(line for line in server.stderr if "page at" in line)
        page, names = re.findall(r"(http://\S+/ui), API at \S+/v1: (.*);", ready)[0]
        assert names.split(", ") == [
            "base",
            "layernorm",
            "layernorm-simple",
            "connector-embed-head",
            "connector",
            "stage1",
        ]
        config = httpx.get(f"{page}/config").json()
        (samples,) = [part["props"] for part in config["components"] if part["type"] == "dataset"]
        assert len(samples["samples"]) == len(list((Path(result["run"]) / "scenes").glob("*.png")))
        server.send_signal(signal.SIGINT)
        server.stderr.read()
    assert server.returncode == 0


def test_an_existing_folder_is_refused(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("demo", "--quick", "--out", result["run"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_folders_are_numbered(tmp_path: Path) -> None:
    assert next_folder(tmp_path).name == "demo-1"
    (tmp_path / "demo-1").mkdir()
    assert next_folder(tmp_path).name == "demo-2"


@pytest.mark.parametrize(("gap", "words"), [(0.01, "Baselines hold"), (0.2, "do NOT hold")])
def test_the_report_says_so_whatever_comes_out(gap: float, words: str) -> None:
    facts = {"quick": False, "baselines": {"gaps": {"blind pope": gap}, "within": gap <= 0.05}}
    assert words in verdict(facts)


@pytest.mark.slow
def test_the_whole_demo_keeps_its_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("demo", "--json", "--out", str(tmp_path / "demo")) == 0
    facts = json.loads(capsys.readouterr().out)
    scores = facts["scores"]
    assert scores["stage1"]["pope"] <= 0.80
    assert scores["layernorm-simple"]["pope"] >= 0.80
    assert scores["layernorm"]["pope"] >= 0.90
    for baseline in ("blind", "shuffled"):
        for column in ("pope", "mme"):
            assert abs(scores[baseline][column] - scores["chance"][column]) <= 0.05
    assert facts["peak_rss_bytes"] <= 2e9
