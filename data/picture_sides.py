"""Which pictures are on both sides of a split, or of two sources: what was trained on proves nothing.

Eight bytes are kept for each picture, so that millions of rows can be compared; names are looked up where they collide.
"""

from __future__ import annotations

import logging
import os
from array import array
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

NUM_NAMED = 5


class PictureSide:
    """The pictures of one part, by their paths as they are written, "./a.png" and "a.png" being one."""

    def __init__(self) -> None:
        self._hashes = array("Q")

    def note(self, root: Path, references: Iterable[str]) -> None:
        self._hashes.extend(_hash(root, reference) for reference in references)

    def shared_with(self, other: PictureSide) -> frozenset[int]:
        """Hashes of pictures that are on both sides."""
        own, others = (np.frombuffer(side._hashes, np.uint64) for side in (self, other))
        return frozenset(map(int, np.intersect1d(own, others)))


def named(shared: frozenset[int], pictures: Iterable[tuple[Path, str, int]]) -> str:
    """ "a.png (row 3), b.png (row 8), ..." of those that are shared, of (root, reference, row)."""
    found: dict[int, str] = {}
    for root, reference, row in pictures:
        number = _hash(root, reference)
        if number in shared and number not in found:
            found[number] = f"{reference} (row {row})"
            if len(found) == NUM_NAMED:
                break
    return ", ".join(found.values()) + (", ..." if len(shared) > NUM_NAMED else "")


def warn_of_shared(training: Mapping[str, Any], evaluators: Iterable[Any]) -> None:
    """Where an evaluator asks about pictures that a source trains on: two files, or a source without its part."""
    comparable = {name: source for name, source in training.items() if hasattr(source, "pictures")}
    for evaluator in evaluators:
        asked: Any = getattr(evaluator, "source", None)
        for name, source in comparable.items() if hasattr(asked, "pictures") else ():
            shared = source.pictures.shared_with(asked.pictures)
            if shared:
                log.warning(
                    "train.evaluator.%s asks about %d pictures that data.source.%s trains on (%s): its numbers do not "
                    "tell what was learned",
                    evaluator.name,
                    len(shared),
                    name,
                    asked.names_of_pictures(shared),
                )


def _hash(root: Path, reference: str) -> int:
    path = os.path.normpath(os.path.join(root, reference))
    return int.from_bytes(blake2b(path.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
