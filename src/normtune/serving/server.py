"""The server's process: a socket, uvicorn, and an end in good order.

Scope: SIGTERM and Ctrl-C stop accepting, let what was accepted finish, and end well; a second one ends at once.
Non-scope: routes (`app`), the model (`engine`). Source: uvicorn's own server, whose handling of signals would end the
process by the signal even after a clean shutdown.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from normtune.errors import InputError, NormtuneError
from normtune.progress import say
from normtune.serving.engine import Engine
from normtune.serving.limits import DRAIN_SECONDS, ServerSettings

SWITCH = 5e-4  # seconds that a thread which reads requests may keep the model's thread waiting at each operation
KEPT = 75  # seconds of an idle connection: longer than clients keep theirs (OpenAI's 5), or a request meets its end.
# Also of a request's head, from its first byte
TOGETHER = 0.5  # seconds within which two signals are one


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. InputError where that is not possible."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
        # connections inherit it; asyncio sees to it only for sockets made with the protocol's number, and headers
        # would wait 40 ms for their body
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot serve at {host}:{port}: {reason}\nChoose another --host or --port.") from error


class Forced(NormtuneError):
    """Ended before its requests did: exit code 130 after Ctrl-C, 143 after SIGTERM."""

    def __init__(self, number: int) -> None:
        super().__init__("stopped at once; requests that ran have no answer")
        self.exit_code = 128 + number


class Protocol(H11Protocol):
    """uvicorn's, which would wait for ever for the first request of a connection and for the end of a head."""

    waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._rest()

    def _wait(self) -> None:
        """Gives the head that is awaited its time, which later bytes do not prolong."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._rest()
        elif self.waiting is None:
            self.waiting = self.loop.call_later(KEPT, self.timeout_keep_alive_handler)

    def _rest(self) -> None:
        if self.waiting is not None:
            self.waiting.cancel()
            self.waiting = None


class Server(uvicorn.Server):
    """uvicorn with signals as the commands of normtune have them. `ready` is called when requests are accepted;
    `forced` is the signal that came second, or None."""

    def __init__(self, app: FastAPI, settings: ServerSettings, ready: Callable[[], None] = lambda: None) -> None:
        options: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False}
        options |= {"http": Protocol, "ws": "none", "proxy_headers": False, "timeout_keep_alive": KEPT}
        # nothing that was accepted takes longer than its time limit; the page's open event streams would never end
        patience = int(settings.timeout + 2 * DRAIN_SECONDS) + 1
        super().__init__(uvicorn.Config(app, timeout_graceful_shutdown=patience, **options))
        self.app, self.ready, self.told = app, ready, 0.0
        self.forced: signal.Signals | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves it out then, and it would end in a traceback
            await self.lifespan.shutdown()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal: answers what was accepted. The second: ends now. One that comes together with the first is
        the same: `timeout` and others send theirs to a process and to its group."""
        if self.should_exit and time.monotonic() - self.told < TOGETHER:
            return
        self.told = time.monotonic()
        if self.should_exit:
            self.force_exit, self.forced = True, signal.Signals(sig)
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # a traceback of each request that is cut off
            return
        self.should_exit = self.app.state.answers.closing = True
        say("finishing the requests that were accepted; once more to stop at once")


def run(
    app: FastAPI, engine: Engine, settings: ServerSettings, listener: socket.socket, ready: Callable[[], None]
) -> None:
    """Serves at `listener` until a signal comes; calls `ready` when requests are accepted.

    Raises:
        Forced: a second signal came.
    """
    server = Server(app, settings, ready)
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    engine.start()
    try:
        server.run(sockets=[listener])
    finally:
        sys.setswitchinterval(before)
        engine.close(drain=server.forced is None)
        app.state.answers.close()
    if server.forced is not None:
        raise Forced(server.forced)
