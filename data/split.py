"""Training and held-out part of a data set: by a hash of what must stay together, never by row.

A patient, or a picture, is in one part wherever it occurs: in shards that `scripts/pack_shards.py` split for stage one
and in dialogues of stage two alike, as long as both name the same group and the same shares.  More rows move none.
"""

from __future__ import annotations

import re
from hashlib import sha256

PARTS = ("train", "test")


def held_out_share(split: str) -> float:
    """ "80/20" -> 0.2.  Raises ValueError."""
    numbers = [float(part) for part in split.split("/")] if re.fullmatch(r"\d+(\.\d+)?/\d+(\.\d+)?", split) else []
    if len(numbers) != 2 or not sum(numbers):
        raise ValueError(f"split is {split!r}; expected train/test like 80/20")
    return numbers[1] / sum(numbers)


def part_of(group: str, share: float) -> str:
    """ "train" or "test"."""
    place = int.from_bytes(sha256(group.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
    return "test" if place < share else "train"
