"""A request's way through the server: document, images, prompt, queue, pieces.

Scope: what runs on the event loop and what in threads beside it, so that a large body or picture keeps nobody waiting;
limits of time; a slot that is freed whatever ends a request. Non-scope: routes and keys (`app`).

One thread at a time reads documents and decodes images: the memory of decoded pictures is then that of one request,
and two cores are the model's and this thread's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from normtune.errors import InputError, did_you_mean
from normtune.serving import Closed, Engine, Job, Piece, Prompt, QueueFull, Sampling
from normtune.serving.limits import ApiError, Held, ServerSettings, busy
from normtune.serving.protocol import ChatRequest, ImageRef, read_request
from normtune.serving.uploads import Encoded, decode, is_data_url, read_data_url, wrong


class Answers:
    """Turns bodies of requests into running answers."""

    def __init__(self, engine: Engine, settings: ServerSettings) -> None:
        self.engine, self.settings = engine, settings
        self.workers = ThreadPoolExecutor(1, thread_name_prefix="prepare")
        self.closing = False

    def models(self) -> list[str]:
        """Names that a request may give: the base's first."""
        return [self.settings.base_name, *self.engine.bank.names]

    async def start(self, body: bytes, held: Held, named: Callable[[str], None]) -> Running:
        """The answer to a request, in the engine's queue. `named` is told the model as soon as it is known.

        Raises:
            ApiError: 400 for the document, its images or its length; 404 for the model; 429 for a full queue;
                503 for an engine that is closed.
        """
        request = await self._beside(read_request, body)
        del body
        if request.model not in self.models():
            guess = did_you_mean(request.model[:100], self.models())
            raise ApiError(404, f"The model {request.model!r} does not exist{guess}.", "model", "model_not_found")
        named(request.model)
        if request.max_tokens is not None and request.max_tokens > self.settings.max_tokens:
            raise ApiError(400, f"At most {self.settings.max_tokens:,} tokens can be asked for.", "max_tokens")
        if len(request.images) > self.settings.max_images:
            raise ApiError(400, f"A request may have {self.settings.max_images} images.", "messages", "too_many_images")
        fetched = [await self._fetched(image, held) for image in request.images]
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def on_piece(piece: Piece) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        job = await self._beside(self._submit, request, fetched, on_piece)
        return Running(request.model, request.stream, request.include_usage, job, pieces)

    def close(self) -> None:
        self.workers.shutdown(wait=False, cancel_futures=True)

    async def _beside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's result from the worker; where nobody waits for it any more, what it has started is ended."""
        future = self.workers.submit(function, *arguments)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(_end)
            raise

    async def _fetched(self, image: ImageRef, held: Held) -> ImageRef | Encoded:
        """A remote image's file; a data URL as it is."""
        if is_data_url(image.url):
            return image
        if not self.settings.remote_images:
            raise wrong("Only data URLs are read: this server fetches no images.", image.param)
        from normtune.serving.remote import fetch

        return await fetch(image.url, image.param, self.settings.max_body, self.settings.remote_timeout, held)

    def _submit(
        self, request: ChatRequest, images: Sequence[ImageRef | Encoded], on_piece: Callable[[Piece], None]
    ) -> Job:
        """Decodes, tokenizes, queues. In the worker's thread."""
        files = [read_data_url(i.url, i.param) if isinstance(i, ImageRef) else i for i in images]
        pictures = [decode(file, self.settings.max_pixels) for file in files]
        name = None if request.model == self.settings.base_name else request.model
        try:
            prompt = self.engine.prepare(request.turns, pictures, name)
            length = request.max_tokens or self._room(prompt)
            sampling = Sampling(length, request.temperature, request.top_p, request.seed, request.stop)
            return self.engine.submit(prompt, sampling, on_piece, whole=not request.stream)
        except InputError as error:
            raise ApiError(400, str(error), "messages", "invalid_prompt") from error
        except QueueFull as error:
            raise busy() from error
        except Closed as error:
            raise shutting_down() from error

    def _room(self, prompt: Prompt) -> int:
        """Tokens of an answer whose length the request leaves open."""
        context = self.engine.max_context
        left = self.settings.max_tokens if context is None else context - prompt.tokens
        return max(1, min(left, self.settings.max_tokens))


@dataclass
class Running:
    """An answer under way; `end` frees its slot."""

    model: str
    stream: bool
    include_usage: bool
    job: Job
    pieces: asyncio.Queue[Piece]
    tokens: int = 0
    finish: str = ""
    first: float = field(default=0.0)  # time.monotonic() of the first text

    async def texts(self) -> AsyncIterator[str]:
        """New text as it comes; sets `finish` and `tokens`. Raises ApiError 500 where the engine failed."""
        while not self.finish:
            piece = await self.pieces.get()
            self.tokens = piece.tokens
            if piece.finish == "error" or piece.finish == "cancelled":
                raise ApiError(500, f"The answer could not be computed: {piece.error or piece.finish}.")
            if piece.text:
                self.first = self.first or time.monotonic()
                yield piece.text
            self.finish = piece.finish or ""

    def end(self) -> None:
        self.job.cancel()

    @property
    def usage(self) -> tuple[int, int]:
        return self.job.prompt_tokens, self.tokens


def _end(future: Any) -> None:
    """What came too late must not run."""
    if not future.cancelled() and future.exception() is None and isinstance(future.result(), Job):
        future.result().cancel()


def shutting_down() -> ApiError:
    return ApiError(503, "The server is shutting down.", code="shutting_down", retry=True)
