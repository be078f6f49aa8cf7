"""From what a user writes to the local tar files that are read: braces, globs, folders, `::`, and remote addresses."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from glob import glob
from hashlib import blake2b
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from braceexpand import braceexpand
from tqdm import tqdm

from data.scan import first_bytes, open_tar

REMOTE = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]*://")
FETCH_ATTEMPTS = 3
RETRY_PAUSE_S = 2.0
FETCHES = 8  # at a time


def cache_home() -> Path:
    """Where indexes and fetched shards go when nothing else is said: $QUEQIAO_CACHE, else ~/.cache/queqiao."""
    return Path(os.environ.get("QUEQIAO_CACHE") or Path.home() / ".cache" / "queqiao")


def expand_shards(paths: str | Sequence[str]) -> list[str]:
    """Addresses of all shards, in the order written and sorted within a glob or folder.

    Each entry may hold braces (`{00000..00031}`), be a glob, a folder (its *.tar), a remote address (http, https, and
    what fsspec knows: s3, hf, gs), or several of these joined by `::` (open_clip's notation).  Raises ValueError where
    an entry finds nothing or a shard comes twice.
    """
    entries = [paths] if isinstance(paths, str) else list(paths)
    found: list[str] = []
    for entry in (part for text in entries for part in str(text).split("::")):
        matches = [path for pattern in braceexpand(os.path.expanduser(entry.strip())) for path in _matches(pattern)]
        if not matches:
            raise ValueError(f"no shard at {entry!r} (working directory {os.getcwd()}): expected tar files")
        found += matches
    twice = sorted({path for path in found if found.count(path) > 1}) if len(set(found)) < len(found) else []
    if twice:
        raise ValueError(f"{len(twice)} shards come twice, the first is {twice[0]}; weights belong in data.mixture")
    return found


def _matches(pattern: str) -> list[str]:
    if REMOTE.match(pattern):
        return _remote_glob(pattern) if re.search(r"[*\[]", pattern) else [pattern]
    if os.path.isdir(pattern):
        return sorted(glob(os.path.join(glob_escape(pattern), "*.tar")))
    if os.path.exists(pattern):
        return [pattern]
    return sorted(glob(pattern, recursive=True))


def glob_escape(path: str) -> str:
    """A folder's name may hold brackets."""
    return re.sub(r"([*?[])", r"[\1]", path)


def _remote_glob(pattern: str) -> list[str]:
    fs, path = _filesystem(pattern)
    scheme = pattern.split("://", 1)[0]
    return [f"{scheme}://{found}" for found in sorted(fs.glob(path))]


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec  # type: ignore[import-untyped]

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url}: {error}") from error


def local_copy(address: str, cache_dir: Path) -> Path:
    """A local file with the content of `address`; remote ones are fetched whole, once per machine.

    Raises ValueError where it cannot be fetched completely or is something else, FileNotFoundError where there is none.
    """
    if not REMOTE.match(address):
        return Path(address)
    # shards of one folder stay together; behind a query (get?file=3.tar) every address is a place of its own
    place = address if "?" in address else address.rpartition("/")[0]
    folder = cache_dir / blake2b(place.encode(), digest_size=8).hexdigest()
    target = folder / address.rsplit("/", 1)[1].split("?")[0]
    if _is_kept(target):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with locked(target):
        if not _is_kept(target):  # another rank may have fetched it while this one waited
            target.unlink(missing_ok=True)
            _fetch(address, target)
    return target


def _is_kept(target: Path) -> bool:
    """Pages instead of shards were kept too, once."""
    try:
        _check_kind(target, str(target))
    except (FileNotFoundError, ValueError):
        return False
    return True


def _check_kind(file: Path, address: str) -> None:
    """Raises ValueError: a server may answer with a page, and status 200, what it will not give."""
    if address.split("?")[0].endswith(".parquet"):
        begin = first_bytes(file)
        if not begin.startswith(b"PAR1"):
            raise ValueError(f"{address}: not a parquet file, it begins with {begin!r}")
    else:
        open_tar(file, name=address).close()


def local_copies(addresses: Sequence[str], cache_dir: Path, *, with_parquet: bool) -> list[Path]:
    """All shards as local files, several fetched at a time; `with_parquet` brings img2dataset's tables along.

    Raises ValueError naming the first shard that cannot be had.
    """

    def fetch(address: str) -> Path:
        try:
            shard = local_copy(address, cache_dir)
        except FileNotFoundError as error:
            raise ValueError(f"no shard at {address}: {error}") from error
        if with_parquet and REMOTE.match(address):
            with suppress(FileNotFoundError):  # then the language stands in the JSON
                local_copy(address.removesuffix(".tar") + ".parquet", cache_dir)
        return shard

    num_remote = sum(REMOTE.match(address) is not None for address in addresses)
    with ThreadPoolExecutor(FETCHES) as pool:
        fetched = pool.map(fetch, addresses)
        hidden = None if num_remote else True
        return list(tqdm(fetched, desc="fetching", unit="shard", total=len(addresses), disable=hidden))


def _fetch(address: str, target: Path) -> None:
    part = target.with_name(target.name + ".part")
    problem = ""
    for attempt in range(FETCH_ATTEMPTS):
        if attempt:
            time.sleep(RETRY_PAUSE_S)
        try:
            expected = _download(address, part)
        except FileNotFoundError:
            raise
        except HTTPError as error:
            if error.code in {404, 410}:
                raise FileNotFoundError(f"the server answered {error.code} {error.reason}") from error
            problem = f"the server answered {error.code} {error.reason}"
            continue
        except (OSError, HTTPException) as error:  # URLError is an OSError; a chunked answer that ends early is none
            problem = str(error)
            continue
        if expected is None or part.stat().st_size == expected:
            try:
                _check_kind(part, address)
            except ValueError:
                part.unlink()
                raise
            os.replace(part, target)
            return
        problem = f"{part.stat().st_size} of {expected} bytes came"
    raise ValueError(f"{address}: could not be fetched in {FETCH_ATTEMPTS} attempts ({problem})")


def _download(address: str, part: Path) -> int | None:
    """Writes the file and returns how many bytes it should have."""
    if address.startswith(("http://", "https://")):
        with urllib.request.urlopen(address, timeout=60) as response, open(part, "wb") as out:  # noqa: S310
            length = response.headers.get("Content-Length")
            shutil.copyfileobj(response, out, 1 << 20)
        return None if length is None else int(length)
    fs, path = _filesystem(address)
    with fs.open(path, "rb") as response, open(part, "wb") as out:
        shutil.copyfileobj(response, out, 1 << 20)
    return fs.size(path)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """One process of this machine at a time: ranks start together and want the same files."""
    folder = Path(tempfile.gettempdir()) / f"queqiao-locks-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with open(folder / blake2b(str(target.resolve()).encode(), digest_size=16).hexdigest(), "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
