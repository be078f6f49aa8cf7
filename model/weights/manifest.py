"""What a checkpoint's folder tells of its own files: `complete`, written last, with the size and SHA-256 of each.

A cut file is found by its size, a flipped bit by its hash alone.  Checkpoints from before hashes were written tell
sizes (`{name: bytes}`), and are read as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

MARKER = "complete"
_THREADS = 4  # Python's lock is open while one hashes
_hashes: dict[tuple[str, int, int], str] = {}  # by path, size and time: a start asks more than once

Told = dict[str, tuple[int, str | None]]  # name -> bytes and SHA-256


def fingerprint_of_file(path: Path) -> str:
    """Changes when anything in the file does."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def described(folder: Path) -> Iterator[None]:
    """Hashes the folder's files while the body runs, which may wait for the disk, and then writes the marker."""
    files = sorted(folder.iterdir())
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = pool.map(fingerprint_of_file, files)
        yield
        told = {
            file.name: {"bytes": file.stat().st_size, "sha256": sha256}
            for file, sha256 in zip(files, hashes, strict=True)
        }
    (folder / MARKER).write_text(json.dumps(told, indent=1), encoding="utf-8")


def fault(folder: Path, *, contents: bool = True) -> str | None:
    """Why a checkpoint cannot be used, None when it can.

    Args:
        contents: read every file to its end; otherwise a hash counts where this process knows it already.
    """
    if not (folder / MARKER).is_file():
        return "it was not written to the end"
    told = _told(folder)
    if told is None:
        return "its marker file is damaged"
    with ThreadPoolExecutor(_THREADS) as pool:
        faults = pool.map(lambda name: _fault_of(folder / name, *told[name], contents=contents), told)
        return next((found for found in faults if found is not None), None)


def check(file: Path) -> None:
    """Of one file, where a marker beside it tells of it.  Raises ValueError where it is not as it was written."""
    told = _told(file.parent) or {}
    found = _fault_of(file, *told[file.name], contents=True) if file.name in told else None
    if found is not None:
        raise ValueError(f"{file.parent}: {found}.  Copy it again, or name another checkpoint")


def _told(folder: Path) -> Told | None:
    """None where there is no marker, or one that tells nothing."""
    try:
        told = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        found: Told = {
            name: (about, None) if isinstance(about, int) else (int(about["bytes"]), str(about["sha256"]))
            for name, about in told.items()
        }
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return None
    return found or None


def _fault_of(file: Path, size: int, sha256: str | None, *, contents: bool) -> str | None:
    try:
        if not file.is_file():
            return f"{file.name} is missing"
        if file.stat().st_size != size:
            return f"{file.name} has {file.stat().st_size} bytes instead of {size}"
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                pass
        elif file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        found = _hash(file, ask=contents) if sha256 else None
    except (SafetensorError, ValueError) as error:
        return f"{file.name} is damaged ({error})"
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror or error})"
    if found not in (None, sha256):
        return f"{file.name} is damaged (its SHA-256 is not what it was written with: bits have changed)"
    return None


def _hash(file: Path, *, ask: bool) -> str | None:
    stat = file.stat()
    key = str(file.resolve()), stat.st_size, stat.st_mtime_ns
    if ask and key not in _hashes:
        _hashes[key] = fingerprint_of_file(file)
    return _hashes.get(key)
