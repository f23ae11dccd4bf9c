"""`normtune chat` in a terminal: what it prints is what the model answers, whoever is asked."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import normtune as nt
from asked import picture
from command import run
from normtune.chat import Turn
from normtune.evaluation import answer
from normtune.images import open_image


@pytest.fixture(scope="module")
def runs(mllm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapter folders `gains`, `gated` and `lora`, and a picture."""
    folder = tmp_path_factory.mktemp("runs")
    record: dict[str, Any] = {"base": {"model": {"path": str(mllm_folder), "dtype": "float32"}, "seed": 0}}
    for seed, (name, strategy) in enumerate(
        {"gains": "layernorm-simple", "gated": "layernorm-simple", "lora": "lora"}.items()
    ):
        model, _ = nt.load(str(mllm_folder))
        nt.apply(model, strategy)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        nt.save_adapter(model, folder / name, **record, **({"gate": "image"} if name == "gated" else {}))
    picture(0).save(folder / "a.png")
    return folder


class Terminal:
    """`normtune chat` with lines typed into it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys
        self.err = ""

    def __call__(self, *arguments: str, lines: Sequence[str] = (), code: int = 0) -> list[str]:
        said: Iterator[str] = iter([*lines, "/quit"])
        self.monkeypatch.setattr("builtins.input", lambda prompt: next(said))
        self.capsys.readouterr()
        assert run("chat", *arguments, "--max-new-tokens", "8") == code
        out, self.err = self.capsys.readouterr()
        return out.splitlines()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(monkeypatch, capsys)


@pytest.fixture(scope="module")
def reference(mllm_folder: Path, runs: Path) -> Any:
    """Greedy answers, `evaluation.answer` on a model with the adapter loaded."""
    model, processor = nt.load(str(mllm_folder))
    for name in ("gains", "lora"):
        nt.load_adapter(model, runs / name, name)

    def ask(adapter: str | None, turns: Sequence[Turn], image: Path | None = None) -> str:
        nt.set_adapter(model, adapter)
        return answer(model, processor, [(turns, [] if image is None else [open_image(image, "it")])], 8)[0]

    return ask


def test_a_conversation_with_several_adapters(terminal: Terminal, runs: Path, reference: Any) -> None:
    image = runs / "a.png"
    lines = [
        f"/image {image}",
        "What?",
        "/adapter none",
        "And now?",
        "/new",
        "/adapter gaits",
        "/adapter gated",
        "What?",
    ]
    out = terminal(str(runs / "gains"), "--adapter", f"gated={runs / 'gated'}", lines=lines)
    turns = [Turn("user", "<image>\nWhat?")]
    first = reference("gains", turns, image)
    second = reference(None, [*turns, Turn("assistant", first), Turn("user", "And now?")], image)
    assert [line.strip() for line in out[:2]] == [first, second] and first != second
    assert len(out) == 3 and out[2].strip() != reference(None, turns, image)
    assert "did you mean" in terminal.err
    assert len(re.findall(r"\[\d+ tokens, [\d.]+ tokens/s\]", terminal.err)) == 3


def test_a_gated_adapter_leaves_text_alone(terminal: Terminal, runs: Path, reference: Any) -> None:
    (out,) = terminal(str(runs / "gated"), "Hello there")
    assert out.strip() == reference(None, [Turn("user", "Hello there")])
    (other,) = terminal(str(runs / "gains"), "Hello there")
    assert other.strip() == reference("gains", [Turn("user", "Hello there")]) != out.strip()


def test_an_adapter_that_no_bank_takes(terminal: Terminal, runs: Path, reference: Any) -> None:
    (out,) = terminal(str(runs / "lora"), "What?", "--image", str(runs / "a.png"))
    asked = [Turn("user", "<image>\nWhat?")], runs / "a.png"
    assert out.strip() == reference("lora", *asked) != reference(None, *asked) and "gate" not in terminal.err
    record = json.loads((runs / "lora" / "adapter.json").read_text())
    shutil.copytree(runs / "lora", runs / "gated-lora")
    (runs / "gated-lora" / "adapter.json").write_text(json.dumps({**record, "gate": "image"}))
    (out,) = terminal(str(runs / "gated-lora"), "What?")
    assert out.strip() == reference("lora", [Turn("user", "What?")]) and "gate" in terminal.err
    terminal(str(runs / "lora"), "What?", "--adapter", f"gains={runs / 'gains'}", code=2)
    assert "LoRA" in terminal.err


def test_a_seed_draws_the_same_again(terminal: Terminal, runs: Path) -> None:
    def drawn(seed: int) -> list[str]:
        return terminal(str(runs / "gains"), "Hello", "--temperature", "1.5", "--top-p", "0.9", "--seed", str(seed))

    assert drawn(1) == drawn(1) and len({str(drawn(seed)) for seed in (1, 2, 3)}) > 1


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--top-p", "2"], "top_p"), (["--adapter", "x"], "NAME=FOLDER"), (["--adapter", "x=nowhere"], "nowhere"),
     (["--adapter", "none=gains"], "none")],
)  # fmt: skip
def test_wrong_options(terminal: Terminal, runs: Path, more: list[str], message: str) -> None:
    terminal(str(runs / "gains"), "Hello", *more, code=2)
    assert message in terminal.err and "Traceback" not in terminal.err


def test_a_conversation_beyond_the_context(terminal: Terminal, runs: Path) -> None:
    out = terminal(str(runs / "gains"), lines=["Hello " * 300, "Hello"])
    assert len(out) == 1 and "context" in terminal.err


def test_ctrl_c_ends_an_answer_and_no_conversation(
    terminal: Terminal, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from normtune.serving import Engine

    stream = Engine.stream

    def interrupted(self: Engine, turns: Sequence[Turn], *rest: Any) -> Iterator[Any]:
        pieces = stream(self, turns, *rest)
        yield next(pieces)
        if len(turns) == 1:
            raise KeyboardInterrupt
        yield from pieces

    monkeypatch.setattr(Engine, "stream", interrupted)
    out = terminal(str(runs / "gains"), lines=["Hello", "And now?"])
    first, second = map(int, re.findall(r"\[(\d+) tokens", terminal.err))
    assert len(out) == 2 and first < second == 8


def test_what_goes_wrong_ends_no_conversation(terminal: Terminal, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths that nobody can open, an answer that failed, Ctrl-C while a picture is prepared."""
    from normtune.serving import Engine, Piece

    stream = Engine.stream

    def troubled(self: Engine, turns: Sequence[Turn], *rest: Any) -> Iterator[Any]:
        if turns[-1].text == "Stop":
            raise KeyboardInterrupt
        failed = (Piece("", 1, "error", "RuntimeError: out of something") for _ in range(1))
        return failed if turns[-1].text == "Fail" else stream(self, turns, *rest)

    monkeypatch.setattr(Engine, "stream", troubled)
    lines = ["/image ~nobody-of-this-name/a.png", f"/image {'a' * 5000}", "Fail", "Stop", "Hello"]
    out = terminal(str(runs / "gains"), lines=lines)
    assert terminal.err.count("no picture") == 2 and "out of something" in terminal.err
    assert len([line for line in out if line]) == 1


def test_an_image_marker_in_an_answer_is_text(terminal: Terminal, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from normtune.serving import Engine, Piece

    stream = Engine.stream

    def marked(self: Engine, turns: Sequence[Turn], *rest: Any) -> Iterator[Any]:
        said = (Piece(text, 1, finish, None) for text, finish in (("an <image>", None), (".", "stop")))
        return said if len(turns) == 1 else stream(self, turns, *rest)

    monkeypatch.setattr(Engine, "stream", marked)
    out = terminal(str(runs / "gains"), lines=["Hello", "And now?"])
    assert out[0] == "an <image>." and len(out) == 2 and "image" not in terminal.err


def test_the_model_is_put_on_the_device(terminal: Terminal, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[str] = []
    monkeypatch.setattr("normtune.tuned.place", lambda model, device: placed.append(device))
    terminal(str(runs / "gains"), "Hello")
    terminal(str(runs / "lora"), "Hello", "--device", "cpu")  # its adapter comes later than its base
    assert placed == ["auto", "cpu", "cpu"]
    monkeypatch.undo()
    terminal(str(runs / "gains"), "Hello", "--device", "moon", code=2)
    assert "moon" in terminal.err


def test_lines_from_a_pipe(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One of them is no UTF-8."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a \xff\nHello\n"), "utf-8"))
    assert run("chat", str(runs / "gains"), "--max-new-tokens", "8") == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 and "surrogate" in err and err.count("tokens/s") == 1


def test_a_terminal_without_the_letters_of_an_answer(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from normtune.serving import Engine, Piece

    written = io.BytesIO()
    monkeypatch.setattr(Engine, "stream", lambda *given: (Piece("caf\u00e9", 1, "stop", None) for _ in range(1)))
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, "ascii"))
    assert run("chat", str(runs / "gains"), "Hello") == 0
    assert written.getvalue() == b"caf?\n"


def test_a_wrong_adapter_is_told_before_the_model_is_loaded(terminal: Terminal, runs: Path) -> None:
    terminal(str(runs / "no-model"), "--adapter", f"x={runs / 'no-adapter'}", code=2)
    assert "no-adapter (no such folder)" in terminal.err
