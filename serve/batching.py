"""Many askers, one model: requests wait in a line, and one thread answers them in batches.

A batch is made of what waits when there is room for it and then runs to its end; up to `max_batches` of them take
turns, token by token, so that a newcomer does not wait for somebody else's long answer.  Which batch a row is in does
not change its answer (`model.generation`).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from serve.session import Answer, Answers, Ask, Session

log = logging.getLogger(__name__)


class Busy(Exception):
    """The line is full."""


class TooSlow(Exception):
    """The answer did not come in time."""


class Failed(Exception):
    """The model could not answer, and it was not the asker's fault."""


class Left(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class LineLimits:
    """
    Args:
        waiting: requests in the line; another one is refused with `Busy`.
        seconds: from the request to the end of its answer, waiting included.
        rows: answers on their way at a time, over all batches.
        tokens: of all these together, prompts and the room for answers; bounds the keys and values held.  One request
            alone may be longer.
        batches: taking turns.
        gather_seconds: a request that finds the model idle waits so long for company.
    """

    waiting: int = 256
    seconds: float = 300.0
    rows: int = 32
    tokens: int = 32_768
    batches: int = 4
    gather_seconds: float = 0.004


@dataclass(eq=False)
class _Request:
    ask: Ask
    changed: Callable[[], None]  # called from the line's thread
    answer: Answer = field(default_factory=lambda: Answer(""))
    error: Exception | None = None
    is_done: bool = False
    is_left: bool = False  # nobody waits any more
    alone: bool = False  # after a batch with it failed

    @property
    def num_tokens(self) -> int:
        return len(self.ask.encoded.ids) + self.ask.decoding.max_new_tokens

    def end(self, error: Exception | None = None) -> None:
        self.error, self.is_done = error, True
        self.changed()


class _Batch:
    def __init__(self, session: Session, requests: list[_Request]) -> None:
        self.session, self.requests = session, requests
        self.answers: Answers | None = None
        self.has_begun = False

    @property
    def open(self) -> list[_Request]:
        return [request for request in self.requests if not request.is_done]

    def step(self) -> bool:
        """One more token for everybody.  -> whether there will be more"""
        if self.answers is None:
            self.answers = self.session.answers([request.ask for request in self.requests])
            self.steps: Iterator[list[Answer]] = iter(self.answers)
        for row, request in enumerate(self.requests):
            if request.is_left and not request.is_done:
                request.is_done = True
                self.answers.stop(row)
        found = next(self.steps, None)
        if found is None:
            return False
        self.has_begun = True
        for request, answer in zip(self.requests, found, strict=True):
            if not request.is_done:
                request.answer = answer
                request.is_done = answer.ended != ""
                request.changed()
        return bool(self.open)


class Line:
    """What all front ends of one server share.

    Args:
        session: asked by this line's thread alone.
        on_batch: told the rows of every batch that begins.
    """

    def __init__(
        self, session: Session, limits: LineLimits | None = None, *, on_batch: Callable[[int], None] | None = None
    ) -> None:
        self.session, self.limits = session, limits or LineLimits()
        self.on_batch = on_batch or (lambda rows: None)
        self._waiting: deque[_Request] = deque()
        self._batches: list[_Batch] = []
        self._changed = threading.Condition()
        self._is_open = False
        self._thread = threading.Thread(target=self._work, name="queqiao-line", daemon=True)

    def start(self) -> None:
        self._is_open = True
        self._thread.start()

    def close(self) -> None:
        """Whoever still waits is told so."""
        with self._changed:
            self._is_open = False
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    @property
    def is_working(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return sum(len(batch.open) for batch in self._batches)

    def check_room(self) -> None:
        """Raises Busy: where a request would be refused, so that nobody has to read it first."""
        if len(self._waiting) >= self.limits.waiting:
            raise Busy(
                f"{len(self._waiting)} requests are waiting already, which is as many as this server takes: try again "
                f"in a moment"
            )

    async def answers(self, ask: Ask) -> AsyncGenerator[Answer, None]:
        """The answer as it grows, whole at last; steps that come faster than they are taken are left out.  Closing
        the iterator, or cancelling whoever waits for it, stops the answer.

        Raises:
            Busy, TooSlow, Failed
        """
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            try:
                loop.call_soon_threadsafe(changed.set)
            except RuntimeError:  # the loop is closed: nobody listens
                pass

        request = _Request(ask, tell)
        until = loop.time() + self.limits.seconds
        self._put(request)
        try:
            while True:
                try:
                    await asyncio.wait_for(changed.wait(), until - loop.time())
                except TimeoutError:
                    raise TooSlow(
                        f"no answer within {self.limits.seconds:g} s: the server is busy, or the answer is long (ask "
                        f"for fewer tokens)"
                    ) from None
                changed.clear()
                is_done = request.is_done  # before the answer, which is written first
                if request.error is not None:
                    raise request.error
                yield request.answer
                if is_done:
                    return
        finally:
            request.is_left = True

    # ------------------------------------------------------------------------------------------- the line's own thread

    def _put(self, request: _Request) -> None:
        with self._changed:
            self.check_room()
            if not self._is_open:
                raise Busy("this server is shutting down")
            self._waiting.append(request)
            self._changed.notify()

    def _work(self) -> None:
        while self._wait():
            if self._waiting and not self._batches:
                time.sleep(self.limits.gather_seconds)
            new = self._admit()
            if new:
                self.on_batch(len(new))
                self._batches.append(_Batch(self.session, new))
            for batch in list(self._batches):
                self._advance(batch)
        for request in [*self._waiting, *(request for batch in self._batches for request in batch.open)]:
            request.end(Failed("this server is shutting down"))

    def _wait(self) -> bool:
        """-> whether there is something to do; False: the line was closed"""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._batches or not self._is_open)
            return self._is_open

    def _admit(self) -> list[_Request]:
        """The next batch, in the order of the line: as many as there is room for."""
        if len(self._batches) >= self.limits.batches:
            return []
        running = [request for batch in self._batches for request in batch.open]
        rows, tokens = len(running), sum(request.num_tokens for request in running)
        new: list[_Request] = []
        with self._changed:
            while self._waiting:
                first = self._waiting[0]
                if first.is_left:
                    self._waiting.popleft()
                    continue
                rows, tokens = rows + 1, tokens + first.num_tokens
                is_over = rows > self.limits.rows or tokens > self.limits.tokens
                if (is_over and rows > 1) or (first.alone and new):
                    break
                new.append(self._waiting.popleft())
                if first.alone:
                    break
        return new

    def _advance(self, batch: _Batch) -> None:
        try:
            has_more = batch.step()
        except Exception as error:  # whatever a model may raise: the server goes on
            has_more = False
            self._failed(batch, error)
        if not has_more:
            self._batches.remove(batch)

    def _failed(self, batch: _Batch, error: Exception) -> None:
        left = batch.open
        if isinstance(error, torch.cuda.OutOfMemoryError):
            torch.cuda.empty_cache()
        if len(batch.requests) > 1 and not batch.has_begun:
            log.warning("a batch of %d failed (%s); its requests are tried one by one", len(left), error)
            for request in left:
                request.alone = True
            with self._changed:
                self._waiting.extendleft(reversed(left))
            return
        log.error("an answer failed", exc_info=error)
        for request in left:
            request.end(Failed(_sentence(error)))


async def until(gone: Coroutine[Any, Any, Any], answers: AsyncGenerator[Answer, None]) -> AsyncGenerator[Answer, None]:
    """The same answers; as soon as `gone` returns they are stopped.  Raises Left."""
    leaving = asyncio.ensure_future(gone)
    try:
        while True:
            step = asyncio.ensure_future(anext(answers))
            try:
                await asyncio.wait({step, leaving}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not step.done():
                    step.cancel()
                    await asyncio.wait({step})
            if step.cancelled():
                raise Left
            try:
                yield step.result()
            except StopAsyncIteration:
                return
    finally:
        leaving.cancel()
        await answers.aclose()


def _sentence(error: Exception) -> str:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "the GPU's memory does not suffice for this request: ask for fewer tokens or pictures"
    if isinstance(error, ValueError):
        return str(error)
    return "the model failed on this request; the server's log says how"
