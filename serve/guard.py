"""What every request passes before anything looks at it: whose host, whose page, whose token, how long.

An ASGI wrapper around REST and page alike.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL = ("localhost", "127.0.0.1", "::1")
OPEN = ("/health",)  # asked by those who watch the server; says nothing but that it runs
SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    # the page is Gradio's, which needs inline scripts; whatever they do, nothing is loaded from or sent to elsewhere
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "worker-src 'self' blob:; media-src 'self' data: blob:; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'",
}


def is_local(host: str) -> bool:
    """Whether a server bound there is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def error_body(status: int, sentence: str) -> dict[str, Any]:
    """What every refusal looks like: OpenAI's clients read `error.message`, VisualGLM's `status`."""
    kind = "invalid_request_error" if 400 <= status < 500 else "server_error"
    return {"error": {"message": sentence, "type": kind, "param": None, "code": status}, "status": status}


class Refused(Exception):
    """A request that goes no further."""

    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status, self.headers = status, headers or {}


@dataclass(frozen=True)
class Guard:
    """
    Args:
        hosts: what the Host header may name; None: anything.  A page elsewhere whose name is made to point here (DNS
            rebinding) sends its own name.
        token: asked for as `Authorization: Bearer`, or as the password of Basic, which browsers ask people for; None:
            nobody is asked.
        max_body: bytes of a request.
    """

    app: ASGIApp
    hosts: Iterable[str] | None = LOCAL
    token: str | None = None
    max_body: int = 32 * 2**20

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        body = _Counted(receive, self.max_body)
        has_started = False

        async def send_safely(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                MutableHeaders(scope=message).update(SECURITY)
            await send(message)

        try:
            self.check(scope, headers)
            await self.app(scope, body, send_safely)
        except Refused as refused:
            if has_started:
                raise
            await _answer(send_safely, refused)

    def check(self, scope: Scope, headers: Headers) -> None:
        """Raises Refused."""
        host = headers.get("host", "")
        name = _name(host)
        if self.hosts is not None and name not in self.hosts:
            raise Refused(403, f"this server is not called {name!r}: start it with --allow-host if it is")
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise Refused(403, "requests that pages of other sites make are not answered")
        if headers.get("sec-fetch-site") == "cross-site" and scope["method"] not in ("GET", "HEAD"):
            raise Refused(403, "requests that pages of other sites make are not answered")
        if self.token is not None and scope["path"] not in OPEN and not _knows(headers, self.token):
            raise Refused(
                401,
                "this server asks for a token: Authorization: Bearer TOKEN, or TOKEN as the password",
                {"WWW-Authenticate": 'Basic realm="queqiao", charset="UTF-8"'},
            )
        length = headers.get("content-length", "0")
        if re.fullmatch(r"[0-9]{1,18}", length) and int(length) > self.max_body:
            raise Refused(413, _too_long(self.max_body))


class _Counted:
    """A body that may say less than it sends."""

    def __init__(self, receive: Receive, most: int) -> None:
        self.receive, self.most, self.num_bytes = receive, most, 0

    async def __call__(self) -> Message:
        message = await self.receive()
        self.num_bytes += len(message.get("body", b""))
        if self.num_bytes > self.most:
            raise Refused(413, _too_long(self.most))
        return message


def _too_long(most: int) -> str:
    return f"the request is too long: this server takes {most} bytes"


def _name(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _knows(headers: Headers, token: str) -> bool:
    kind, _, given = headers.get("authorization", "").partition(" ")
    if kind.lower() == "basic":
        try:
            _, _, given = base64.b64decode(given, validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            return False
    elif kind.lower() != "bearer":
        return False
    return hmac.compare_digest(given.strip().encode("utf-8", "replace"), token.encode())


async def _answer(send: Send, refused: Refused) -> None:
    body = json.dumps(error_body(refused.status, str(refused)), ensure_ascii=False).encode()
    headers = {
        "Content-Type": "application/json; charset=utf-8",
        "Content-Length": str(len(body)),
        "Connection": "close",
    }
    headers |= refused.headers
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
