"""Pictures that a file names: opened late, as bytes, and only below the folder they are said to be in."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from data.decode import check_whole, looks_whole
from data.records import Malformed
from data.source import BadSample

log = logging.getLogger(__name__)

NUM_PROBED = 16  # pictures opened at the start, about: if none of them is there, image_root is wrong
NUM_LOOKED_AT = 10_000  # rows whose pictures' first and last bytes are read, where that is cheap: a second or two
NUM_FALSE_ALARMS = 100  # decoded for their unusual ends, and fine: after them no end is taken for unusual
NUM_NAMED = 5

_looked_at: dict[tuple[str, int, int], str | None] = {}  # (path, bytes, time of change) -> what is wrong with it
_false_alarms: list[Path] = []


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


def look_at(name: str, pictures: Iterable[tuple[Path, str, int]]) -> None:
    """At the first and last bytes of pictures that files name, (root, reference, row), for what a training would
    stumble over much later; each is looked at once in a process, however many rows and sources show it.

    Where warnings are not shown, as on all ranks but the first, only until one can be used.  Raises ValueError where
    none can; warns of those that cannot.
    """
    rows: dict[tuple[Path, str], int] = {}
    for root, reference, row in pictures:
        rows.setdefault((root, reference), row)
    places, shown = list(rows), log.isEnabledFor(logging.WARNING)
    bad: dict[str, list[str]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of large pictures and broken EXIF
        for place in tqdm(places, desc=f"looking at pictures of {name}", delay=2, leave=False):
            reason = look_below(*place)
            if reason is None and not shown:
                return
            if reason is not None:
                bad.setdefault(reason, []).append(f"{place[1]} (row {rows[place]}): {reason}")
    num_bad = sum(map(len, bad.values()))
    named = "; ".join(one for of_a_kind in bad.values() for one in of_a_kind[:NUM_NAMED])
    if bad and num_bad == len(places):
        raise ValueError(
            f"{name}: none of {num_bad} pictures looked at can be used; picture paths start from image_root, which is "
            f"{places[0][0]}.  The first of each kind: {named}"
        )
    if bad:
        log.warning(
            "%s: %d of %d pictures looked at (%.1f%%) cannot be used; a training takes others instead, and ends where "
            "there are more of them than data.max_skip_rate allows.  %s.  The first of each kind: %s",
            name,
            num_bad,
            len(places),
            100 * num_bad / len(places),
            ", ".join(f"{len(of_a_kind)} {reason}" for reason, of_a_kind in bad.items()),
            named,
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


def look_below(root: Path, reference: str) -> str | None:
    """What is wrong with the file, by its beginning and its end; None where nothing is."""
    try:
        path = _file_below(root, reference)
        status = path.stat()
        known = (str(path), status.st_size, status.st_mtime_ns)
        if known not in _looked_at:
            _looked_at[known] = _fault(path)
        return _looked_at[known]
    except BadSample as fault:
        return fault.reason
    except (OSError, RuntimeError, ValueError):
        return "image cannot be read"


def _fault(path: Path) -> str | None:
    try:
        if not looks_whole(path) and len(_false_alarms) < NUM_FALSE_ALARMS:
            check_whole(path)
            _false_alarms.append(path)
    except BadSample as fault:
        return fault.reason
    return None


def _file_below(root: Path, reference: str) -> Path:
    root = root.resolve()
    path = (root / reference).resolve()  # follows links: what they point to has to lie below the root as well
    if not path.is_relative_to(root):
        raise BadSample("picture outside image_root", detail=str(path))
    if not path.is_file():
        raise BadSample("no image", detail=str(path))
    return path
