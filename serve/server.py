"""A server around a session: REST and page behind one guard, on one port."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from serve.connection import PromptConnection
from serve.guard import LOCAL, Guard, is_local
from serve.metrics import Counting
from serve.rest import Service, rest_app


def app_of(
    service: Service,
    *,
    host: str = "127.0.0.1",
    token: str | None = None,
    allowed_hosts: Sequence[str] = (),
    page: bool = True,
    max_body: int = 32 * 2**20,
    language: str = "en",
) -> ASGIApp:
    """
    Args:
        host: where it will be bound: others than this machine's own are only served with a token.
        allowed_hosts: more names that this server is called by, where a proxy stands before it.
        language: of the page when it opens: "zh" or "en".
    Raises:
        ValueError: bound elsewhere without a token.
    """
    if not is_local(host) and not token:
        raise ValueError(f"bound to {host}, this server can be reached from elsewhere: give it a token")
    app: Any = rest_app(service)
    if page:
        from serve.web import add_page

        add_page(app, service, language=language)
    names = (*LOCAL, host, *allowed_hosts) if is_local(host) else None
    guarded = Guard(app, hosts=names, token=token, max_body=max_body)
    return Counting(guarded, service.metrics)


def server_of(app: ASGIApp, *, host: str, port: int, log_level: str = "warning") -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            http=PromptConnection,
            ws="none",
            lifespan="on",
            log_level=log_level,
            access_log=False,
            server_header=False,
            limit_concurrency=1024,
            timeout_keep_alive=10,
            timeout_graceful_shutdown=5,
        )
    )


@contextmanager
def running(app: ASGIApp, *, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """In a thread of its own, for programs that do something else meanwhile.  -> its address"""
    server = server_of(app, host=host, port=port)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), name="queqiao-server", daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise OSError(f"the server did not start on {host}:{port}")
        thread.join(0.01)
    try:
        bound = server.servers[0].sockets[0].getsockname()
        yield f"http://{host}:{bound[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
