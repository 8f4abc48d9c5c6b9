"""Stands before the annotation server: who may ask, and how much."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs

from fastapi import Response
from fastapi.responses import JSONResponse, RedirectResponse

LARGEST_BODY = 16_384
"""Bytes of a request that are read at most."""
COOKIE = "t2irl_prefs"
"""Holds the token once the address with it was opened."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Of every answer: the page runs nothing but its own script, and no other page may show or read it."""
Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class Guard:
    """Stands before the application: who may ask, and how much."""

    def __init__(self, app: Any, token: str | None, hosts: frozenset[str] | None):
        self.app, self.token, self.hosts = app, token, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None:
            body = await _body(receive)
            if body is None:
                refusal = JSONResponse({"detail": f"the request is larger than {LARGEST_BODY} bytes"}, 413)
            else:
                received = _replay(body, receive)
        if refusal is not None:
            await refusal(scope, receive, _with_headers(send))
        else:
            await self.app(scope, received, _with_headers(send))

    def _refusal(self, scope: Scope) -> Response | None:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "").lower()
        host = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if self.hosts is not None and host not in self.hosts:
            # A page elsewhere whose name was made to point here (DNS rebinding) must not read pairs or vote.
            return JSONResponse({"detail": f"this server does not answer for {host!r}"}, 421)
        if not headers.get(b"content-length", "0").isdigit() or int(headers.get(b"content-length", "0")) > LARGEST_BODY:
            return JSONResponse({"detail": f"the request is larger than {LARGEST_BODY} bytes"}, 413)
        if self.token is None:
            return None
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if scope["path"] == "/" and self._is_token(given):
            answer = RedirectResponse("/", 303)
            answer.set_cookie(COOKIE, self.token, httponly=True, samesite="strict", max_age=30 * 86400)
            return answer
        bearer = headers.get(b"authorization", "").removeprefix("Bearer ")
        if self._is_token(bearer) or self._is_token(_cookie(headers.get(b"cookie", ""))):
            return None
        return JSONResponse({"detail": "open the address with ?token=... that the study's owner gave you"}, 401)

    def _is_token(self, text: str) -> bool:
        return self.token is not None and secrets.compare_digest(text.encode(), self.token.encode())


def _cookie(header: str) -> str:
    try:
        found = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    return found.value if found else ""


async def _body(receive: Receive) -> bytes | None:
    """The whole body, None if it is too large, whatever length it announced."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > LARGEST_BODY:
            return None
        if message["type"] != "http.request" or not message.get("more_body"):
            return body


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receiver that gives the body once, then what else comes."""
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> MutableMapping[str, Any]:
        return parts.pop() if parts else await receive()

    return again


def _with_headers(send: Send) -> Send:
    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            extra = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", []), *extra]}
        await send(message)

    return sending
