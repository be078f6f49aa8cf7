"""A real server on a port of this machine, around a tiny model."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from serve.batching import LineLimits
from serve.pictures import PictureReader
from serve.rest import Service
from serve.server import app_of, running
from serve.session import Session
from tests.tiny_chat import pictures, tiny_chat, train_pieces

NAME = "tiny"
WAIT = 90.0  # seconds; what takes longer hangs


def tiny_session(place: Path, **more: Any) -> Session:
    return Session(tiny_chat(train_pieces(place / "ice_text.model")), name=NAME, **{"max_tokens": 4096, **more})


@dataclass(frozen=True)
class Live:
    url: str
    service: Service

    @property
    def session(self) -> Session:
        return self.service.session

    @property
    def is_idle(self) -> bool:
        return not self.service.line.num_running and not self.service.line.num_waiting


@contextmanager
def live(
    session: Session, *, limits: LineLimits | None = None, reader: dict[str, Any] | None = None, **more: Any
) -> Iterator[Live]:
    of_service = {name: more.pop(name) for name in ("max_pictures", "arrival_seconds") if name in more}
    service = Service.of(session, limits=limits, pictures=PictureReader(session, **(reader or {})), **of_service)
    with running(app_of(service, **{"page": False, **more})) as url:
        yield Live(url, service)


def wait_until(is_so: Callable[[], bool], *, seconds: float = WAIT) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, f"waited {seconds} s for it"
        time.sleep(0.01)


def image(number: int) -> Image.Image:
    return Image.fromarray(pictures(4)[number].permute(1, 2, 0).numpy().copy())


def file_of(picture: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **how)
    return buffer.getvalue()


def base64_of(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def data_url(raw: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64_of(raw)}"
