"""Five hundred requests that are wrong, each with the status that it deserves: made by rule from a fixed seed."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from test_security import bmp, gif, png, webp

COUNT = 500


@dataclass(frozen=True)
class Wrong:
    """A body, the headers beside the usual ones, and the status of the answer; `chunked`: sent without its length."""

    name: str
    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    chunked: bool = False


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture(kind: str = "PNG", size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, kind)
    return buffer.getvalue()


def with_image(url: Any, **more: Any) -> dict[str, Any]:
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": url, **more}}]
    return {"model": "base", "messages": [{"role": "user", "content": parts}]}


def text(**more: Any) -> dict[str, Any]:
    return {"model": "base", "messages": [{"role": "user", "content": "Hello"}], **more}


GOOD = base64.b64encode(picture()).decode()
IMAGES: dict[str, Any] = {  # URLs, none of which is an image that the server takes
    "broken base64": f"data:image/png;base64,{GOOD[:-3]}!!!",
    "no padding": f"data:image/png;base64,{GOOD[:-5]}",
    "blanks in base64": f"data:image/png;base64,{GOOD[:8]} {GOOD[8:]}",
    "url-safe base64": "data:image/png;base64,iVBORw0KGgo_-_-_",
    "letters of another alphabet": "data:image/png;base64,ÄÖÜß",
    "no base64": "data:image/png,abc",
    "no type": f"data:;base64,{GOOD}",
    "no comma": "data:image/png;base64",
    "nothing": "data:image/png;base64,",
    "text for a picture": data_url(b"hello, world"),
    "type text": f"data:text/plain;base64,{GOOD}",
    "type svg": data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"),
    "type html": data_url(b"<script>alert(1)</script>", "text/html"),
    "type video": data_url(picture(), "video/mp4"),
    "jpeg stated as png": data_url(picture("JPEG")),
    "png stated as jpeg": data_url(picture(), "image/jpeg"),
    "gif stated as webp": data_url(picture("GIF"), "image/webp"),
    "icon stated as png": data_url(picture("ICO", (16, 16))),
    "100 megapixels": data_url(png(10_000, 10_000)),
    "4 gigapixels": data_url(png(65_000, 65_000)),
    "17 megapixels": data_url(png(4096, 4097)),
    "a gigantic bmp": data_url(bmp(2**20, 2**10), "image/bmp"),
    "a gigantic gif": data_url(gif(65_000, 65_000), "image/gif"),
    "a gigantic webp": data_url(webp(16_384, 16_384), "image/webp"),
    "no pixels": data_url(png(0, 0)),
    "a line": data_url(picture(size=(900, 2))),
    "half a png": data_url(picture()[:40]),
    "half a jpeg": data_url(picture("JPEG", (64, 64))[:200], "image/jpeg"),
    "remote": "https://example.org/cat.png",
    "loopback": "http://127.0.0.1:8000/metrics",
    "file": "file:///etc/passwd",
    "ftp": "ftp://example.org/cat.png",
    "a path": "/etc/passwd",
    "empty": "",
    "number": 5,
    "null": None,
    "list": [],
    "object": {"url": "x"},
}
PARAMETERS: dict[str, tuple[Any, ...]] = {  # values that are refused
    "model": (1, "", None, [], "x" * 100_000, "base\x00", "\U0001f600", "../base", True, {}),
    "messages": (None, [], {}, "Hello", 1, [None], [[]], ["Hello"], [{}], [{"role": "user"}], [{"content": "x"}]),
    "max_tokens": (0, -1, -(10**30), 10**30, 1.5, "10", True, [], 10**6),
    "max_completion_tokens": (0, -5, "many", {}, 2.5, 10**9),
    "temperature": (-0.1, 2.1, 1e300, "hot", True, [], -(10**400)),
    "top_p": (0, -1, 1.01, "1", True, {}),
    "seed": (1.5, "1", 2**63, -(2**63) - 1, True, []),
    "stop": ("", [""], ["a"] * 5, 1, [1], [None], {}, ["a", ""], "x" * 1001),
    "stream": (1, "true", "yes", [], {}),
    "stream_options": (1, [], {"include_usage": 1}, {"other": True}, {"include_usage": True}, "usage"),
    "n": (0, 2, -1, True, "1", 128, 1.5),
    "tools": ([{"type": "function", "function": {"name": "f"}}], {}, "all"),
    "tool_choice": ("required", {"type": "function"}, 1),
    "functions": ([{"name": "f"}], "f"),
    "logprobs": (True, 1, 5, "yes"),
    "top_logprobs": (1, 20, -1, True),
    "response_format": ({"type": "json_object"}, {"type": "json_schema"}, "json", []),
    "frequency_penalty": (0.5, -2, "1", True, 3),
    "presence_penalty": (0.5, 2, "0", [0]),
    "logit_bias": ({"5": 100}, [], 1),
    "modalities": (["audio"], ["text", "audio"], "text", []),
    "audio": ({"voice": "alloy"}, {}, 0),
    "prediction": ({"type": "content"}, ""),
    "reasoning_effort": ("high", 1),
    "top_k": (5, 0),
    "repetition_penalty": (1.1, 1),
    "temprature": (0.5,),
    "__class__": ("x",),
}
MESSAGES: dict[str, Any] = {
    "role unknown": [{"role": "robot", "content": "x"}],
    "role tool": [{"role": "tool", "content": "x", "tool_call_id": "1"}],
    "role function": [{"role": "function", "name": "f", "content": "x"}],
    "role null": [{"role": None, "content": "x"}],
    "content null": [{"role": "user", "content": None}],
    "content number": [{"role": "user", "content": 7}],
    "content empty list": [{"role": "user", "content": []}],
    "content object": [{"role": "user", "content": {"type": "text", "text": "x"}}],
    "part null": [{"role": "user", "content": [None]}],
    "part without type": [{"role": "user", "content": [{"text": "x"}]}],
    "part of type audio": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": ""}}]}],
    "part of type file": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "x"}}]}],
    "part of unknown type": [{"role": "user", "content": [{"type": "smell", "text": "x"}]}],
    "text null": [{"role": "user", "content": [{"type": "text", "text": None}]}],
    "text number": [{"role": "user", "content": [{"type": "text", "text": 3}]}],
    "image as text": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:,"}]}],
    "image detail": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x", "detail": "fine"}}]}],
    "image of the assistant": [
        {"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": data_url(picture())}}]},
        {"role": "user", "content": "x"},
    ],
    "image of the system": [
        {"role": "system", "content": [{"type": "image_url", "image_url": {"url": data_url(picture())}}]},
        {"role": "user", "content": "x"},
    ],
    "the assistant last": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
    "the system alone": [{"role": "system", "content": "x"}],
    "tool calls": [{"role": "assistant", "content": "x", "tool_calls": [{}]}, {"role": "user", "content": "x"}],
    "a name": [{"role": "user", "content": "x", "name": "Ann"}],
    "too many": [{"role": "user", "content": "x"}] * 600,
    "too long": [{"role": "user", "content": "word " * 300_000}],
    "longer than the context": [{"role": "user", "content": "word " * 3000}],
    "too many images": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data_url(picture())}}] * 9}
    ],
}
BODIES: dict[str, bytes] = {  # that are no JSON object
    "empty": b"",
    "a brace": b"{",
    "a list": b"[]",
    "a number": b"12",
    "null": b"null",
    "a string": b'"model"',
    "a form": b"model=base&messages=1",
    "NaN": b'{"model": "base", "messages": [], "temperature": NaN}',
    "Infinity": b'{"model": "base", "messages": [], "temperature": -Infinity}',
    "nested lists": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "nested in metadata": b'{"metadata":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "latin-1": '{"model": "bäse"}'.encode("latin-1"),
    "utf-16": '{"model": "base"}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf" + json.dumps(text()).encode(),
    "half a surrogate pair": b'{"model": "base", "messages": [{"role": "user", "content": "\\ud83d"}]}',
    "half a surrogate pair in a key": b'{"model": "base", "\\udc00": 1}',
    "half a surrogate pair as the model": b'{"model": "\\ud800", "messages": [{"role": "user", "content": "x"}]}',
    "a long number": b'{"model": "base", "seed": ' + b"9" * 10_000 + b"}",
    "millions of values": b'{"model": [' + b"0," * 2**20 + b"0]}",
    "comments": b'{"model": "base"} // yes',
    "two documents": json.dumps(text()).encode() * 2,
    "a zero byte": b'{"model": "base\x00"}',
    "half a document": json.dumps(text()).encode()[:-7],
    "single quotes": b"{'model': 'base'}",
}


def requests(max_body: int) -> list[Wrong]:
    """COUNT of them, for a server whose key is given in the usual headers."""
    made = list(_fixed(max_body))
    source = random.Random(0)
    sound = json.dumps(text(stop=["x"], max_tokens=5, temperature=0.5)).encode()
    while len(made) < COUNT:  # bytes of a sound document exchanged by chance, kept where that made it no JSON
        place, damage = source.randrange(len(sound)), source.randbytes(source.randint(1, 4))
        body = sound[:place] + damage + sound[place + 1 :]
        try:
            json.loads(body)
        except ValueError:
            made.append(Wrong(f"damaged {len(made)}", 400, body))
    return made[:COUNT]


def _fixed(max_body: int) -> Iterator[Wrong]:
    sound = json.dumps(text()).encode()
    for name, url in IMAGES.items():
        for detail in ({}, {"detail": "high"}):
            yield Wrong(f"image {name} {detail}", 400, json.dumps(with_image(url, **detail)).encode())
    for name, values in PARAMETERS.items():
        for value in values:
            missing = name == "model" and isinstance(value, str)
            yield Wrong(
                f"{name} {str(value)[:30]}", 404 if missing else 400, json.dumps(text(**{name: value})).encode()
            )
    for name, messages in MESSAGES.items():
        yield Wrong(f"messages {name}", 400, json.dumps(text(messages=messages)).encode())
    for name, body in BODIES.items():
        yield Wrong(f"body {name}", 400, body)
    for name in ("Base", "base ", "gpt-4o", "adapter", "none", "null", "0", "base/../x", "a" * 200):
        yield Wrong(f"model {name}", 404, json.dumps(text(model=name)).encode())
    for name, header in {
        "none": "", "wrong": "Bearer wrong", "no scheme": "secret-key", "basic": "Basic c2VjcmV0LWtleQ==",
        "longer": "Bearer secret-key2", "shorter": "Bearer secret-ke", "empty": "Bearer", "case": "Bearer SECRET-KEY",
        "twice": "Bearer secret-key secret-key", "quoted": 'Bearer "secret-key"',
    }.items():  # fmt: skip
        yield Wrong(f"key {name}", 401, sound, {"Authorization": header})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "image/png", ""):
        yield Wrong(f"content type {kind}", 415, sound, {"Content-Type": kind})
    huge = b'{"model": "base", "messages": "' + b"x" * max_body + b'"}'
    for chunked in (False, True):
        yield Wrong(f"huge, chunked {chunked}", 413, huge, chunked=chunked)
        yield Wrong(f"huge blanks, chunked {chunked}", 413, b" " * (max_body + 1), chunked=chunked)
