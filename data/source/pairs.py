"""What all files of images and captions share: rows checked at the start, pictures opened when needed.

A format is one file beside this one: `entries()` says which pictures there are and what is said of each.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from data.picture_files import NUM_PROBED, check_reference, probe, read_below
from data.source import BadSample, RawSample

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A picture and what is said of it in one language, as its format reads it."""

    image: str  # a path below image_root, or whatever the format's `open` understands
    captions: tuple[str, ...]
    language: str
    image_id: str  # equal for equal pictures
    caption_ids: tuple[str, ...] = ()  # where a caption may belong to several pictures


@dataclass(kw_only=True)
class PairSource:
    """Base of the formats.

    Args:
        image_root: the folder that picture paths start from, and may not leave.
        name: how logs and errors call it.
    Raises:
        ValueError: no file, a row that is not as expected, no picture at all, or none of those looked for is there.
    """

    image_root: str
    name: str = "pairs"

    _entries: dict[str, list[bytes]] = field(init=False, repr=False)  # JSON: Python objects would be copied to workers

    def __post_init__(self) -> None:
        self.root = Path(self.image_root).expanduser()
        self._entries = {}
        for entry in self.entries():
            packed = [entry.image, entry.captions, entry.image_id, entry.caption_ids]
            self._entries.setdefault(entry.language, []).append(
                json.dumps(packed, ensure_ascii=False).encode("utf-8", "surrogatepass")
            )
        self.languages = tuple(sorted(self._entries))
        if not self.languages:
            raise ValueError(f"{self.name}: not a single picture with a caption ({self.described()})")
        language, number = self.languages[0], self.num_samples(self.languages[0])
        some = range(0, number, max(1, number // NUM_PROBED))
        probe(self.name, [partial(self.read, language, index) for index in some], self.image_root)
        log.info("%s: pictures per language %s", self.name, {key: self.num_samples(key) for key in self.languages})

    # ------------------------------------------------------------------------------------------ what a format writes

    def entries(self) -> Iterator[Entry]:
        """Raises ValueError: the file, the row, what was expected."""
        raise NotImplementedError

    def described(self) -> str:
        """Which part of which file it is, for errors and the fingerprint."""
        raise NotImplementedError

    def open(self, reference: str) -> bytes:
        """The picture's bytes.  Raises BadSample."""
        return read_below(self.root, reference)

    # -------------------------------------------------------------------------------------------------------- Source

    def num_samples(self, language: str) -> int:
        return len(self._entries.get(language, ()))

    def read(self, language: str, index: int) -> RawSample:
        image, captions, image_id, caption_ids = json.loads(self._entries[language][index])
        where = {"shard": self.name, "key": image}
        try:
            picture = self.open(image)
        except BadSample as bad:
            raise BadSample(bad.reason, detail=bad.detail, **where) from bad
        return RawSample(picture, tuple(captions), image_id=image_id, caption_ids=tuple(caption_ids), **where)

    def fingerprint(self) -> Mapping[str, Any]:
        digest = blake2b(digest_size=16)
        for language in self.languages:
            for packed in self._entries[language]:
                digest.update(packed)
        samples = {language: self.num_samples(language) for language in self.languages}
        return {"samples": samples, "texts": digest.hexdigest(), "part": self.described()}


def checked(reference: str) -> str:
    """A path that may be opened.  Raises Malformed."""
    check_reference(reference)
    return reference


def lines_of(file: Path) -> Iterator[tuple[int, str]]:
    """(line number, line) of those that are not empty.  Raises ValueError: no such file, no UTF-8."""
    if not file.is_file():
        raise ValueError(f"no file at {file}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 at byte {error.start}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.rstrip("\r")


def ids_of(file: Path) -> Sequence[str]:
    """One a line, each once."""
    return list(dict.fromkeys(line.strip() for _, line in lines_of(file)))
