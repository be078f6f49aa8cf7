"""Pictures that a file names: opened late, as bytes, and only below the folder they are said to be in."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from data.decode import check_header
from data.records import Malformed
from data.source import BadSample

log = logging.getLogger(__name__)

NUM_PROBED = 16  # pictures opened at the start, about: if none of them is there, image_root is wrong
NUM_LOOKED_AT = 10_000  # ... and of which the header is read, where that is cheap: a second or two
NUM_NAMED = 5


def probe(name: str, openings: Sequence[Callable[[], object]], root: object) -> None:
    """A wrong root would look like a data set of nothing but bad samples.  Raises ValueError where no picture opens."""
    missing = ""
    for opened in openings:
        try:
            opened()
            return
        except BadSample as bad:
            missing = f"{bad.reason} at {bad.detail}"
    if openings:
        raise ValueError(
            f"{name}: none of {len(openings)} pictures looked for is there ({missing}); picture paths start from "
            f"image_root, which is {root}"
        )


def look_at(name: str, pictures: Sequence[tuple[Path, str, int]]) -> None:
    """Headers of pictures that files name, (root, reference, row), for what a training would stumble over much later.

    Raises ValueError where no picture opens; warns of those that do not.
    """
    bad = []
    for root, reference, row in tqdm(pictures, desc=f"looking at pictures of {name}", delay=2, leave=False):
        try:
            look_below(root, reference)
        except BadSample as fault:
            bad.append(f"{reference} (row {row}): {fault.reason}")
    if bad and len(bad) == len(pictures):
        raise ValueError(
            f"{name}: none of {len(bad)} pictures looked at can be used; picture paths start from image_root, which is "
            f"{pictures[0][0]}.  The first: {'; '.join(bad[:NUM_NAMED])}"
        )
    if bad:
        log.warning(
            "%s: %d of %d pictures looked at (%.1f%%) cannot be used; a training takes others instead, and ends where "
            "there are more of them than data.max_skip_rate allows.  The first: %s",
            name,
            len(bad),
            len(pictures),
            100 * len(bad) / len(pictures),
            "; ".join(bad[:NUM_NAMED]),
        )


def check_reference(reference: str) -> None:
    """Before anything is opened.  Raises Malformed."""
    if "\0" in reference:
        raise Malformed("picture", "a path", reference)
    if "://" in reference:
        raise Malformed("picture", "a path below image_root (addresses are not fetched)", reference)
    if os.path.isabs(reference) or os.path.normpath(reference).split(os.sep)[0] == os.pardir:
        raise Malformed("picture", "a path below image_root", reference)


def read_below(root: Path, reference: str) -> bytes:
    """Raises BadSample."""
    try:
        return _file_below(root, reference).read_bytes()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a name that is none
        raise BadSample("image cannot be read", detail=str(error)) from error


def look_below(root: Path, reference: str) -> None:
    """That the file is there and begins as a picture does.  Raises BadSample."""
    try:
        check_header(_file_below(root, reference))
    except (OSError, RuntimeError, ValueError) as error:
        raise BadSample("image cannot be read", detail=str(error)) from error


def _file_below(root: Path, reference: str) -> Path:
    root = root.resolve()
    path = (root / reference).resolve()  # follows links: what they point to has to lie below the root as well
    if not path.is_relative_to(root):
        raise BadSample("picture outside image_root", detail=str(path))
    if not path.is_file():
        raise BadSample("no image", detail=str(path))
    return path
