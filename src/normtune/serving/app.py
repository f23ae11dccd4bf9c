"""The HTTP server's application: OpenAI's routes, health and metrics, in front of one engine.

Scope: routes, the key, errors in OpenAI's form, one exchange from the first byte to the last: a stream's events, a
client that goes away, the limit of time. Non-scope: what a request says (`protocol`), how it is answered (`answers`),
the process and its signals (`server`). Source: OpenAI's API reference; server-sent events of the HTML standard.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import Coroutine
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from normtune.serving.answers import Answers, Running, shutting_down
from normtune.serving.engine import Engine
from normtune.serving.limits import DRAIN_SECONDS, ApiError, Held, Load, ServerSettings, drain, read_body
from normtune.serving.metrics import Metrics
from normtune.serving.protocol import Reply, model_card

log = logging.getLogger(__name__)
GONE = 499  # in metrics, as nginx counts it: the client left before its answer


def create_app(engine: Engine, settings: ServerSettings | None = None) -> FastAPI:
    """The application; its state has `answers` and `metrics`. The caller starts and closes `engine`."""
    settings = settings or ServerSettings()
    app = FastAPI(title="normtune", docs_url=None, redoc_url=None, openapi_url=None)
    answers, metrics, created = Answers(engine, settings), Metrics(engine), int(time.time())
    app.state.answers, app.state.metrics = answers, metrics
    app.add_middleware(Guard, key=settings.api_key)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ApiError, _api_error)
    app.add_route("/v1/chat/completions", Completions(answers, settings, metrics), methods=["POST"])  # type: ignore[arg-type]

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model_card(name, created) for name in answers.models()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name not in answers.models():
            raise ApiError(404, f"The model {name!r} does not exist.", "model", "model_not_found")
        return JSONResponse(model_card(name, created))

    @app.get("/health")
    async def health() -> Response:
        if answers.closing:
            raise shutting_down()
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.document, error.status, error.headers)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path}"
    return JSONResponse(ApiError(error.status_code, message).document, error.status_code, error.headers)


class Guard:
    """The key of /v1 and /metrics, as a Bearer token; /health needs none, and the page at /ui asks for it itself."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self.app, self.key = app, None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self.key is None or not _guarded(scope["path"]):
            return await self.app(scope, receive, send)
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, token = given.partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self.key):
            return await self.app(scope, receive, send)
        with contextlib.suppress(ClientDisconnect):
            await drain(Request(scope, receive).stream(), 2**20)
        error = ApiError(401, "The API key is missing or wrong: send it as a Bearer token.", code="invalid_api_key")
        await error_response(error)(scope, receive, send)


def _guarded(path: str) -> bool:
    return path == "/metrics" or path == "/v1" or path.startswith("/v1/")


class Completions:
    """`POST /v1/chat/completions`, as an ASGI application."""

    def __init__(self, answers: Answers, settings: ServerSettings, metrics: Metrics) -> None:
        self.answers, self.settings, self.metrics = answers, settings, metrics
        self.load = Load(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange, began = Exchange(scope, receive, send), time.monotonic()
        try:
            async with asyncio.timeout(self.settings.timeout):
                await self._exchange(exchange, Request(scope, receive), began)
        except (ClientDisconnect, Gone):
            exchange.status = GONE
        except ApiError as error:
            await exchange.fail(error)
        except TimeoutError:
            status, what = (504, "answer") if exchange.read else (408, "whole request")
            message = f"No {what} within {self.settings.timeout:g} seconds."
            await exchange.fail(ApiError(status, message, code="timeout"))
        except Exception:
            log.exception("a request failed")
            await exchange.fail(ApiError(500, "The server failed at this request."))
        finally:
            self.metrics.count(exchange.status, exchange.model, time.monotonic() - began)

    async def _exchange(self, exchange: Exchange, request: Request, began: float) -> None:
        chunks, most = request.stream(), self.settings.max_body
        try:
            if self.answers.closing:
                raise shutting_down()
            if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                raise ApiError(415, "Send the request as JSON, with Content-Type: application/json.")
            with self.load.request() as held:
                body = await read_body(chunks, request.headers.get("content-length"), most, held)
                held.begin()
                exchange.read = True
                work = self._answer(exchange, body, held, began)
                del body  # the work has it, and lets go of it
                await unless_gone(exchange.receive, work)
        except ApiError:
            if not exchange.read:
                await drain(chunks, 4 * most)
            raise

    async def _answer(self, exchange: Exchange, body: bytes, held: Held, began: float) -> None:
        running = await self.answers.start(body, held, exchange.name)
        del body
        try:
            held.drop()
            await (self._stream if running.stream else self._whole)(exchange, running)
            self.metrics.used(running.model, *running.usage)
        finally:
            running.end()
            if running.stream and running.first:
                self.metrics.first.labels(running.model).observe(running.first - began)

    async def _whole(self, exchange: Exchange, running: Running) -> None:
        text = "".join([text async for text in running.texts()])
        document = Reply(running.model).whole(text, running.finish, running.usage)
        await exchange.respond(JSONResponse(document))

    async def _stream(self, exchange: Exchange, running: Running) -> None:
        reply, count = Reply(running.model), running.include_usage
        await exchange.event(reply.chunk({"role": "assistant", "content": ""}, count=count))
        async for text in running.texts():
            await exchange.event(reply.chunk({"content": text}, count=count))
        await exchange.event(reply.chunk({}, running.finish, count=count))
        if count:
            await exchange.event(reply.counts(running.usage))
        await exchange.end("[DONE]")


class Exchange:
    """One request's answer on the wire: whole, or as events once the first was sent."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, self.receive, self.send = scope, receive, send
        self.status = GONE
        self.model: str | None = None
        self.read = self.started = self.streaming = False  # the request's body; the response; its events

    def name(self, model: str) -> None:
        self.model = model

    async def respond(self, response: Response) -> None:
        self.status, self.started = response.status_code, True
        await response(self.scope, self.receive, self.send)

    async def event(self, document: dict[str, Any]) -> None:
        """One server-sent event; the headers before the first."""
        if not self.streaming:
            self.started = self.streaming = True
            kind = (b"content-type", b"text/event-stream; charset=utf-8")
            headers = [kind, (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
            await self.send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._body(json.dumps(document, ensure_ascii=False, separators=(",", ":")))

    async def end(self, last: str) -> None:
        """The last event."""
        self.status = 200
        await self._body(last, more=False)

    async def fail(self, error: ApiError) -> None:
        """The error as the response, or as the last event of a stream that began."""
        self.status = error.status
        if self.started and not self.streaming:
            return  # a client that does not read what it has been sent
        try:
            async with asyncio.timeout(DRAIN_SECONDS):  # the client may not read at all
                if not self.streaming:
                    await error_response(error)(self.scope, self.receive, self.send)
                else:
                    await self._body(json.dumps(error.document), more=False)
        except TimeoutError:
            log.warning("a client did not read its answer")

    async def _body(self, data: str, more: bool = True) -> None:
        event: Message = {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": more}
        await self.send(event)


class Gone(Exception):
    """The client closed its connection."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Runs `work` to its end, or cancels it and raises Gone when the client disconnects; cancelled itself, it waits
    until the work has cleaned up."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise Gone
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
