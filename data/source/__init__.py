"""The protocols every data format implements: one file here per format, and nothing above it knows which one it is.

Stage one reads `Source`, image-text pairs; stage two and domain fine-tuning read `DialogueSource`.

A source is map-style: sample `index` of `language` is the same sample on every rank, in every worker and after every
restart, because a sample's place in the run is arithmetic on its index (data/mixture.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from data.batch import Dialogue


@dataclass(frozen=True)
class RawSample:
    """One image with everything that may be said about it in one language, before anything is decoded or drawn."""

    image: bytes | Image.Image | np.ndarray  # an encoded file, a picture, or uint8 of shape (H, W, 3)
    captions: tuple[str, ...]  # candidates; one is drawn by (seed, step, row)
    key: str  # names the sample in logs and errors, together with `shard`
    shard: str = ""
    image_id: str = ""  # equal for equal images (sha256, url, number); "" asks for a hash of the image's bytes
    keywords: tuple[str, ...] = ()  # may be mixed into the caption, at most `max_keywords` of them
    max_keywords: int = 0
    caption_ids: tuple[
        str, ...
    ] = ()  # of each caption, where one may belong to several images (a query); evaluators ask


class BadSample(Exception):
    """This sample cannot be used: the loader replaces it by arithmetic, counts it and goes on.

    Args:
        reason: a few fixed words, they are counted ("truncated image", "empty text").
        detail: what exactly was found, for the log.
    """

    def __init__(self, reason: str, *, shard: str = "", key: str = "", detail: str = ""):
        super().__init__(reason, shard, key, detail)
        self.reason, self.shard, self.key, self.detail = reason, shard, key, detail

    def __str__(self) -> str:
        where = f" ({self.shard} {self.key})" if self.shard or self.key else ""
        return f"{self.reason}{where}" + (f": {self.detail}" if self.detail else "")


class Source(Protocol):
    """Samples of one or several languages, by number."""

    name: str
    languages: tuple[str, ...]

    def num_samples(self, language: str) -> int:
        """How many samples `language` has; known without decoding anything."""
        ...

    def read(self, language: str, index: int) -> RawSample:
        """Sample `index` in 0 .. num_samples(language) - 1.  Raises BadSample where it cannot be used."""
        ...

    def fingerprint(self) -> Mapping[str, Any]:
        """What the samples and their order depend on, as JSON values; a resumed run compares it."""
        ...


# ------------------------------------------------------------------------------------------ stage two: dialogues


@dataclass(frozen=True)
class RawDialogue:
    """A dialogue with its pictures, before anything is encoded or decoded."""

    dialogues: tuple[Dialogue, ...]  # candidates (several prompts for one report); one is drawn by (seed, step, row)
    images: tuple[bytes | Image.Image | np.ndarray, ...]  # in the order of the turns
    key: str
    shard: str = ""  # the file


class DialogueSource(Protocol):
    """Dialogues in one or several languages, by number.

    Attributes:
        scans: whether every text is read at the start of a run, to know its length and that something is learnt from
            it; False for shards, whose texts lie as far away as their pictures.
    """

    name: str
    languages: tuple[str, ...]
    scans: bool

    def num_samples(self, language: str) -> int: ...

    def dialogues(self, language: str, index: int) -> tuple[Dialogue, ...]:
        """The candidates of sample `index`; no picture is opened.  Raises BadSample where `scans` is False."""
        ...

    def where(self, language: str, index: int) -> str:
        """For an error: the file and the row."""
        ...

    def read(self, language: str, index: int) -> RawDialogue:
        """Raises BadSample where it cannot be used, as where a picture is missing."""
        ...

    def fingerprint(self) -> Mapping[str, Any]: ...
