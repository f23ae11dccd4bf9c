"""A server in a thread, and an engine that answers when the test says so.

`Scripted` has the surface of `serving.Engine` that the server uses: it counts words instead of tokens and says back the
last turn, a word a piece; `hold()` stops it before each answer's first word until `go` is set.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import openai

from normtune.errors import InputError
from normtune.serving import Closed, Piece, QueueFull, Sampling
from normtune.serving.app import create_app
from normtune.serving.limits import ServerSettings
from normtune.serving.server import Server, listen

KEY = "secret-key"


@dataclass
class ScriptedJob:
    prompt_tokens: int
    words: list[str]
    limit: int
    on_piece: Callable[[Piece], None]
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.cancelled.set()


class Scripted:
    """An engine of `slots` threads; `pause` seconds before each word but the first."""

    def __init__(self, *names: str, slots: int = 4, max_queue: int = 8, max_context: int | None = 200) -> None:
        self.bank = SimpleNamespace(names=list(names))
        self.slots, self.max_queue, self.max_context = slots, max_queue, max_context
        self.go, self.pause, self.fail = threading.Event(), 0.0, False
        self.go.set()
        self.seen: list[Any] = []  # (turns, image sizes, adapter) of each prompt
        self.ended: list[str] = []
        self.change = threading.Condition()
        self.waiting: list[ScriptedJob] = []
        self.running = self.finished = self.tokens = 0
        self.closing = False

    def hold(self) -> None:
        self.go.clear()

    def start(self) -> None:
        for _ in range(self.slots):
            threading.Thread(target=self._work, daemon=True).start()

    def close(self, drain: bool = True, timeout: float | None = None) -> None:
        with self.change:
            self.closing = True
            self.change.notify_all()

    def prepare(self, turns: Sequence[Any], images: Sequence[Any], adapter: str | None) -> Any:
        self.seen.append((turns, [image.size for image in images], adapter))
        count = sum(len(turn.text.split()) for turn in turns)
        if self.max_context is not None and count >= self.max_context:
            raise InputError(f"the prompt has {count} tokens, and the context of the model {self.max_context}")
        return SimpleNamespace(tokens=count, text=turns[-1].text)

    def submit(self, prompt: Any, sampling: Sampling, on_piece: Any, *, whole: bool = False) -> ScriptedJob:
        with self.change:
            if self.closing:
                raise Closed("closed")
            if len(self.waiting) >= self.max_queue:
                raise QueueFull("full")
            job = ScriptedJob(prompt.tokens, prompt.text.split(), sampling.max_new_tokens, on_piece)
            self.waiting.append(job)
            self.change.notify()
        return job

    @property
    def stats(self) -> Any:
        return SimpleNamespace(
            running=self.running, waiting=len(self.waiting), admitted=self.running + self.finished,
            finished=self.finished, tokens=self.tokens, steps=self.tokens, images_encoded=0, image_cache_hits=0,
        )  # fmt: skip

    def _work(self) -> None:
        while True:
            with self.change:
                while not self.waiting:
                    self.change.wait()
                job = self.waiting.pop(0)
                self.running += 1
            finish, done, error = self._answer(job)
            with self.change:
                self.running -= 1
                self.finished += 1
            self.ended.append(finish)
            with contextlib.suppress(RuntimeError):  # the loop is closed
                job.on_piece(Piece("", done, finish, error))  # type: ignore[arg-type]

    def _answer(self, job: ScriptedJob) -> tuple[str, int, str | None]:
        while not self.go.wait(0.005):
            if job.cancelled.is_set():
                return "cancelled", 0, None
        if self.fail:
            return "error", 0, "RuntimeError: no luck"
        for n, word in enumerate(job.words):
            if n == job.limit:
                return "length", n, None
            if job.cancelled.wait(self.pause if n else 0) or job.cancelled.is_set():
                return "cancelled", n, None
            self.tokens += 1
            job.on_piece(Piece(word if n == 0 else f" {word}", n + 1))
        return "stop", len(job.words), None


@dataclass
class Served:
    """A server that runs: its address and its parts."""

    engine: Any
    app: Any
    port: int
    http: httpx.Client

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str = KEY, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, **options})

    def post(self, document: Any = None, *, content: bytes | None = None, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **options.pop("headers", {})}
        body: dict[str, Any] = {"json": document} if content is None else {"content": content}
        url = f"{self.url}/v1/chat/completions"
        return self.http.post(url, headers=headers, **body, **options)

    def get(self, path: str) -> httpx.Response:
        return self.http.get(self.url + path, headers={"Authorization": f"Bearer {KEY}"})


@contextlib.contextmanager
def serving(engine: Any, **settings: Any) -> Iterator[Served]:
    """A real server on a free port of this machine, in a thread."""
    options = ServerSettings(**{"api_key": KEY, **settings})
    app = create_app(engine, options)
    server = Server(app, options)
    with listen("127.0.0.1", 0) as listener:
        engine.start()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            eventually(lambda: server.started)
            with httpx.Client(timeout=30, trust_env=False) as http:
                yield Served(engine, app, listener.getsockname()[1], http)
        finally:
            server.should_exit = True
            thread.join(30)
            engine.close(drain=False)
            assert not thread.is_alive()


def eventually(condition: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def ask(text: str, **more: Any) -> dict[str, Any]:
    """A request's document."""
    return {"model": "base", "messages": [{"role": "user", "content": text}], **more}
