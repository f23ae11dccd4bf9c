"""The page in a browser: upload, ask, two side by side, stop, switch, messages, phones, dark, offline; and its key."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

import browser
from browser import SCHEMES, WIDTHS
from normtune.chat import Turn
from normtune.errors import InputError
from normtune.serving import Piece, QueueFull
from normtune.serving.limits import ServerSettings

pytest.importorskip("gradio", reason="needs gradio (pip install 'normtune[ui]')")
pytest.importorskip("uvicorn", reason="needs uvicorn (pip install 'normtune[serve]')")
pytestmark = pytest.mark.heavy


class FakeEngine:
    """Answers say what was asked: by which model, how many pictures, which turn. "slow" goes on until it is stopped."""

    max_context = 100

    def __init__(self, wait: float = 0.0) -> None:
        self.bank, self.wait, self.cancelled = SimpleNamespace(names=["colours", "shapes"]), wait, 0

    def prepare(self, turns: Sequence[Turn], images: Sequence[Image.Image], adapter: str | None) -> Any:
        if adapter not in (None, *self.bank.names):
            raise InputError(f"no adapter {adapter!r}")
        if "long" in turns[-1].text:
            raise InputError("the conversation has 900 tokens, but the model's context 512")
        assert sum(turn.text.count("<image>") for turn in turns) == len(images)
        return SimpleNamespace(turns=turns, images=images, adapter=adapter, tokens=40)

    def submit(self, prompt: Any, sampling: Any, on_piece: Callable[[Piece], None]) -> Any:
        question = prompt.turns[-1].text.rpartition("\n")[2]
        if "full" in question:
            raise QueueFull("the queue is full; ask again in a moment")
        assert sampling.max_new_tokens <= 60  # what the prompt leaves of the context
        number = sum(turn.role == "user" for turn in prompt.turns)
        sizes = " ".join(f"{each.width}x{each.height}" for each in prompt.images) or "none"
        text = (
            f"{prompt.adapter or 'base'} answers {question}, turn {number}, pictures {sizes}, t {sampling.temperature}"
        )
        words = ["on and on "] * 10_000 if "slow" in question else text.split(" ")
        stopped = threading.Event()

        def run() -> None:
            if "break" in question:
                on_piece(Piece("", 0, "error", "the model stumbled"))
                return
            for count, word in enumerate(words, 1):
                if stopped.wait(self.wait or 0.002):
                    self.cancelled += 1
                    on_piece(Piece("", count, "cancelled"))
                    return
                on_piece(Piece((" " if count > 1 else "") + word, count, "stop" if count == len(words) else None))

        threading.Thread(target=run, daemon=True).start()
        return SimpleNamespace(cancel=stopped.set, prompt_tokens=5)


@contextmanager
def served(engine: Any, settings: ServerSettings | None = None, **options: Any) -> Iterator[str]:
    """The page's address, served by a thread of this process until the end of the block."""
    import fastapi
    import uvicorn

    from normtune.serving.ui import mount

    app = fastapi.FastAPI()
    app.state.answers = SimpleNamespace(closing=False)
    mount(app, engine, settings=settings, **options)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=10))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/ui/"
        server.should_exit = app.state.answers.closing = True
        thread.join(10)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.chromium() as running:
        yield running


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def address(engine: FakeEngine) -> Iterator[str]:
    with served(engine, ServerSettings(max_body=200_000, max_pixels=10_000)) as url:
        yield url


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


class Tab:
    """What a person does on the page and reads there."""

    def __init__(self, page: Any) -> None:
        self.page = page
        page.set_default_timeout(15_000)

    def ask(self, text: str, *pictures: Path) -> None:
        if pictures:
            self.upload(*pictures)
        self.page.get_by_role("textbox", name="Question").fill(text)
        self.page.get_by_role("button", name="Ask", exact=True).click()

    def upload(self, *pictures: Path) -> None:
        self.page.set_input_files("#question input[type=file]", [str(path) for path in pictures])

    def choose(self, label: str, name: str) -> None:
        self.page.get_by_label(label).click()
        self.page.get_by_role("option", name=name, exact=True).click()

    def wait(self, text: str, side: int = 0) -> None:
        self.page.locator(f"#chat{side}").get_by_text(text).wait_for()

    def message(self) -> str:
        found = self.page.locator("#message [role=alert]")
        found.wait_for()
        return str(found.inner_text())


@contextmanager
def opened(chromium: Any, address: str, width: int = 1280, scheme: str = "light") -> Iterator[Tab]:
    """The page; at the end nothing may have been logged, nor asked of another host."""
    with browser.opened(chromium, address, width, scheme) as found:
        found.page.get_by_role("button", name="Ask", exact=True).wait_for()
        yield Tab(found.page)
        strangers = [line for line in found.asked if address.removesuffix("/ui/") not in line and "data:" not in line]
        assert [*found.logged, *strangers] == []


def test_a_picture_is_asked_about_and_the_conversation_remembered(chromium: Any, address: str, picture: Path) -> None:
    with opened(chromium, address) as tab:
        tab.ask("what is it?", picture)
        tab.wait("colours answers what is it?, turn 1, pictures 40x30, t 0")
        assert "tokens/s" in tab.page.locator("#figures0").inner_text()
        assert tab.page.get_by_role("textbox", name="Question").input_value() == ""
        tab.ask("and now?")
        tab.wait("colours answers and now?, turn 2, pictures 40x30")
        tab.page.get_by_role("button", name="New conversation").click()
        tab.page.get_by_text("Answers appear here.").first.wait_for()
        tab.ask("again?")
        tab.wait("colours answers again?, turn 1, pictures none")


def test_two_models_answer_side_by_side_and_one_that_joins_sees_the_pictures(
    chromium: Any, address: str, picture: Path
) -> None:
    with opened(chromium, address) as tab:
        assert not tab.page.locator("#chat1").is_visible()
        tab.ask("first", picture)
        tab.wait("colours answers first, turn 1")
        tab.choose("Side by side with", "base")
        tab.ask("second")
        tab.wait("colours answers second, turn 2, pictures 40x30")
        tab.wait("base answers second, turn 1, pictures 40x30", 1)
        assert "tokens/s" in tab.page.locator("#figures1").inner_text()
        assert tab.page.locator("#chat1 img").count() == 1
        tab.choose("Model", "shapes")
        tab.ask("third")
        tab.wait("shapes answers third, turn 3")
        tab.wait("base answers third, turn 2", 1)


def test_stop_keeps_what_was_said(chromium: Any, address: str, engine: FakeEngine) -> None:
    before = engine.cancelled
    with opened(chromium, address) as tab:
        stop = tab.page.get_by_role("button", name="Stop")
        assert stop.is_disabled()
        tab.ask("slow")
        tab.wait("on and on")
        stop.click()
        tab.page.locator("#figures0").get_by_text("stopped").wait_for()
        tab.ask("more")
        tab.wait("colours answers more, turn 2")
    assert engine.cancelled == before + 1


@pytest.mark.parametrize("end", ["closing the tab", "a new conversation"])
def test_leaving_stops_the_answer(chromium: Any, address: str, engine: FakeEngine, end: str) -> None:
    before = engine.cancelled
    with opened(chromium, address) as tab:
        tab.ask("slow")
        tab.wait("on and on")
        if end == "a new conversation":
            tab.page.get_by_role("button", name="New conversation").click()
            tab.page.get_by_text("Answers appear here.").first.wait_for()
            tab.ask("fresh")
            tab.wait("colours answers fresh, turn 1")
    deadline = time.monotonic() + 20
    while engine.cancelled == before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert engine.cancelled == before + 1


def test_adapters_come_and_go_while_the_page_is_open(chromium: Any, address: str, engine: FakeEngine) -> None:
    with opened(chromium, address) as tab:
        engine.bank.names = ["shapes", "maps"]
        try:
            tab.page.wait_for_function("document.querySelector('#first input').value === ''")  # colours was chosen
            tab.ask("anyone?")
            assert "choose a model" in tab.message()
            tab.choose("Model", "maps")
            tab.ask("anyone?")
            tab.wait("maps answers anyone?, turn 1")
        finally:
            engine.bank.names = ["colours", "shapes"]


def picture_of(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.png"
    if kind == "broken":
        path.write_bytes(b"no picture at all")
    elif kind == "pixels":
        Image.new("RGB", (101, 100)).save(path)
    return path


@pytest.mark.parametrize(
    ("question", "kind", "words"),
    [
        ("what is it?", "broken", "no image that Pillow knows"),
        ("what is it?", "pixels", "more than 10,000 pixels"),
        ("a full queue", "", "the queue is full; ask again"),
        ("too long", "", "has 900 tokens"),
        ("break", "", "the model stumbled"),
        ("  ", "", "ask something"),
    ],
)
def test_what_goes_wrong_is_told_on_one_line(
    chromium: Any, address: str, tmp_path: Path, question: str, kind: str, words: str
) -> None:
    with opened(chromium, address) as tab:
        tab.ask(question, *([picture_of(kind, tmp_path)] if kind else []))
        message = tab.message()
        assert words in message and "Traceback" not in message and "\n" not in message
        assert "/" not in message.replace("/s", "")  # no path of this machine
        tab.page.get_by_role("button", name="New conversation").click()
        tab.page.locator("#message [role=alert]").wait_for(state="detached")
        tab.ask("well?")
        tab.wait("colours answers well?, turn 1, pictures none")
        assert not tab.page.locator("#message [role=alert]").count()


def test_an_upload_that_is_too_large_or_no_picture_is_refused(chromium: Any, address: str, tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(bytes(300_000))
    (tmp_path / "notes.txt").write_text("no picture")
    with browser.opened(chromium, address, 1280, "light") as found:
        tab = Tab(found.page)
        tab.page.get_by_role("button", name="Ask", exact=True).wait_for()
        for name, words in (("large.png", "maximum allowed size"), ("notes.txt", "nvalid file type")):
            tab.upload(tmp_path / name)
            tab.page.get_by_text(words).first.wait_for()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_page_is_readable_in_narrow_and_wide_windows_light_and_dark(
    chromium: Any, address: str, picture: Path, width: int, scheme: str
) -> None:
    with opened(chromium, address, width, scheme) as tab:
        tab.choose("Side by side with", "base")
        tab.ask("what is it?" + " and" * 40 + " a" * 5 + "x" * 80, picture)
        tab.wait("base answers what is it?", 1)
        tab.page.get_by_role("button", name="Settings").click()
        tab.page.get_by_label("Seed").wait_for()
        boxes = [tab.page.locator(f"#chat{side}").bounding_box() for side in (0, 1)]
        assert (boxes[0]["y"] == boxes[1]["y"]) == (width > 700)  # one below the other on a phone
        assert [line for line in tab.page.evaluate(browser.CHECKS) if line.startswith(("wide", "contrast"))] == []
        unnamed = "all => all.filter(one => !one.labels?.length && !one.ariaLabel && one.type !== 'file').length"
        assert tab.page.locator("textarea, input").evaluate_all(unnamed) == 0


def test_keyboard_alone_asks_and_settings_reach_the_model(chromium: Any, address: str) -> None:
    with opened(chromium, address) as tab:
        tab.page.get_by_role("button", name="Settings").press("Enter")
        tab.page.get_by_role("spinbutton", name="Temperature").fill("0.5")
        tab.page.get_by_role("spinbutton", name="Temperature").press("Tab")
        tab.page.get_by_role("textbox", name="Question").focus()
        tab.page.keyboard.type("by keys")
        tab.page.keyboard.press("Enter")
        tab.wait("colours answers by keys, turn 1, pictures none, t 0.5")


def test_answers_are_text_and_ask_nothing_of_other_hosts(chromium: Any, address: str) -> None:
    with opened(chromium, address) as tab:
        text = '![x](http://example.com/x.png) <img src="http://example.com/y.png"> <b>a</b>  &amp; $$x$$'
        tab.ask(text)
        tab.wait(f"colours answers {text}, turn 1")


def test_browsers_are_told_to_ask_no_other_host(chromium: Any, address: str) -> None:
    with browser.opened(chromium, address, 1280, "light") as found:
        ask = "fetch('http://example.com/').then(() => 'reached', () => 'refused')"
        assert found.page.evaluate(ask) == "refused"
        assert any("Content Security Policy" in line for line in found.logged)
