"""The page in a browser: upload, ask, two side by side, stop, switch, messages, phones, dark, offline; and its key."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from PIL import Image

import browser
import normtune as nt
from browser import SCHEMES, WIDTHS
from normtune.chat import Turn
from normtune.errors import InputError
from normtune.serving import Piece, QueueFull
from normtune.serving.limits import ServerSettings

pytest.importorskip("gradio", reason="needs gradio (pip install 'normtune[ui]')")
pytest.importorskip("uvicorn", reason="needs uvicorn (pip install 'normtune[serve]')")
pytestmark = pytest.mark.heavy
WAIT = 60  # seconds that a busy machine may take for anything


class FakeEngine:
    """Answers say what was asked: by which model, how many pictures, which turn. "slow" goes on until it is stopped."""

    max_context = 100

    def __init__(self, wait: float = 0.0) -> None:
        self.bank, self.wait = SimpleNamespace(names=["colours", "shapes"]), wait
        self.cancelled: list[str] = []  # questions

    def prepare(self, turns: Sequence[Turn], images: Sequence[Image.Image], adapter: str | None) -> Any:
        if adapter not in (None, *self.bank.names):
            raise InputError(f"no adapter {adapter!r}")
        if "bug" in turns[-1].text:
            raise ZeroDivisionError("a trace of /this/machine")
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
                    self.cancelled.append(question)
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
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=60))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/ui/"
        server.should_exit = app.state.answers.closing = True
        thread.join(WAIT)
        assert not thread.is_alive(), "the server waits for open pages"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.chromium() as running:
        yield running


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def short_refresh() -> Iterator[None]:
    from normtune.serving import ui

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ui, "REFRESH", 0.5)
        yield


@pytest.fixture(scope="module")
def address(engine: FakeEngine, short_refresh: None) -> Iterator[str]:
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
        self.button("Ask").wait_for()

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=True)

    def ask(self, text: str, *pictures: Path) -> None:
        if pictures:
            self.upload(*pictures)
        self.page.get_by_role("textbox", name="Question").fill(text)
        self.button("Ask").click()

    def upload(self, *pictures: Path) -> None:
        self.page.set_input_files("#question input[type=file]", [str(path) for path in pictures])

    def choose(self, label: str, name: str) -> None:
        if self.page.get_by_label(label).input_value() == name:
            return
        self.page.get_by_label(label).click()
        self.page.get_by_role("option", name=name, exact=True).click()

    def wait(self, text: str, side: int = 0) -> None:
        self.page.locator(f"#chat{side}").get_by_text(text).wait_for()

    def figures(self, text: str, side: int = 0) -> None:
        """Waits for `text`, a regular expression, below a chat: the browser may show it after the answer."""
        self.page.locator(f"#figures{side}").get_by_text(re.compile(text)).wait_for()

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            self.page.wait_for_timeout(20)

    def settle(self, scheme: str) -> None:
        """Waits until the page has the colours of `scheme` and nothing moves: widths and colours change by and by."""
        self.page.wait_for_function(f"document.body.classList.contains('dark') === {str(scheme == 'dark').lower()}")
        self.page.evaluate("""async () => {
          const ends = one => one.effect.getComputedTiming().iterations < Infinity;
          const frame = () => new Promise(requestAnimationFrame);
          do { await frame(); await frame(); } while (document.getAnimations().some(ends));
        }""")

    def message(self) -> str:
        found = self.page.locator("#message [role=alert]")
        found.wait_for()
        return str(found.inner_text())

    def restart(self) -> None:
        def cleared(answer: Any) -> bool:
            asked = answer.request.post_data_json if "run/predict" in answer.url else None
            return asked is not None and asked["data"] == []

        with self.page.expect_response(cleared):  # the page is emptied by it, and by the last of what was forgotten
            self.button("New conversation").click()
        self.page.get_by_text("Answers appear here.").first.wait_for()
        self.page.locator("#message [role=alert]").wait_for(state="detached")


@contextmanager
def opened(chromium: Any, address: str, width: int = 1280, scheme: str = "light") -> Iterator[Tab]:
    """The page; at the end nothing may have been logged, nor asked of another host."""
    with browser.opened(chromium, address, width, scheme) as found:
        yield Tab(found.page)
        strangers = [line for line in found.asked if address.removesuffix("/ui/") not in line and "data:" not in line]
        assert [*found.logged, *strangers] == []


@pytest.fixture(scope="module")
def shared(chromium: Any, address: str) -> Iterator[Tab]:
    with opened(chromium, address) as tab:
        yield tab


@pytest.fixture
def tab(shared: Tab) -> Iterator[Tab]:
    """The page with a new conversation: loading it takes longer than most tests."""
    yield shared
    shared.choose("Model", "colours")
    shared.choose("Side by side with", "nothing")
    shared.restart()


def test_a_picture_is_asked_about_and_the_conversation_remembered(tab: Tab, picture: Path) -> None:
    tab.ask("what is it?", picture)
    tab.wait("colours answers what is it?, turn 1, pictures 40x30, t 0")
    tab.figures(r"\d+ tokens, [\d.]+ tokens/s, first after")
    tab.until(lambda: tab.page.get_by_role("textbox", name="Question").input_value() == "")
    tab.ask("and now?")
    tab.wait("colours answers and now?, turn 2, pictures 40x30")
    tab.restart()
    tab.ask("again?")
    tab.wait("colours answers again?, turn 1, pictures none")


def test_two_models_answer_side_by_side_and_one_that_joins_sees_the_pictures(tab: Tab, picture: Path) -> None:
    tab.page.locator("#chat1").wait_for(state="hidden")
    tab.ask("first", picture)
    tab.wait("colours answers first, turn 1")
    tab.choose("Side by side with", "base")
    tab.ask("second")
    tab.wait("colours answers second, turn 2, pictures 40x30")
    tab.wait("base answers second, turn 1, pictures 40x30", 1)
    tab.figures("tokens/s", 1)
    tab.page.locator("#chat1 img").wait_for()  # one, and not two
    tab.choose("Model", "shapes")
    tab.ask("third")
    tab.wait("shapes answers third, turn 3")
    tab.wait("base answers third, turn 2", 1)


def test_what_is_typed_after_new_conversation_stays(tab: Tab) -> None:
    """The box is emptied at the click, and not when the server has answered."""
    tab.ask("first")
    tab.wait("colours answers first, turn 1, pictures none, t 0.0")
    box = tab.page.get_by_role("textbox", name="Question")
    box.fill("to be dropped")

    def late(route: Any) -> None:
        if route.request.post_data_json["data"] == []:  # the click's; the timer asks as well
            tab.until(lambda: box.input_value() == "")
            box.fill("typed since")
        route.continue_()

    tab.page.route("**/run/predict*", late)
    tab.restart()
    tab.page.unroute("**/run/predict*")
    assert box.input_value() == "typed since"


def test_stop_keeps_what_was_said(tab: Tab, engine: FakeEngine) -> None:
    tab.page.locator("#stop[disabled]").wait_for()
    tab.ask("slow to stop")
    tab.wait("on and on")
    tab.button("Stop").click()
    tab.figures("stopped")
    tab.ask("more")
    tab.wait("colours answers more, turn 2")
    assert engine.cancelled.count("slow to stop") == 1


def test_a_new_conversation_and_a_closed_tab_stop_the_answer(chromium: Any, address: str, engine: FakeEngine) -> None:
    def stopped(question: str) -> None:
        deadline = time.monotonic() + WAIT
        while question not in engine.cancelled and time.monotonic() < deadline:
            time.sleep(0.05)
        assert engine.cancelled.count(question) == 1

    with opened(chromium, address) as tab:
        tab.ask("slow to forget")
        tab.wait("on and on")
        tab.restart()
        stopped("slow to forget")
        tab.ask("fresh")
        tab.wait("colours answers fresh, turn 1")
        tab.ask("slow to leave")
        tab.wait("on and on")
    stopped("slow to leave")


def test_adapters_come_and_go_while_the_page_is_open(tab: Tab, engine: FakeEngine) -> None:
    try:
        engine.bank.names = ["shapes", "maps"]
        tab.page.wait_for_function("document.querySelector('#first input').value === ''")  # colours was chosen
        tab.page.locator("#chat0").get_by_text("no model").wait_for()
        tab.ask("anyone?")
        assert "choose a model" in tab.message()
        tab.choose("Model", "maps")
        tab.ask("anyone?")
        tab.wait("maps answers anyone?, turn 1")
    finally:
        engine.bank.names = ["colours", "shapes"]
        tab.page.wait_for_function("document.querySelector('#first input').value === ''")


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
        pytest.param("what is it?", "pixels", "more than 10,000 pixels", marks=pytest.mark.slow),
        ("a full queue", "", "the queue is full; ask again"),
        pytest.param("too long", "", "has 900 tokens", marks=pytest.mark.slow),
        ("break", "", "the model stumbled"),
        ("bug", "", "the server failed; its log says why"),
        pytest.param("  ", "", "ask something", marks=pytest.mark.slow),
    ],
)
def test_what_goes_wrong_is_told_on_one_line(tab: Tab, tmp_path: Path, question: str, kind: str, words: str) -> None:
    tab.ask(question, *([picture_of(kind, tmp_path)] if kind else []))
    message = tab.message()
    assert words in message and "\n" not in message and "/" not in message  # no trace, no path of this machine
    tab.restart()
    tab.ask("well?")
    tab.wait("colours answers well?, turn 1, pictures none")


def test_keyboard_alone_asks_and_settings_reach_the_model(tab: Tab) -> None:
    tab.page.locator("#settings button").first.press("Enter")
    heat, box = tab.page.get_by_role("spinbutton", name="Temperature"), tab.page.get_by_role("textbox", name="Question")
    slider = tab.page.locator("#settings input[type=range]").first
    for turn, value in enumerate(("0.5", "0"), 1):
        heat.fill(value)
        heat.press("Tab")
        tab.until(lambda value=value: slider.input_value() == value)  # type: ignore[misc]  # the page has taken it
        box.focus()
        tab.page.keyboard.type(f"by keys at {value}")
        tab.until(lambda value=value: box.input_value() == f"by keys at {value}")  # type: ignore[misc]
        tab.page.keyboard.press("Enter")
        # to its last word: before, Enter asks nothing
        tab.wait(f"colours answers by keys at {value}, turn {turn}, pictures none, t {float(value)}")
    tab.page.get_by_label("Seed").fill("many")
    tab.ask("well?")
    assert "no whole number" in tab.message()
    tab.page.get_by_label("Seed").fill("")
    tab.page.locator("#settings button").first.press("Enter")


def test_answers_are_text_and_ask_nothing_of_other_hosts(tab: Tab) -> None:
    text = '![x](http://example.com/x.png) <img src="http://example.com/y.png"> <b>a</b>  &amp; $$x$$'
    tab.ask(text)
    tab.wait(f"colours answers {text}, turn 1")


def test_page_is_readable_in_narrow_and_wide_windows_light_and_dark(chromium: Any, address: str, picture: Path) -> None:
    with opened(chromium, address) as tab:
        tab.choose("Side by side with", "base")
        tab.ask("what is it?" + " and" * 40 + " a" * 5 + "x" * 80, picture)
        tab.wait("base answers what is it?", 1)
        tab.page.locator("#ask:not([disabled])").wait_for()
        tab.page.locator("#settings button").first.click()
        tab.page.get_by_label("Seed").wait_for()
        for scheme in SCHEMES:
            tab.page.emulate_media(color_scheme=scheme)
            for width in WIDTHS:
                tab.page.set_viewport_size({"width": width, "height": 900})
                tab.settle(scheme)
                tops = [tab.page.locator(f"#chat{side}").bounding_box()["y"] for side in (0, 1)]
                assert (tops[0] == tops[1]) == (width > 700)  # one below the other on a phone
                found = tab.page.evaluate(browser.CHECKS)
                assert [line for line in found if line.startswith(("wide", "contrast"))] == [], (scheme, width)
            paper = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 200) == (scheme == "dark")
        unnamed = "all => all.filter(one => !one.labels?.length && !one.ariaLabel && one.type !== 'file').length"
        assert tab.page.locator("textarea, input").evaluate_all(unnamed) == 0


def test_what_a_browser_refuses(chromium: Any, address: str, tmp_path: Path) -> None:
    """Uploads that are too large or no picture, and requests to other hosts; the console speaks of all of them."""
    (tmp_path / "large.png").write_bytes(bytes(300_000))
    (tmp_path / "notes.txt").write_text("no picture")
    with browser.opened(chromium, address, 1280, "light") as found:
        tab = Tab(found.page)
        for name, words in (("large.png", "maximum allowed size"), ("notes.txt", "nvalid file type")):
            tab.upload(tmp_path / name)
            tab.page.get_by_text(words).first.wait_for()
        ask = "fetch('http://example.com/').then(() => 'reached', () => 'refused')"
        assert found.page.evaluate(ask) == "refused"
        tab.until(lambda: any("Content Security Policy" in line for line in found.logged))


@pytest.mark.parametrize("path", ["http://example.com/a.png", "https://127.0.0.1/a.png", "/etc/passwd"])
def test_a_file_is_an_upload_and_nothing_else(address: str, engine: FakeEngine, path: str) -> None:
    """Otherwise the server would fetch what a client names, or show it what lies on its disk."""
    functions = httpx.get(f"{address}config", timeout=WAIT).json()["dependencies"]
    ask = next(each["id"] for each in functions if len(each["inputs"]) == 7)
    file = {"path": path, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
    data = [{"text": "well?", "files": [file]}, "colours", "<none>", 0, 1, 9, ""]
    call = {"data": data, "fn_index": ask, "session_hash": f"s{len(path)}"}
    assert httpx.post(f"{address}gradio_api/queue/join", json=call, timeout=WAIT).status_code == 200
    own = {"session_hash": call["session_hash"]}
    told = httpx.get(f"{address}gradio_api/queue/data", params=own, timeout=WAIT).text
    ended = [json.loads(line[6:]) for line in told.splitlines() if "process_completed" in line]
    assert [each["success"] for each in ended] == [False]
    assert "root:" not in told


def test_a_body_is_no_larger_than_an_upload(address: str) -> None:
    body = b'{"data": ["' + b"x" * 400_000 + b'"]}'
    for url in ("gradio_api/queue/join", "gradio_api/run/predict", "gradio_api/upload"):
        assert httpx.post(address + url, content=body, timeout=WAIT).status_code == 413
    chunks = (body[start : start + 50_000] for start in range(0, len(body), 50_000))
    assert httpx.post(f"{address}gradio_api/queue/join", content=chunks, timeout=WAIT).status_code == 413


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "HERE"}, 200),
        ({"Origin": "https://other.example", "Sec-Fetch-Site": "same-origin"}, 200),  # a proxy that changes Host
        ({"Origin": "https://other.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "HERE", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),  # another server of this machine
    ],
)
def test_pages_of_other_sites_upload_and_ask_nothing(
    address: str, picture: Path, headers: dict[str, str], status: int
) -> None:
    sent = {name: address.partition("/ui")[0] if value == "HERE" else value for name, value in headers.items()}
    for path, body in (("upload", {"files": {"files": picture.open("rb")}}), ("reset", {"json": {"event_id": "x"}})):
        answer = httpx.post(f"{address}gradio_api/{path}", headers=sent, timeout=WAIT, **body)  # type: ignore[arg-type]
        assert answer.status_code == status, path
    assert httpx.get(address, headers=sent, timeout=WAIT).status_code == 200  # a link leads here


def test_with_a_key_nothing_is_reached_before_it_is_given(engine: FakeEngine) -> None:
    with (
        served(engine, ServerSettings(api_key="k\N{LATIN SMALL LETTER E WITH ACUTE}y")) as url,
        httpx.Client(timeout=WAIT) as client,
    ):
        form = client.get(url)
        assert form.status_code == 401 and 'type="password"' in form.text and "gradio" not in form.text
        for path in ("config", "gradio_api/upload", "gradio_api/queue/join", "gradio_api/heartbeat/x", "theme.css"):
            assert client.get(url + path).status_code == client.post(url + path).status_code == 401
        assert client.post(url, content=b"key=" + b"x" * 5000).status_code == 413
        wrong = client.post(url, data={"key": "other"})
        assert wrong.status_code == 401 and "not the key" in wrong.text and not client.cookies
        right = client.post(url, data={"key": "k\N{LATIN SMALL LETTER E WITH ACUTE}y"})
        assert right.status_code == 303 and {"HttpOnly", "SameSite=strict"} <= set(
            right.headers["set-cookie"].split("; ")
        )
        assert "gradio_config" in client.get(url).text
        assert client.get(url + "config").status_code == 200


def test_two_servers_of_a_machine_each_keep_their_key(engine: FakeEngine) -> None:
    """A browser sends the cookies of one port to the other."""
    one, other = ServerSettings(api_key="one"), ServerSettings(api_key="other")
    with served(engine, one) as first, served(engine, other) as second, httpx.Client(timeout=WAIT) as client:
        for url, key in ((first, "one"), (second, "other")):
            assert client.post(url, data={"key": key}).status_code == 303
        assert [client.get(f"{url}config").status_code for url in (first, second)] == [200, 200]


def test_uploads_are_deleted_when_the_server_ends(engine: FakeEngine, picture: Path) -> None:
    with served(engine) as url:
        own = ("own.png", picture.read_bytes() + b"own")
        answer = httpx.post(f"{url}gradio_api/upload", files={"files": own}, timeout=WAIT)
        (kept,) = map(Path, answer.json())
        assert kept.is_file()
    assert not kept.exists()


def test_the_server_ends_while_a_page_is_open(engine: FakeEngine) -> None:
    with httpx.Client(timeout=WAIT) as client, served(engine) as url:
        request = client.build_request("GET", f"{url}gradio_api/heartbeat/open")
        assert client.send(request, stream=True).status_code == 200


def test_a_real_model_answers_as_it_does_offline(
    chromium: Any, mllm_folder: Path, tmp_path: Path, picture: Path
) -> None:
    from normtune.evaluation import answer
    from normtune.serving import Engine

    model, processor = nt.load(str(mllm_folder))
    expected = {}
    with Image.open(picture) as image:
        asked = [([Turn("user", "<image>\nIs there a red circle?")], [image.convert("RGB")])]
    expected["base"] = answer(model, processor, asked, 12, batch_size=1)[0]
    nt.apply(model, "layernorm-simple")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data *= 0.4
    folder = nt.save_adapter(model, tmp_path / "adapter")
    expected["tuned"] = answer(model, processor, asked, 12, batch_size=1)[0]
    assert expected["base"] != expected["tuned"]
    model, processor = nt.load(str(mllm_folder))
    settings = ServerSettings(max_tokens=12)
    with (
        nt.bank(model, {"tuned": folder}) as bank,
        Engine(bank, processor) as engine,
        served(engine, settings) as url,
        opened(chromium, url) as tab,
    ):
        tab.choose("Side by side with", "base")
        tab.ask("Is there a red circle?", picture)
        for side, name in enumerate(("tuned", "base")):
            tab.figures("12 tokens.*cut at the longest answer", side)
            said = tab.page.locator(f"#chat{side} [data-testid=bot]").last
            tab.until(lambda said=said, name=name: said.text_content().strip() == expected[name])


def test_conversations_are_bounded_and_forgotten_oldest_first() -> None:
    from normtune.serving.ui_conversations import Conversations, Picture

    tabs = Conversations(max_bytes=100, max_tabs=3)
    for name in "abc":
        tabs.of(name).pictures.append(Picture(Path(f"{name}.png"), bytes(40)))
        tabs.trim()
    assert [len(tabs.of(name).pictures) for name in "bc"] == [1, 1]
    assert tabs.of("a").pictures == []
    tabs.of("d")
    assert tabs.of("b").pictures == []  # the one unused for longest of more than three
    tabs.forget("c")
    assert tabs.of("c").pictures == []


def test_a_conversation_that_is_being_answered_is_kept_and_can_be_stopped() -> None:
    from normtune.serving.ui_conversations import Conversations, Picture

    tabs = Conversations(max_bytes=100, max_tabs=2)
    asked = tabs.of("a")
    asked.busy = True
    for name in "bcd":
        tabs.of(name).pictures.append(Picture(Path(f"{name}.png"), bytes(90)))
        tabs.trim()
    assert tabs.busy and tabs.of("a") is asked
    tabs.of("e").busy = True
    assert tabs.of("f") is tabs.of("f")  # the newest stays, though all others are busy


def test_an_answer_with_an_images_marker_ends_no_conversation() -> None:
    from normtune.serving import Sampling
    from normtune.serving.ui_conversations import Conversation, ask

    class Says(FakeEngine):
        def submit(self, prompt: Any, sampling: Any, on_piece: Callable[[Piece], None]) -> Any:
            on_piece(Piece("the tag <image>", 3, "stop"))
            return SimpleNamespace(cancel=lambda: None)

    async def twice() -> list[str]:
        said = Conversation()
        for _ in range(2):
            asked = ask(Says(), said, "which?", [], [None], Sampling(5), ServerSettings())  # type: ignore[arg-type]
            shown = [each[0].text async for each in asked]
        return [*(turn.text for turn in said.sides[0].turns), shown[-1]]

    with ThreadPoolExecutor(1) as thread:  # this one may have the browser's event loop
        texts = thread.submit(asyncio.run, twice()).result()
    assert texts == [*["which?", "the tag < image >"] * 2, "the tag <image>"]


TAB: Any = SimpleNamespace(session_hash="tab")


def page_of(engine: Any) -> Any:
    from normtune.serving.ui import Page

    return Page(engine, ServerSettings())


def updates_of(page: Any, question: str, then: Callable[[], None] = lambda: None) -> list[Any]:
    """What `Page.ask` tells the page; `then` is called once the model speaks."""

    async def told() -> list[Any]:
        found = []
        async for update in page.ask({"text": question}, "colours", "<none>", 0, 1, 9, "", TAB):
            found.append(update)
            if question in str(update) and "on and on" in str(update):
                then()
        return found

    with ThreadPoolExecutor(1) as thread:  # this one may have the browser's event loop
        return thread.submit(asyncio.run, told()).result(WAIT)


def test_the_last_that_a_page_hears_of_a_forgotten_conversation_is_that_it_is_empty(engine: FakeEngine) -> None:
    """The browser handles this event and the click on "New conversation" at once, in an order that is open."""
    from gradio import skip

    from normtune.serving.ui import EMPTY

    page = page_of(engine)
    *_, last = updates_of(page, "slow", lambda: page.clear(TAB))
    assert last[1:5] == EMPTY[:4]
    assert last[5] == skip()  # the message may be that of a question that failed since

    def begin_anew() -> None:
        page.clear(TAB)
        page.conversations.of("tab").busy = True

    told = updates_of(page, "slow", begin_anew)
    assert not any(update[1:5] == EMPTY[:4] for update in told)  # it would empty what has been asked since


@pytest.mark.parametrize("question", ["too long", "bug"])
def test_nothing_is_told_of_what_is_wrong_with_a_forgotten_question(question: str) -> None:
    class Forgets(FakeEngine):
        def prepare(self, *asked: Any) -> Any:
            page.clear(TAB)
            return super().prepare(*asked)

    page = page_of(Forgets())
    assert "alert" not in str(updates_of(page, question))


def test_a_page_that_is_opened_when_the_last_adapter_is_gone() -> None:
    engine = FakeEngine()
    page = page_of(engine)
    refresh = next(each for each in page.build().fns.values() if each.name == "refresh")
    engine.bank.names = []
    names, first, _ = page.refresh(refresh.inputs[0].value, "colours", "<none>")
    assert names == [] and first["value"] is None


def test_a_question_forgotten_while_it_is_prepared_is_not_asked() -> None:
    from normtune.serving import Sampling
    from normtune.serving.ui_conversations import Conversations, ask

    tabs = Conversations()

    class Slow(FakeEngine):
        def prepare(self, *question: Any) -> Any:
            tabs.forget("tab")
            return super().prepare(*question)

        def submit(self, *asked: Any) -> Any:
            raise AssertionError("asked")

    async def run() -> list[Any]:
        return [each async for each in ask(Slow(), tabs.of("tab"), "a", [], [None], Sampling(5), ServerSettings())]  # type: ignore[arg-type]

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(asyncio.run, run()).result() == []


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "normtune.serving.ui", raising=False)
    with pytest.raises(InputError, match=re.escape("pip install 'normtune[ui]'")):
        import normtune.serving.ui  # noqa: F401


def test_uploads_lie_in_a_folder_of_this_process() -> None:
    """Another server on the machine that is sent the same picture deletes it when it ends."""
    pytest.importorskip("gradio")
    from gradio.utils import get_upload_folder

    import normtune.serving.ui

    assert normtune.serving.ui.mount
    assert Path(get_upload_folder()).name.startswith("normtune-ui-")
