"""What stands around the page: no request to other hosts, and a form that asks for the server's key once.

Scope: two ASGI middlewares. `OwnHost` tells browsers to ask nothing of any other host, whatever Gradio, an answer or
a click would want, and refuses what pages of other sites send; `Keyed` gives a form to whoever has not told the key,
and nothing behind it, uploads included, is reached. Non-scope: the key of the API's requests (`app.py`). Source:
Content Security Policy Level 3, Fetch Metadata Request Headers (W3C).

The right key is exchanged for a cookie with a random token of this process, so the key itself is kept nowhere; the
cookie is out of reach for scripts and for other sites.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
from collections.abc import Callable
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "normtune-page"
MAX_FORM = 4096  # bytes
POLL = 0.5  # seconds
PAUSE = 0.5  # seconds before a wrong key is told so

FORM = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>normtune: key</title><link rel="icon" href="data:,">
<style>
  :root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }}
  body {{ max-width: 22rem; margin: 15vh auto 0; padding: 0 1rem; }}
  input, button {{ font: inherit; width: 100%; box-sizing: border-box; padding: .5rem; margin: .25rem 0 .75rem; }}
  [role=alert] {{ color: light-dark(#b00020, #ff8a8a); }}
</style></head><body>
<h1>normtune</h1><p>This server asks for its API key.</p>{message}
<form method="post"><label for="key">API key</label>
<input id="key" name="key" type="password" autocomplete="current-password" required autofocus>
<button>Open</button></form></body></html>"""


POLICY = (  # Gradio's own script needs inline and eval
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'; object-src 'none'"
)


class OwnHost:
    """`app`, whose answers forbid a browser to ask other hosts for anything, and which does nothing for other hosts'
    pages: a form or a script there could upload files and ask.

    A page holds a request open as long as it is open itself; when `ended()` such a request is told that its browser has
    gone, so that the server need not wait for people to close their tabs."""

    def __init__(self, app: ASGIApp, ended: Callable[[], bool]) -> None:
        self.app, self.ended = app, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("content-security-policy", POLICY)
                headers.setdefault("referrer-policy", "same-origin")
                headers.setdefault("x-content-type-options", "nosniff")
            await send(message)

        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD") and foreign(Headers(scope=scope)):
            return await PlainTextResponse("asked by another site's page", 403)(scope, receive, guarded)

        async def received() -> Message:
            while not self.ended():
                with contextlib.suppress(TimeoutError):
                    return await asyncio.wait_for(receive(), POLL)
            return {"type": "http.disconnect"}

        held_open = scope["type"] == "http" and "/heartbeat/" in scope["path"]
        await self.app(scope, received if held_open else receive, guarded)


def foreign(headers: Headers) -> bool:
    """Whether a browser says that a page of another site asks. Older ones, and any for plain http to another machine,
    send the page's origin alone: a proxy before them has to pass `Host` on."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        return site not in ("same-origin", "none")
    return origin is not None and origin.partition("://")[2] != headers.get("host")


def cookie_of(scope: Scope) -> str:
    """The cookie's name at this port: a browser sends a machine's cookies to all its ports, and the keys of two servers
    would undo each other."""
    return f"{COOKIE}-{(scope.get('server') or ('', None))[1]}"


class Keyed:
    """`app`, for those who know `key`."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self.app, self.key = app, key.encode()
        self.token = secrets.token_urlsafe(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # no websocket is used
            return None
        request = Request(scope, receive)
        if hmac.compare_digest(request.cookies.get(cookie_of(scope), "").encode(), self.token.encode()):
            return await self.app(scope, receive, send)
        try:
            response = await self.answer(request)
        except ClientDisconnect:
            return None
        return await response(scope, receive, send)

    async def answer(self, request: Request) -> Response:
        """The form, or what came of it."""
        path = request.url.path
        if path.removeprefix(request.scope.get("root_path", "")) not in ("", "/"):
            return PlainTextResponse("give the key on the page first", 401)
        if request.method != "POST":
            return HTMLResponse(FORM.format(message=""), 401)
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_FORM:
                return PlainTextResponse("too long", 413)
        given = parse_qs(body.decode("utf-8", "replace")).get("key", [""])[0]
        if not hmac.compare_digest(given.encode(), self.key):
            await asyncio.sleep(PAUSE)
            return HTMLResponse(FORM.format(message='<p role="alert">That is not the key.</p>'), 401)
        response = RedirectResponse(path, 303)
        secure = request.url.scheme == "https"
        response.set_cookie(cookie_of(request.scope), self.token, httponly=True, samesite="strict", secure=secure)
        return response
