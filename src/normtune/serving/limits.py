"""What one client may ask of the server, and how it is told no.

Scope: the settings of the server, errors in OpenAI's form, the body of a request read within a limit, the requests and
bytes under way at once. Non-scope: what a request says (`protocol`), its images (`uploads`, `remote`), tokens and the
queue of the model (`engine`). Source: OpenAI's error documents; RFC 9110 for the status codes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

RETRY_AFTER = "1"  # seconds; a place gets free whenever an answer ends
DRAIN_SECONDS = 2.0  # a client that is still sending its body reads no answer, and a reset connection loses one
MESSAGE = 1000  # characters of an error's message


@dataclass(frozen=True)
class ServerSettings:
    """Limits and names of a server. `timeout` is in seconds, from the request's first byte to the answer's last."""

    base_name: str = "base"
    api_key: str | None = None
    timeout: float = 120.0
    max_requests: int = 272  # at once: prepared, queued or answered
    max_body: int = 20 * 2**20  # bytes
    max_bodies: int = 256 * 2**20  # bytes of all bodies and fetched images at once
    max_images: int = 8
    max_pixels: int = 2**24  # of one image
    max_tokens: int = 1024  # longest answer; also where a request names no length
    remote_images: bool = False
    remote_timeout: float = 10.0  # seconds for one remote image


class ApiError(Exception):
    """A request that gets no answer: HTTP status and OpenAI's fields; `retry` where trying again makes sense."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.retry = status, code, retry
        self.message, self.param = printable(message), None if param is None else printable(param)

    @property
    def document(self) -> dict[str, dict[str, str | None]]:
        """{"error": {message, type, param, code}}."""
        kind = "rate_limit_error" if self.status == 429 else "invalid_request_error"
        kind = "server_error" if self.status >= 500 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        if self.retry:
            return {"Retry-After": RETRY_AFTER}
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"x-should-retry": "false"} if self.status >= 500 else {}  # OpenAI's clients would ask thrice


def printable(text: str) -> str:
    """At most MESSAGE characters that UTF-8 can hold: a client's text may have halves of surrogate pairs."""
    return text[:MESSAGE].encode("utf-8", "backslashreplace").decode()


class Load:
    """Requests whose body is there, and bytes held for all. For one thread, the event loop's."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.requests = self.bytes = 0

    @contextlib.contextmanager
    def request(self) -> Iterator[Held]:
        """A request that comes; `Held.begin` gives it one of `max_requests` places: bodies that are sent slowly
        take none. Raises ApiError 429 where none is free now."""
        if self.requests >= self.settings.max_requests:
            raise busy()
        held = Held(self)
        try:
            yield held
        finally:
            self.requests -= held.begun
            held.drop()


class Held:
    """The bytes of one request, counted among those of all, and its place once it has `begun`."""

    def __init__(self, load: Load) -> None:
        self.load, self.bytes, self.begun = load, 0, False

    def begin(self) -> None:
        """Raises ApiError 429 where no place is free."""
        if self.load.requests >= self.load.settings.max_requests:
            raise busy()
        self.load.requests += 1
        self.begun = True

    def take(self, count: int) -> None:
        """Raises ApiError 429 where all requests together would hold too many."""
        if self.load.bytes + count > self.load.settings.max_bodies:
            raise busy()
        self.load.bytes += count
        self.bytes += count

    def drop(self) -> None:
        self.load.bytes -= self.bytes
        self.bytes = 0


def busy() -> ApiError:
    return ApiError(429, "The server is busy: its queue is full. Try again.", code="queue_full", retry=True)


async def read_body(chunks: AsyncIterator[bytes], declared: str | None, limit: int, held: Held) -> bytes:
    """The whole body, however it is sent; `declared` is its Content-Length, if it has one.

    Raises:
        ApiError: 413 for more than `limit` bytes, whether they were announced or not; 429 by `held`.
    """
    too_large = ApiError(413, f"The request's body is larger than {limit:,} bytes.", code="request_too_large")
    if declared is not None and declared.isdecimal() and int(declared[:20]) > limit:
        raise too_large
    parts, size = [], 0
    async for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise too_large
        held.take(len(chunk))
        parts.append(chunk)
    return b"".join(parts)


async def drain(chunks: AsyncIterator[bytes], limit: int) -> None:
    """Reads on, for DRAIN_SECONDS and `limit` bytes at most, and keeps nothing."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            size = 0
            async for chunk in chunks:
                size += len(chunk)
                if size > limit:
                    return
