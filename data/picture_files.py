"""Pictures that a file names: opened late, as bytes, and only below the folder they are said to be in."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from data.records import Malformed
from data.source import BadSample

NUM_PROBED = 16  # pictures looked for at the start, about: if none of them is there, image_root is wrong


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
        root = root.resolve()
        path = (root / reference).resolve()  # follows links: what they point to has to lie below the root as well
        if not path.is_relative_to(root):
            raise BadSample("picture outside image_root", detail=str(path))
        if not path.is_file():
            raise BadSample("no image", detail=str(path))
        return path.read_bytes()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a name that is none
        raise BadSample("image cannot be read", detail=str(error)) from error
