"""The server: the official client against a real one, what it refuses and survives, how it ends.

Plan: the real engine on a tiny model answers as `evaluation.answer` does; a scripted engine (served.py), which answers
when a test says so, for everything that depends on time: queue, limits, clients that leave, the end.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

import malformed
import normtune as nt
from asked import picture
from command import run
from normtune.chat import Turn
from normtune.evaluation import answer
from normtune.serving import Engine, remote, server
from normtune.serving.limits import ApiError, Held, Load, ServerSettings, read_body
from normtune.serving.protocol import IGNORED, MAX_STOPS, MAX_VALUES, NEUTRAL, read_request
from normtune.serving.server import TOGETHER
from normtune.serving.uploads import Encoded
from served import KEY, Scripted, Served, ask, eventually, serving
from test_engine import save_adapters, silence
from test_security import encoded

LENGTH = 12
PAGE = Path(__file__).parents[1] / "docs" / "serving.md"


@pytest.fixture
def engine() -> Scripted:
    return Scripted("a", "b", slots=2, max_queue=2)


@pytest.fixture
def served(engine: Scripted) -> Iterator[Served]:
    with serving(engine) as server:
        yield server


@pytest.fixture(scope="module")
def calm() -> Iterator[Served]:
    """For tests that leave nothing behind."""
    with serving(Scripted("a", "b")) as server:
        yield server


# --- the official client, the real engine


@pytest.fixture(scope="module")
def adapters(mllm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_adapters(tmp_path_factory.mktemp("adapters"), mllm_folder)


@pytest.fixture(scope="module")
def real(mllm_folder: Path, adapters: dict[str, Path]) -> Iterator[Served]:
    model, processor = nt.load(str(mllm_folder))
    with nt.bank(model, adapters) as bank, serving(Engine(bank, processor, slots=4), max_tokens=64) as server:
        yield server


def messages(text: str, number: int | None = None) -> list[Any]:
    """A question, about a picture if it has a number."""
    if number is None:
        return [{"role": "user", "content": text}]
    url = malformed.data_url(png_of(number))
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def png_of(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def offline(mllm_folder: Path, adapters: dict[str, Path]) -> dict[tuple[str, str, int | None], str]:
    """Greedy answers by (model, question, picture), each adapter loaded by itself."""
    found = {}
    asked: list[tuple[str, int | None]] = [("What is it?", None), ("What is in the image?", 0), ("How many?", 1)]
    for name in ("base", *adapters):
        model, processor = nt.load(str(mllm_folder))
        if name != "base":
            nt.load_adapter(model, adapters[name])
        silence(model, processor)
        for text, number in asked:
            if name == "gated" and number is None:
                continue
            turns = [Turn("user", text if number is None else f"<image>\n{text}")]
            images = [] if number is None else [picture(number)]
            found[name, text, number] = answer(model, processor, [(turns, images)], LENGTH, batch_size=1)[0]
    return found


def test_models(real: Served) -> None:
    client = real.client()
    assert [model.id for model in client.models.list()] == ["base", "gains", "whole", "gated"]
    assert client.models.retrieve("gains").owned_by == "normtune"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


def test_answers_are_the_offline_ones_mixed_and_at_once(real: Served, offline: dict[Any, str]) -> None:
    client = real.client()

    def one(job: tuple[str, str, int | None]) -> str:
        name, text, number = job
        reply = client.chat.completions.create(
            model=name, messages=messages(text, number), max_tokens=LENGTH, temperature=0
        )
        assert reply.usage is not None and reply.usage.completion_tokens <= LENGTH
        return str(reply.choices[0].message.content).strip()

    jobs = list(offline) * 3
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(one, jobs))
    assert found == [offline[job] for job in jobs]
    assert len(set(offline.values())) > len(offline) // 2  # adapters and pictures make a difference


def test_stream_is_the_whole(real: Served) -> None:
    client = real.client()
    whole = client.chat.completions.create(model="whole", messages=messages("How many?", 1), max_tokens=LENGTH)
    stream = client.chat.completions.create(
        model="whole", messages=messages("How many?", 1), max_tokens=LENGTH,
        stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and len({chunk.id for chunk in chunks}) == 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage and [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert whole.usage is not None and whole.usage.prompt_tokens > 16  # the image's tokens are counted
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


def test_seed_and_temperature(real: Served) -> None:
    client = real.client()

    def drawn(seed: int | None, temperature: float = 1.5) -> str | None:
        reply = client.chat.completions.create(
            model="gains", messages=messages("Tell."), max_completion_tokens=LENGTH,
            temperature=temperature, top_p=0.95, seed=seed,
        )  # fmt: skip
        return reply.choices[0].message.content

    assert drawn(3) == drawn(3) and len({drawn(seed) for seed in range(4)}) > 1
    assert drawn(1, 0) == drawn(2, 0)


def test_stop_is_never_shown(real: Served) -> None:
    client = real.client()
    asked: dict[str, Any] = {"model": "base", "messages": messages("What is it?"), "max_tokens": LENGTH}
    text = str(client.chat.completions.create(**asked).choices[0].message.content)
    stop = text[len(text) // 2 :][:2]
    reply = client.chat.completions.create(**asked, stop=stop).choices[0]
    assert reply.message.content == text[: text.index(stop)] and reply.finish_reason == "stop"
    streamed = client.chat.completions.create(**asked, stop=[stop, "unseen"], stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == reply.message.content


def test_length_left_open_ends_with_the_context(real: Served) -> None:
    client = real.client()
    reply = client.chat.completions.create(model="base", messages=messages("What is it?"))
    assert reply.usage is not None and reply.usage.completion_tokens <= 64
    long = "red circle " * 230
    short = client.chat.completions.create(model="base", messages=messages(long))
    assert short.usage is not None and short.usage.total_tokens <= real.engine.max_context
    with pytest.raises(openai.BadRequestError, match="context"):
        client.chat.completions.create(model="base", messages=messages(long), max_tokens=64)


def test_conversations_go_on(real: Served, mllm_folder: Path) -> None:
    turns = [("system", "Be short."), ("user", "A?"), ("assistant", "B."), ("user", "C?")]
    reply = real.client().chat.completions.create(
        model="base", messages=[{"role": role, "content": text} for role, text in turns], max_tokens=LENGTH
    )  # type: ignore[arg-type]
    model, processor = nt.load(str(mllm_folder))
    silence(model, processor)
    wanted = answer(model, processor, [([Turn(*turn) for turn in turns], [])], LENGTH, batch_size=1)[0]
    assert str(reply.choices[0].message.content).strip() == wanted


# --- what is refused


def test_five_hundred_wrong_requests(calm: Served) -> None:
    limit = calm.app.state.answers.settings.max_body
    wrong = malformed.requests(limit)
    assert len(wrong) == malformed.COUNT
    before = calm.engine.finished

    def parts(body: bytes) -> Iterator[bytes]:
        for start in range(0, len(body), 2**16):
            yield body[start : start + 2**16]

    for one in wrong:
        reply = calm.post(content=parts(one.body) if one.chunked else one.body, headers=one.headers)
        assert reply.status_code == one.status, (one.name, reply.text)
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
        assert error["message"] and len(error["message"]) <= 1000, one.name
    assert calm.post(ask("still here")).json()["choices"][0]["message"]["content"] == "still here"
    eventually(lambda: calm.engine.finished == before + 1)  # none of the others was answered
    assert Counter(one.status for one in wrong).keys() == {400, 401, 404, 413, 415}


ERRORS: dict[int, Any] = {
    400: (openai.BadRequestError, {"temperature": 3}, "temperature"),
    401: (openai.AuthenticationError, {}, None),
    404: (openai.NotFoundError, {"model": "c"}, "model"),
}


@pytest.mark.parametrize("status", ERRORS)
def test_errors_are_the_clients_own(calm: Served, status: int) -> None:
    kind, more, param = ERRORS[status]
    client = calm.client("wrong" if status == 401 else KEY)
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**ask("x", **more))
    assert caught.value.status_code == status and caught.value.param == param


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_what_asks_for_nothing_is_taken(name: str) -> None:
    for value in (None, *NEUTRAL[name]):
        assert read_request(json.dumps(ask("x", **{name: value})).encode()).turns == (Turn("user", "x"),)
    with pytest.raises(ApiError, match="is not supported") as caught:
        read_request(json.dumps(ask("x", **{name: "something"})).encode())
    assert caught.value.param == name


def test_parts_become_turns_with_places(calm: Served) -> None:
    url = malformed.data_url(malformed.picture(size=(9, 7)))
    parts = [
        *({"type": "text", "text": text} for text in ("one", "an <image>")),
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
        {"type": "text", "text": "two"},
    ]
    asked = [{"role": "developer", "content": "d"}, {"role": "user", "content": parts}]
    assert calm.post({"model": "a", "messages": asked, "user": "me", "metadata": {"x": 1}}).status_code == 200
    turns, sizes, adapter = calm.engine.seen[-1]
    assert turns == (Turn("system", "d"), Turn("user", "one\nan < image >\n<image>\ntwo"))
    assert sizes == [(9, 7)] and adapter == "a"
    assert read_request(json.dumps(ask("x", stop=["s"] * MAX_STOPS)).encode()).stop == ("s",) * MAX_STOPS


def test_an_answer_goes_back_as_a_turn(calm: Served) -> None:
    client, asked = calm.client(), [{"role": "user", "content": "one two"}]
    said = client.chat.completions.create(model="a", messages=asked).choices[0].message  # type: ignore[arg-type]
    for turn in (said, said.model_dump()):  # with refusal, tool_calls and others, all null
        client.chat.completions.create(model="a", messages=[*asked, turn, *asked])  # type: ignore[list-item]
        assert calm.engine.seen[-1][0] == (
            Turn("user", "one two"),
            Turn("assistant", "one two"),
            Turn("user", "one two"),
        )
    with pytest.raises(openai.BadRequestError, match="tool_calls"):
        turn = {**said.model_dump(), "tool_calls": [{"type": "function"}]}
        client.chat.completions.create(model="a", messages=[*asked, turn, *asked])  # type: ignore[list-item]


def test_values_are_limited_and_commas_are_not() -> None:
    texts = ["," * 2**20, '\\",' * 2**17, "\\"]
    for text in texts:
        assert read_request(json.dumps(ask(text)).encode()).turns == (Turn("user", text),)
    many = [0] * (MAX_VALUES + 2)
    for more in ({"stop": many}, {"tools": many}, {str(n): 0 for n in range(len(many))}):
        with pytest.raises(ApiError, match="too many values"):
            read_request(json.dumps(ask('\\",\\', **more)).encode())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_image_types(calm: Served, kind: str) -> None:
    reply = calm.post(malformed.with_image(malformed.data_url(encoded(kind), f"image/{kind.lower()}")))
    assert reply.status_code == 200 and calm.engine.seen[-1][1] == [(8, 8)]


RAW = {  # bytes on the wire -> status line that comes back
    "no HTTP": (b"hello\r\n\r\n", b"400"),
    "negative length": (b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", b"400"),
    "two lengths": (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", b"400"),
    "a header of 400 KB": (b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 400_000 + b"\r\n\r\n", b"4"),
    "unknown path": (b"GET /admin HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
    "wrong method": (b"PUT /health HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", b"405"),
    "no docs": (b"GET /docs HTTP/1.1\r\nHost: x\r\n\r\n", b"404"),
}


@pytest.mark.parametrize("name", RAW)
def test_raw_requests(calm: Served, name: str) -> None:
    sent, status = RAW[name]
    with socket.create_connection(("127.0.0.1", calm.port), timeout=10) as wire:
        wire.sendall(sent)
        assert wire.recv(100).startswith(b"HTTP/1.1 " + status)
    assert calm.get("/health").json() == {"status": "ok"}


def test_who_has_no_key_writes_nothing_into_the_log(calm: Served, caplog: pytest.LogCaptureFixture) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
    with socket.create_connection(("127.0.0.1", calm.port), timeout=10) as wire:
        wire.sendall(head)
        time.sleep(0.05)  # so that the head is read before the end
    with socket.create_connection(("127.0.0.1", calm.port), timeout=10) as wire:
        wire.sendall(head + b" " * 99)
        assert wire.recv(100).startswith(b"HTTP/1.1 401")  # the server has seen the other one leave
    assert not caplog.records


@pytest.mark.heavy
@pytest.mark.parametrize(
    "sent", [pytest.param(b"", marks=pytest.mark.slow), b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"]
)
def test_a_head_that_does_not_end(engine: Scripted, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(server, "KEPT", 0.5)
    engine.pause = 0.4
    with serving(engine) as served, socket.create_connection(("127.0.0.1", served.port), timeout=20) as wire:
        wire.sendall(sent)
        assert served.post(ask("longer than a head may take")).status_code == 200
        assert wire.recv(100) == b""
        with httpx.Client() as kept:  # one connection: the time begins anew with each request
            for _ in range(2):
                time.sleep(0.3)
                assert kept.get(served.url + "/health").status_code == 200


def test_key_guards_models_and_metrics_but_not_health(calm: Served) -> None:
    for path in ("/v1/models", "/v1/models/base", "/v1/nothing", "/metrics"):
        assert calm.http.get(calm.url + path).status_code == 401, path
    assert calm.http.get(calm.url + "/health").status_code == 200


def test_bodies_are_counted_together() -> None:
    load = Load(ServerSettings(max_body=100, max_bodies=150, max_requests=2))

    async def parts(*sizes: int) -> Any:
        for size in sizes:
            yield b"x" * size

    def read(held: Held, *sizes: int, declared: str | None = None) -> bytes:
        return asyncio.run(read_body(parts(*sizes), declared, 100, held))

    def refused(status: int, *arguments: Any, **more: Any) -> None:
        with pytest.raises(ApiError) as caught:
            read(*arguments, **more)
        assert caught.value.status == status

    with load.request() as first, load.request() as second, load.request() as third:
        first.begin()
        second.begin()
        with pytest.raises(ApiError, match="busy"):
            third.begin()
        with pytest.raises(ApiError, match="busy"), load.request():
            pass
        assert len(read(first, 60, 40)) == 100 and load.bytes == 100
        refused(413, second, declared="101")
        refused(429, second, 60)
        first.drop()
        refused(413, second, 60, 41)
        second.drop()
        assert len(read(second, 60)) == 60
    assert load.bytes == load.requests == 0


# --- addresses

ADDRESSES = {
    False: """127.0.0.1 127.255.0.1 0.0.0.0 10.1.2.3 172.16.0.1 172.31.255.255 192.168.1.1 169.254.169.254 100.64.0.1
        192.0.0.8 192.0.2.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1 240.0.0.1 255.255.255.255 192.88.99.1
        168.63.129.16 ::1 :: fe80::1 fe80::1%eth0 fc00::1 fd00:ec2::254 ff02::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1
        ::ffff:a9fe:a9fe ::127.0.0.1 64:ff9b::7f00:1 64:ff9b:1::1 2002:7f00:1:: 2001::1 2001:db8::1 3fff::1 100::1
        fec0::1""",
    True: "93.184.216.34 8.8.8.8 172.32.0.1 192.169.0.1 2606:2800:220:1:248:1893:25c8:1946 ::ffff:8.8.8.8 2a00::1",
}


@pytest.mark.parametrize("address, public", [(a, public) for public, text in ADDRESSES.items() for a in text.split()])
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert remote.is_public(address) is public


URLS = {  # -> what the resolver says, reason
    "http://intern.example/a.png": (["10.0.0.1"], "not public"),
    "http://both.example/a.png": (["93.184.216.34", "127.0.0.1"], "not public"),
    "http://nobody.example/a.png": ([], "not public"),
    "http://2130706433/": (["127.0.0.1"], "not public"),
    "http://[::ffff:127.0.0.1]/": (["::ffff:127.0.0.1"], "not public"),
    "http://ok.example:22/": (["93.184.216.34"], "another port"),
    "https://ok.example:80/": (["93.184.216.34"], "another port"),
    "http://user:word@ok.example/": (["93.184.216.34"], "without credentials"),
    "file:///etc/passwd": ([], "must be a data URL, or http"),
    "gopher://ok.example/": ([], "must be a data URL, or http"),
    "http:///a.png": ([], "must be a data URL, or http"),
    "//ok.example/a.png": ([], "must be a data URL, or http"),
    "http://ok.example/\x00": ([], "cannot be read"),
}


def fetched(url: str, limit: int = 10_000, seconds: float = 5) -> Encoded:
    with Load(ServerSettings()).request() as held:
        return asyncio.run(remote.fetch(url, "p", limit, seconds, held))


@pytest.mark.parametrize("url", URLS)
def test_urls_that_lead_inside(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses, reason = URLS[url]

    async def resolve(host: str, port: int) -> list[str]:
        return addresses

    monkeypatch.setattr(remote, "resolve", resolve)
    with pytest.raises(ApiError, match=reason) as caught:
        fetched(url)
    assert caught.value.status == 400 and caught.value.param == "p"


class Site(threading.Thread):
    """A server on this machine that answers each connection with the next of `replies`, and notes what it was asked."""

    def __init__(self, *replies: bytes) -> None:
        super().__init__(daemon=True)
        self.replies = replies
        self.asked: list[bytes] = []
        self.resolved: list[str] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.start()

    def run(self) -> None:
        for reply in self.replies:
            wire, _ = self.listener.accept()
            with wire:
                self.asked.append(wire.recv(10_000))
                wire.sendall(reply)


def reply(body: bytes, status: str = "200 OK", kind: str = "image/png", more: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{more}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


@pytest.fixture
def site_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes a Site that every name leads to, as if its address were public; notes the names that are resolved."""
    made = []

    def make(*replies: bytes) -> Site:
        site = Site(*replies)
        made.append(site)

        async def resolve(host: str, port: int) -> list[str]:
            site.resolved.append(host)
            return ["127.0.0.1"]

        monkeypatch.setattr(remote, "resolve", resolve)
        monkeypatch.setattr(remote, "is_public", lambda address: True)
        monkeypatch.setattr(remote, "PORTS", {"http": site.port})
        return site

    yield make
    for site in made:
        site.listener.close()


def test_remote_images_come_from_the_checked_address(site_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is resolved once, by us, and means nothing to whoever connects."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # the environment's proxy would resolve it again
    site = site_for(reply(malformed.picture()))
    found = fetched("http://cat.example/a.png?b=c")
    assert found == Encoded(malformed.picture(), "image/png", "p") and site.resolved == ["cat.example"]
    asked = site.asked[0].decode().lower()
    assert asked.startswith("get /a.png?b=c http/1.1") and "host: cat.example\r\n" in asked
    assert "cookie" not in asked and "authorization" not in asked


def test_a_certificate_must_be_the_names(site_for: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site = site_for(b"no certificate")
    monkeypatch.setattr(remote, "PORTS", {"https": site.port})
    with pytest.raises(ApiError, match="cannot be fetched"):
        fetched("https://cat.example/a.png")
    assert b"cat.example" in site.asked[0] and site.asked[0][:1] == b"\x16"  # the handshake names it, over TLS


REMOTE = {
    "redirect": (reply(b"", "302 Found", more="Location: http://127.0.0.1/\r\n"), "answered 302; redirects are not"),
    "missing": (reply(b"", "404 Not Found"), "answered 404"),
    "a page": (reply(b"<html>", kind="text/html"), "type 'text/html' are not supported"),
    "large": (reply(b"x" * 20_000), "more than 10,000 bytes"),
    "cut": (b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 99\r\n\r\nabc", "cannot be fetched"),
    "no HTTP": (b"220 mail.example ESMTP\r\n", "cannot be fetched"),
}


@pytest.mark.parametrize("name", REMOTE)
def test_remote_answers_that_are_refused(site_for: Any, name: str) -> None:
    sent, reason = REMOTE[name]
    site_for(sent)
    with pytest.raises(ApiError, match=reason):
        fetched("http://cat.example/a.png")


def test_remote_images_have_little_time(site_for: Any) -> None:
    site_for()  # accepts and says nothing
    with pytest.raises(ApiError, match=r"did not come within 0\.2 seconds"):
        fetched("http://cat.example/a.png", seconds=0.2)


def test_remote_images_through_the_server(site_for: Any, engine: Scripted) -> None:
    site_for(reply(malformed.picture()), reply(malformed.picture("JPEG")))
    with serving(engine, remote_images=True) as served:
        assert served.post(malformed.with_image("http://cat.example/a.png")).status_code == 200
        wrong = served.post(malformed.with_image("http://cat.example/b.png"))
        assert wrong.status_code == 400 and "its content is JPEG" in wrong.text
    assert engine.seen[0][1] == [(8, 8)] and len(engine.seen) == 1


# --- time


def test_queue_full(served: Served, engine: Scripted) -> None:
    engine.hold()
    with ThreadPoolExecutor(4) as pool:
        waiting = []
        for n in range(4):  # two slots, two that wait
            waiting.append(pool.submit(served.post, ask(f"number {n}")))
            eventually(lambda n=n: engine.running + len(engine.waiting) == n + 1 and engine.running == min(n + 1, 2))
        refused = served.post(ask("too many"))
        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
        with pytest.raises(openai.RateLimitError):
            served.client().chat.completions.create(**ask("x", stream=True))
        engine.go.set()
        assert sorted(w.result().json()["choices"][0]["message"]["content"] for w in waiting) == [
            f"number {n}" for n in range(4)
        ]


def test_more_requests_at_once_than_may_be(engine: Scripted) -> None:
    engine.hold()
    with serving(engine, max_requests=1) as served, ThreadPoolExecutor(1) as pool:
        first = pool.submit(served.post, ask("one"))
        eventually(lambda: engine.running)
        assert served.post(content=b"{").status_code == 429  # before its body is looked at
        engine.go.set()
        assert first.result().status_code == 200
        eventually(lambda: served.post(content=b"{").status_code == 400)  # its place is free a moment later


@pytest.mark.parametrize("streamed", [False, True])
def test_time_limit(engine: Scripted, streamed: bool) -> None:
    engine.pause = 30
    with serving(engine, timeout=0.4) as served:
        client = served.client()
        if streamed:
            with pytest.raises(openai.APIError, match=r"No answer within 0\.4 seconds"):
                list(client.chat.completions.create(**ask("one two", stream=True)))
        else:
            with pytest.raises(openai.InternalServerError) as caught:
                client.chat.completions.create(**ask("one two"))
            assert caught.value.status_code == 504
        eventually(lambda: engine.ended == ["cancelled"])
        engine.pause = 0
        eventually(lambda: served.post(ask("three four")).status_code == 200)  # its own time may be too short


def read_until(wire: socket.socket, mark: bytes) -> None:
    """Headers and events come as they are written."""
    found = b""
    while mark not in found:
        found += (more := wire.recv(10_000))
        assert more, found


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("held", [False, True], ids=["running", "before its first word"])
def test_a_client_that_leaves_frees_its_slot(served: Served, engine: Scripted, streamed: bool, held: bool) -> None:
    engine.pause = 30
    if held:
        engine.hold()
    wires = []
    body = json.dumps(ask("one two three", stream=streamed)).encode()
    head = f"Host: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    for _ in range(engine.slots):
        wires.append(socket.create_connection(("127.0.0.1", served.port)))
        wires[-1].sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + body)
    eventually(lambda: engine.running == engine.slots)
    if streamed and not held:
        read_until(wires[0], b"data: ")
    for wire in wires:
        wire.close()
    eventually(lambda: engine.ended == ["cancelled"] * engine.slots)
    engine.pause = 0
    engine.go.set()
    assert served.post(ask("next please")).status_code == 200
    eventually(lambda: values(served).get(("normtune_requests_total", ("499", "base"))) == engine.slots)


def test_an_upload_that_never_ends(engine: Scripted) -> None:
    with serving(engine, timeout=0.4, max_requests=1) as served:
        head = f"Host: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\nContent-Length: 100"
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as wire:
            wire.sendall(f'POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n\r\n{{"model":'.encode())
            assert served.post(ask("meanwhile")).status_code != 429  # it takes nobody's place
            assert wire.recv(1000).startswith(b"HTTP/1.1 408")
        eventually(lambda: served.post(ask("next")).status_code == 200)


@pytest.mark.parametrize("streamed", [False, True])
def test_an_engine_that_fails(served: Served, engine: Scripted, streamed: bool) -> None:
    engine.fail = True
    with pytest.raises(openai.APIError, match="no luck"):
        found = served.client().chat.completions.create(**ask("x", stream=streamed))
        list(found) if streamed else None
    engine.fail = False
    assert served.post(ask("x")).status_code == 200


# --- the end


def test_what_was_accepted_is_finished_and_nothing_more(engine: Scripted) -> None:
    engine.hold()
    with serving(engine) as served, ThreadPoolExecutor(2) as pool:
        running = pool.submit(served.post, ask("one two"))
        eventually(lambda: engine.running)
        with httpx.Client(trust_env=False) as other:
            assert other.get(served.url + "/health").status_code == 200
            served.app.state.answers.closing = True  # as the first signal does
            late = other.post(
                served.url + "/v1/chat/completions",
                json=ask("late"),
                headers={"Authorization": f"Bearer {KEY}"},
            )
            assert late.status_code == 503 and late.json()["error"]["code"] == "shutting_down"
            assert other.get(served.url + "/health").status_code == 503
        engine.go.set()
        assert running.result().json()["choices"][0]["message"]["content"] == "one two"


class Process:
    """`normtune serve` as a process of its own, with its address."""

    def __init__(self, *words: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "normtune", "serve", *words, "--port", "0"],
            stderr=subprocess.PIPE, text=True, env={**os.environ, "NORMTUNE_API_KEY": KEY},
        )  # fmt: skip
        self.lines: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"at (http://\S+)/v1", line):
                self.url = found.group(1)
                break
        else:
            raise AssertionError("".join(self.lines))

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    def end(self) -> tuple[int, str]:
        _, rest = self.process.communicate(timeout=60)
        return self.process.returncode, rest


@pytest.mark.heavy
@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT])
def test_a_signal_lets_a_stream_finish(mllm_folder: Path, adapters: dict[str, Path], number: signal.Signals) -> None:
    given = [word for name, path in adapters.items() for word in ("--adapter", f"{name}={path}")]
    server = Process(str(mllm_folder), *given, "--max-tokens", "400")
    assert any("serving base, gains, whole, gated at" in line for line in server.lines)
    assert any("3 adapters of " in line for line in server.lines)
    asked: dict[str, Any] = {"model": "gains", "messages": messages("Tell a long story."), "max_tokens": 400}
    whole = server.client().chat.completions.create(**asked)
    assert whole.usage is not None and whole.usage.completion_tokens > 100, "too short to be interrupted"
    stream = server.client().chat.completions.create(**asked, stream=True)
    texts = [next(stream).choices[0].delta.content or "", next(stream).choices[0].delta.content or ""]
    server.process.send_signal(number)
    texts += [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(texts) == whole.choices[0].message.content
    code, said = server.end()
    assert code == 0 and "finishing the requests that were accepted" in said and "Traceback" not in said
    with pytest.raises(openai.APIConnectionError):
        server.client().models.list()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(mllm_folder: Path, number: signal.Signals) -> None:
    server = Process(str(mllm_folder), "--max-tokens", "400")
    wire = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))
    head = f"Host: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\nContent-Length: 100"
    wire.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n\r\n{{".encode())  # the server waits for the rest
    time.sleep(TOGETHER)
    server.process.send_signal(number)
    assert server.process.stderr is not None
    assert "once more to stop at once" in server.process.stderr.readline()
    server.process.send_signal(number)  # at the same time: no second one
    time.sleep(2 * TOGETHER)
    assert server.process.poll() is None
    server.process.send_signal(number)
    code, said = server.end()
    assert code == 128 + number and "Traceback" not in said
    wire.close()


# --- metrics


def values(served: Served) -> dict[tuple[str, tuple[str, ...]], float]:
    """By name of the sample and the values of its labels, those in the order of their names."""
    found = {}
    for family in text_string_to_metric_families(served.get("/metrics").text):
        for sample in family.samples:
            labels = {**sample.labels}
            order = [labels.pop(key) for key in ("status", "kind") if key in labels]
            found[sample.name, (*order, *labels.values())] = sample.value
    return found


def test_metrics(served: Served, engine: Scripted) -> None:
    for model in ("base", "a", "a"):
        assert served.post(ask("one two three", model=model)).status_code == 200
    list(served.client().chat.completions.create(**ask("one two", model="b", stream=True)))
    assert served.post(ask("x", model="made\nup")).status_code == 404
    assert served.post(ask("x", n=2)).status_code == 400
    found = values(served)
    assert found["normtune_requests_total", ("200", "base")] == 1
    assert found["normtune_requests_total", ("200", "a")] == 2
    assert found["normtune_requests_total", ("404", "unknown")] == 1
    assert found["normtune_requests_total", ("400", "unknown")] == 1
    assert found["normtune_tokens_total", ("prompt", "a")] == found["normtune_tokens_total", ("completion", "a")] == 6
    assert found["normtune_request_seconds_count", ("a",)] == 2 and found["normtune_request_seconds_sum", ("a",)] > 0
    assert found["normtune_first_token_seconds_count", ("b",)] == 1
    assert ("normtune_first_token_seconds_count", ("a",)) not in found  # a whole answer has no first token
    eventually(lambda: values(served)["normtune_finished_requests_total", ()] == 4)
    engine.hold()
    with ThreadPoolExecutor(3) as pool:
        for n in range(3):
            pool.submit(served.post, ask("x"))
            eventually(lambda n=n: values(served)["normtune_running_requests", ()] == min(n + 1, 2))
        eventually(lambda: values(served)["normtune_queue_requests", ()] == 1)
        engine.go.set()


def test_metrics_of_the_real_engine(real: Served) -> None:
    names = {name for name, _ in values(real)}
    assert {
        "normtune_images_encoded_total",
        "normtune_image_cache_hits_total",
        "normtune_decoding_steps_total",
    } <= names


# --- the page and the command


def test_the_page_names_what_there_is(calm: Served, capsys: pytest.CaptureFixture[str]) -> None:
    page = PAGE.read_text()
    page = page[: page.index("## Other engines")]
    for name in (*NEUTRAL, *IGNORED):
        assert f"`{name}`" in page, name
    families = text_string_to_metric_families(calm.get("/metrics").text)
    shown = {f"{family.name}{'_total' * (family.type == 'counter')}" for family in families}
    named = set(re.findall(r"`(normtune_[a-z_]+)`", page))
    assert {name for name in shown if not name.endswith("_created")} == named
    assert run("serve", "--help") == 0
    options = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    assert set(re.findall(r"`(--[a-z][a-z-]+)`", page)) <= options


COMMANDS = {  # arguments -> message
    ("--adapter", "x"): "write NAME=FOLDER",
    ("--adapter", "=x"): "write NAME=FOLDER",
    ("--adapter", "a=x", "--adapter", "a=y"): "'a' is given twice",
    ("--adapter", "base=x"): "the base's; give --base-name",
    ("--api-key", " "): "the API key is empty",
    ("--port", "70000"): "--port",
    ("--adapter", "a=nowhere"): "no adapter in nowhere (no such folder)",
}


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_commands_that_are_wrong(
    mllm_folder: Path, arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("serve", str(mllm_folder), "--port", "0", *arguments) == 2
    assert COMMANDS[arguments] in capsys.readouterr().err


def test_a_wrong_adapter_is_told_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("serve", "no-model", "--port", "0", "--adapter", "a=no-adapter") == 2
    assert "no adapter in no-adapter (no such folder)" in capsys.readouterr().err


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert run("serve", "world:llm", "--port", str(other.getsockname()[1])) == 2
    assert "Choose another --host or --port" in capsys.readouterr().err


def test_an_empty_key_in_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A secret that was not filled in must not open the server to everyone."""
    monkeypatch.setenv("NORMTUNE_API_KEY", "")
    assert run("serve", "nowhere") == 2
    assert "the API key is empty" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("serve", "nowhere") == 2
    assert "pip install 'normtune[serve]'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_load_program_runs_small(tmp_path: Path) -> None:
    small = ["--requests", "60", "--clients", "12", "--alone", "12", "--questions", "6", "--steps", "2"]
    words = ["--runs", str(tmp_path / "runs"), "--json", str(tmp_path / "x.json")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.serve", *small, *words],
        cwd=PAGE.parents[1], capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads((tmp_path / "x.json").read_text())
    for way in ("batching", "alone"):
        assert found[way]["lost"] == found[way]["wrong"] == 0 and found[way]["latency_seconds"]["p99"] > 0
    assert found["batching"]["requests"] == 60 and 0 < found["batching"]["with_image"] < 60
    assert found["batching"]["steps"] < found["batching"]["tokens"] and "batching x" in done.stdout
