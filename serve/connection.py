"""A connection that says nothing, or half a request's head, is closed: uvicorn would keep it."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


class PromptConnection(H11Protocol):
    """HEAD_SECONDS: from a connection's beginning, or the first byte of a request, to the end of the request's head."""

    HEAD_SECONDS = 10.0
    _closing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def shutdown(self) -> None:
        """Whoever only waits for news, as an open page does, does not hold up the server's end."""
        super().shutdown()
        if self.cycle is not None and not self.cycle.response_complete and self.scope["method"] == "GET":
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._unwatch()
        elif self._closing is None:
            self._closing = self.loop.call_later(self.HEAD_SECONDS, self.transport.close)

    def _unwatch(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None

    def on_response_complete(self) -> Any:
        self._unwatch()  # the next request has its own time; until it begins, keep-alive's holds
        return super().on_response_complete()
