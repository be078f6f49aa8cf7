"""Pictures as strangers send them -> what `Session.picture` makes of them: bytes in a typed field, within limits.

An address is fetched only where the server was told hosts to fetch from (`serve/fetch.py`).
"""

from __future__ import annotations

import base64
import binascii
import re
import threading
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from data.decode import open_image
from data.source import BadSample
from serve.fetch import Fetcher
from serve.session import Session

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")  # fewer than training reads: each is a parser that strangers reach
_DATA_URL = re.compile(r"data:image/[a-zA-Z0-9.+-]{1,40};base64,", re.ASCII)
_SPACE = str.maketrans("", "", " \t\r\n")  # base64 may come in lines
_AT_A_TIME = threading.BoundedSemaphore(4)  # one of 40 megapixels takes 120 MB, and again so much while it is turned


@dataclass(frozen=True)
class PictureReader:
    """
    Args:
        max_bytes: of one picture, as a file.
        max_pixels: by its header, before anything is decompressed.
        fetcher: None: no address is fetched.
    """

    session: Session
    max_bytes: int = 10 * 2**20
    max_pixels: int = 40_000_000
    fetcher: Fetcher | None = None

    def from_bytes(self, raw: bytes) -> Tensor:
        """-> uint8 (3, H, W).  The first frame of several; upright.  Raises ValueError."""
        if len(raw) > self.max_bytes:
            raise ValueError(
                f"the picture has {len(raw)} bytes; this server takes {self.max_bytes}: send a smaller one"
            )
        with _AT_A_TIME:
            try:
                opened = open_image(raw, max_pixels=self.max_pixels, formats=FORMATS)
            except BadSample as bad:
                raise ValueError(f"the picture cannot be used: {bad}") from bad
            return self.session.picture(opened)

    def from_base64(self, text: str) -> Tensor:
        """Also of a data URL.  Raises ValueError."""
        if start := _DATA_URL.match(text):
            text = text[start.end() :]
        text = text.translate(_SPACE)
        if len(text) > (self.max_bytes + 2) // 3 * 4:
            raise ValueError(
                f"the picture has about {len(text) // 4 * 3} bytes; this server takes {self.max_bytes}: send a smaller "
                f"one"
            )
        try:
            raw = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(
                f"the picture is no base64 ({error}): send the file's bytes in base64, not a path or an address"
            ) from None
        if not raw:
            raise ValueError("the picture is empty")
        return self.from_bytes(raw)

    def from_url(self, url: str) -> Tensor:
        """A data URL; another one where the server fetches from its host.  Raises ValueError."""
        if _DATA_URL.match(url):
            return self.from_base64(url)
        if self.fetcher is not None:
            return self.from_bytes(self.fetcher.get(url, max_bytes=self.max_bytes))
        raise ValueError(
            "a picture's address has to be data:image/...;base64,... with the file's bytes in it: this server fetches "
            "nothing"
        )

    def from_upload(self, path: Path) -> Tensor:
        """What the page has uploaded; the path is the server's own.  Raises ValueError."""
        with path.open("rb") as file:
            return self.from_bytes(file.read(self.max_bytes + 1))
