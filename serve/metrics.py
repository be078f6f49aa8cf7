"""What a server counts, for Prometheus."""

from __future__ import annotations

import time

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.batching import Line
from serve.memory import used_bytes
from serve.session import Answer, Ask

PATHS = ("/", "/v1/chat/completions", "/v1/models", "/health", "/metrics")  # others are one: strangers choose no labels
METHODS = ("GET", "HEAD", "POST")
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)


class Metrics:
    media_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("method", "path")
        self.requests = Counter("queqiao_requests", "Requests answered", (*labels, "status"), registry=self.registry)
        self.seconds = Histogram(
            "queqiao_request_seconds",
            "To an answer's end",
            labels,
            buckets=SECONDS,
            registry=self.registry,
        )
        self.tokens = Counter("queqiao_tokens", "Of prompts and answers", ("kind",), registry=self.registry)
        self.rows = Histogram(
            "queqiao_batch_rows", "Requests in a batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry
        )

    def watch(self, line: Line) -> None:
        def gauge(name: str, about: str) -> Gauge:
            return Gauge(f"queqiao_{name}", about, registry=self.registry)

        gauge("waiting", "Requests that wait for a batch").set_function(lambda: line.num_waiting)
        gauge("running", "Answers on their way").set_function(lambda: line.num_running)
        gauge("memory_bytes", "Of the model's device").set_function(lambda: used_bytes(line.session.device)[0])

    def batch(self, num_rows: int) -> None:
        self.rows.observe(num_rows)

    def answered(self, ask: Ask, answer: Answer) -> None:
        self.tokens.labels("prompt").inc(len(ask.encoded.ids))
        self.tokens.labels("answer").inc(answer.num_tokens)

    def text(self) -> str:
        return generate_latest(self.registry).decode()


class Counting:
    """An ASGI wrapper that counts what passes, refusals included."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in PATHS else "other"
        method = scope["method"] if scope["method"] in METHODS else "other"
        begin, status = time.perf_counter(), 500

        async def watching(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watching)
        finally:
            self.metrics.requests.labels(method, path, str(status)).inc()
            self.metrics.seconds.labels(method, path).observe(time.perf_counter() - begin)
