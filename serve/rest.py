"""REST: VisualGLM's `POST /` and OpenAI's `/v1/chat/completions`, over one line of requests.

    curl http://127.0.0.1:7860/ -H 'Content-Type: application/json' -d '{"text": "描述这张图片。", "image": "<base64>"}'

Whatever is refused is refused with a status and a sentence, `{"error": {"message": ...}, "status": ...}`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve import openai_api, visualglm_api
from serve.batching import Busy, Failed, Left, Line, LineLimits, TooSlow, until
from serve.guard import Refused, error_body
from serve.metrics import Metrics
from serve.pictures import PictureReader
from serve.request import prepared, read
from serve.session import Answer, Ask, Session

log = logging.getLogger(__name__)
STATUS: dict[type[Exception], int] = {Busy: 429, TooSlow: 504, Failed: 500}


@dataclass(frozen=True)
class Service:
    """What REST and page share.

    Args:
        max_pictures: of one request.
        arrival_seconds: for a request's bytes to arrive, and again for its pictures to be decoded.
    """

    session: Session
    line: Line
    pictures: PictureReader
    metrics: Metrics
    max_pictures: int = 8
    arrival_seconds: float = 60.0

    @classmethod
    def of(
        cls, session: Session, *, limits: LineLimits | None = None, pictures: PictureReader | None = None, **more: Any
    ) -> Service:
        metrics = Metrics()
        line = Line(session, limits, on_batch=metrics.batch)
        metrics.watch(line)
        return cls(session, line, pictures or PictureReader(session), metrics, **more)


def rest_app(service: Service) -> FastAPI:
    """The routes; nobody has guarded them yet (`serve.guard`)."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None, None]:
        service.line.start()
        yield
        service.line.close()

    # its pages of documentation come from elsewhere (CDN)
    app = FastAPI(title="Queqiao", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    _add_errors(app)
    _add_chat(app, service)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        about = {"id": service.session.name, "object": "model", "created": 0, "owned_by": "queqiao"}
        return {"object": "list", "data": [about]}

    @app.get("/health")
    async def health() -> JSONResponse:
        if not service.line.is_working:
            return JSONResponse(error_body(503, "the model's thread has ended: start the server again"), 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.metrics.text(), media_type=service.metrics.media_type)

    return app


def _add_chat(app: FastAPI, service: Service) -> None:
    async def ask_of(request: Request, kind: Any, make: Callable[[Any], Ask]) -> tuple[Any, Ask]:
        service.line.check_room()  # before anything is read
        asked = await read(request, kind, seconds=service.arrival_seconds)
        return asked, await prepared(lambda: make(asked), seconds=service.arrival_seconds)

    @app.post("/")
    async def visualglm(request: Request) -> JSONResponse:
        asked, ask = await ask_of(
            request, visualglm_api.ChatRequest, lambda asked: visualglm_api.ask_of(asked, service.pictures)
        )
        answer = await whole(while_there(request, service.line.answers(ask)))
        service.metrics.answered(ask, answer)
        return JSONResponse(visualglm_api.answer_of(asked, answer))

    @app.post("/v1/chat/completions")
    async def openai(request: Request) -> Response:
        def make(asked: openai_api.ChatRequest) -> Ask:
            if asked.model not in ("", service.session.name):
                raise Refused(404, f"there is no model {asked.model[:80]!r} here, only {service.session.name!r}")
            return openai_api.ask_of(asked, service.pictures, max_pictures=service.max_pictures)

        asked, ask = await ask_of(request, openai_api.ChatRequest, make)
        completion = openai_api.Completion(ask, service.session.name)
        answers = stopping(while_there(request, service.line.answers(ask)), openai_api.Stopper(asked.stops))
        if asked.stream:
            wants_usage = asked.stream_options is not None and asked.stream_options.include_usage
            first = await anext(answers)  # what goes wrong before the first word still has a status of its own
            return Events(_chunks(service, completion, first, answers, wants_usage))
        answer = await whole(answers)
        service.metrics.answered(ask, answer)
        return JSONResponse(completion.whole(answer))


async def _chunks(
    service: Service,
    completion: openai_api.Completion,
    first: Answer,
    answers: AsyncGenerator[Answer, None],
    wants_usage: bool,
) -> AsyncGenerator[dict[str, Any], None]:
    yield completion.chunk({"role": "assistant", "content": ""})
    answer, shown = first, ""
    async with aclosing(answers):
        while True:
            if len(answer.text) > len(shown):
                yield completion.chunk({"content": answer.text[len(shown) :]})
                shown = answer.text
            try:
                answer = await anext(answers)
            except StopAsyncIteration:
                break
    service.metrics.answered(completion.ask, answer)
    yield completion.chunk({}, answer.ended or "stop")
    if wants_usage:
        yield completion.usage_chunk(answer)


# ------------------------------------------------------------------------------------------------ answers on their way


def while_there(request: Request, answers: AsyncGenerator[Answer, None]) -> AsyncGenerator[Answer, None]:
    """The same; raises Left when the client has gone."""

    async def leaving() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return until(leaving(), answers)


async def stopping(answers: AsyncGenerator[Answer, None], stopper: openai_api.Stopper) -> AsyncGenerator[Answer, None]:
    """Ends where a stop string comes; the last answer is the whole one."""
    last = None
    async with aclosing(answers):
        async for answer in answers:
            last = stopper.cut(answer)
            if last.ended:
                yield last
                return
            yield replace(last, text=stopper.sure(last.text))
        if last is not None:
            yield last


async def whole(answers: AsyncGenerator[Answer, None]) -> Answer:
    found = Answer("")
    async with aclosing(answers):
        async for answer in answers:
            found = answer
    return found


class Events(Response):
    """Server-sent events, as OpenAI's clients read them; closes its source however it ends."""

    media_type = "text/event-stream"

    def __init__(self, source: AsyncGenerator[dict[str, Any], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for found in self.source:
                await self._send(send, json.dumps(found, ensure_ascii=False))
            await self._send(send, "[DONE]")
        except Left:
            pass
        except tuple(STATUS) as error:  # the status is out already
            await self._send(send, json.dumps(error_body(STATUS[type(error)], str(error)), ensure_ascii=False))
        finally:
            await self.source.aclose()
        await send({"type": "http.response.body", "body": b""})

    async def _send(self, send: Send, data: str) -> None:
        await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


# -------------------------------------------------------------------------------------------------------- what is wrong


def _add_errors(app: FastAPI) -> None:
    def refusal(status: int, sentence: str, headers: Any = None) -> JSONResponse:
        return JSONResponse(error_body(status, sentence), status, headers=headers)

    async def refused(_: Request, error: Any) -> JSONResponse:
        unread = {"Connection": "close"} if error.status in (408, 413) else {}
        return refusal(error.status, str(error), error.headers | unread)

    async def of_line(_: Request, error: Exception) -> JSONResponse:
        status = STATUS[type(error)]
        return refusal(status, str(error), {"Retry-After": "1"} if status == 429 else None)

    async def left(_: Request, __: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; nginx's number for the log

    async def of_http(_: Request, error: Any) -> JSONResponse:
        words = {404: "there is nothing at this address", 405: "this address does not take that method"}
        return refusal(error.status_code, words.get(error.status_code, str(error.detail)), error.headers)

    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return refusal(500, "something broke in this server; its log says what")

    app.add_exception_handler(Refused, refused)
    for kind in STATUS:
        app.add_exception_handler(kind, of_line)
    app.add_exception_handler(Left, left)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(StarletteHTTPException, of_http)
    app.add_exception_handler(Exception, unexpected)
