"""The offset index of a source: where in which tar each sample's image, text and JSON lie, language by language.

webdataset reads tars front to back; a run whose order is arithmetic needs sample i alone.  So every shard is scanned
once (data/scan.py), and the result is kept in a small .npz beside it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.scan import SAMPLE, Layout, ShardIndex, scan_shard
from data.shard_list import cache_home, locked

SHARED_FROM = 2_000_000  # samples; 70 bytes each


@dataclass(frozen=True)
class SourceIndex:
    """All shards of a source, joined; a sample is numbered through all of them."""

    first: np.ndarray  # int64: the first sample of each shard, and one past the last
    samples: np.ndarray  # SAMPLE
    keys: np.ndarray
    key_end: np.ndarray
    rows: Mapping[str, np.ndarray]  # language -> its samples
    left_out: Mapping[str, int]
    digest: str


def load_source_index(shards: Sequence[Path], layout: Layout, *, name: str, workers: int | None = None) -> SourceIndex:
    """The index of all shards: each from its file where that is fresh, else scanned, several at a time.

    From SHARED_FROM samples on it lies in one folder of the cache and is mapped, not read: the ranks of a machine share
    one copy, and the next start takes no time.  Raises ValueError naming every shard that could not be read.
    """
    place = blake2b("\0".join([layout.signature, *(str(shard.resolve()) for shard in shards)]).encode(), digest_size=8)
    folder = cache_home() / "index" / place.hexdigest()
    stamp = blake2b(json.dumps([_stamp(shard) for shard in shards]).encode(), digest_size=8).hexdigest()
    index = _map(folder, stamp)
    if index is not None:
        return index
    metas = _prepare(shards, layout, name=name, workers=workers)
    if sum(meta["samples"] for meta in metas) < SHARED_FROM:
        return _join(shards, layout, metas, lambda name, size, dtype: np.empty(size, dtype))
    with locked(folder):
        index = _map(folder, stamp)
        if index is None:
            _share(folder, stamp, lambda new: _join(shards, layout, metas, new))
            index = _map(folder, stamp)
    assert index is not None, folder
    return index


def _prepare(shards: Sequence[Path], layout: Layout, *, name: str, workers: int | None) -> list[dict[str, Any]]:
    """Makes the indexes that are missing or stale; what each one says about itself."""
    metas: dict[int, dict[str, Any]] = {}
    missing = []
    for i, shard in enumerate(shards):
        meta = _read_meta(_index_file(shard, layout), _stamp(shard))
        if meta is None:
            missing.append(i)
        else:
            metas[i] = meta
    failed = []
    scanned = _scan_all([shards[i] for i in missing], layout, min(workers or os.cpu_count() or 1, 32, len(missing)))
    with tqdm(total=len(missing), desc=f"indexing {name}", unit="shard", disable=None if missing else True) as bar:
        for i, result in zip(missing, scanned, strict=True):
            bar.update()
            if isinstance(result, str):
                failed.append(result)
            else:
                metas[i] = result
    if failed:
        more = f"\n  and {len(failed) - 10} more" if len(failed) > 10 else ""
        raise ValueError(f"{len(failed)} of {len(shards)} shards cannot be read:\n  " + "\n  ".join(failed[:10]) + more)
    return [metas[i] for i in range(len(shards))]


def _scan_all(shards: Sequence[Path], layout: Layout, workers: int) -> Iterator[dict[str, Any] | str]:
    jobs = [(shard, layout) for shard in shards]
    if workers <= 1:
        yield from map(_scan_or_say, jobs)
        return
    # fork: nothing is inherited that a scan touches, and callers need no __main__ guard
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        yield from pool.map(_scan_or_say, jobs)


def _scan_or_say(job: tuple[Path, Layout]) -> dict[str, Any] | str:
    """Scans and saves, unless another process of this machine has done so meanwhile."""
    shard, layout = job
    try:
        file, stamp = _index_file(shard, layout), _stamp(shard)
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(file):
            return _read_meta(file, stamp) or _save(scan_shard(shard, layout), file, stamp)
    except (ValueError, OSError) as error:
        return str(error)


# ------- files: one index per shard, and one folder for all of a large source


def _stamp(shard: Path) -> list[int]:
    """Size and time of the tar and of the parquet beside it: an index of other files is not used."""
    stamp = []
    for path in (shard, shard.with_suffix(".parquet")):
        if path.exists():
            stat = path.stat()
            stamp += [stat.st_size, stat.st_mtime_ns]
    return stamp


def _index_file(shard: Path, layout: Layout) -> Path:
    if os.access(shard.parent, os.W_OK):
        return shard.with_name(f"{shard.stem}.{layout.signature}.index.npz")
    place = blake2b(str(shard.resolve()).encode(), digest_size=8).hexdigest()
    return cache_home() / "index" / f"{shard.stem}.{place}.{layout.signature}.index.npz"


def _save(index: ShardIndex, file: Path, stamp: list[int]) -> dict[str, Any]:
    rows = {f"rows_{i}": array for i, array in enumerate(index.rows.values())}
    arrays = {"samples": index.samples, "keys": index.keys, "key_end": index.key_end, **rows}
    digest = blake2b(digest_size=16)
    for array in arrays.values():
        digest.update(array.tobytes())
    meta = {
        "stamp": stamp,
        "samples": len(index.samples),
        "key_bytes": len(index.keys),
        "languages": {language: len(array) for language, array in index.rows.items()},
        "left_out": index.left_out,
        "digest": digest.hexdigest(),
    }
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    with open(part, "wb") as out:
        np.savez(out, meta=np.array(json.dumps(meta)), **arrays)  # type: ignore[arg-type]
    os.replace(part, file)
    return meta


def _read_meta(file: Path, stamp: list[int]) -> dict[str, Any] | None:
    """None where there is no index or it is of other files (or was damaged): it will be made anew."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            meta = json.loads(str(arrays["meta"]))
        return meta if meta["stamp"] == stamp else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


@contextmanager
def _opened(file: Path) -> Iterator[Mapping[str, np.ndarray]]:
    """Raises ValueError for arrays that are damaged behind a sound head; a broken head has the index made anew."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            yield arrays
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file}: this index is damaged ({error}); remove it, and it is made anew") from error


NewArray = Callable[[str, int, Any], np.ndarray]  # (name, size, dtype) -> where to write


def _join(shards: Sequence[Path], layout: Layout, metas: Sequence[Mapping[str, Any]], new: NewArray) -> SourceIndex:
    """One shard after the other into arrays of the final size, so that nothing is held twice."""
    num_samples = sum(meta["samples"] for meta in metas)
    languages = sorted({language for meta in metas for language in meta["languages"]})
    first = new("first", len(shards) + 1, np.int64)
    samples, key_end = new("samples", num_samples, SAMPLE), new("key_end", num_samples, np.int64)
    keys = new("keys", sum(meta["key_bytes"] for meta in metas), np.uint8)
    number = np.uint32 if num_samples < 1 << 32 else np.int64
    sizes = {language: sum(meta["languages"].get(language, 0) for meta in metas) for language in languages}
    rows = {language: new(f"rows_{i}", sizes[language], number) for i, language in enumerate(languages)}
    at = key_at = 0
    filled = dict.fromkeys(languages, 0)
    for n, (shard, meta) in enumerate(zip(shards, metas, strict=True)):
        first[n] = at
        with _opened(_index_file(shard, layout)) as arrays:
            samples[at : at + meta["samples"]] = arrays["samples"]
            keys[key_at : key_at + meta["key_bytes"]] = arrays["keys"]
            key_end[at : at + meta["samples"]] = arrays["key_end"] + key_at
            for i, (language, size) in enumerate(meta["languages"].items()):
                start = filled[language]
                rows[language][start : start + size] = arrays[f"rows_{i}"] + at
                filled[language] = start + size
        at, key_at = at + meta["samples"], key_at + meta["key_bytes"]
    first[len(shards)] = at
    left_out: Counter[str] = Counter()
    digest = blake2b(digest_size=16)  # by content, not by place or time: shards that were moved are the same shards
    for shard, meta in zip(shards, metas, strict=True):
        left_out.update(meta["left_out"])
        digest.update(f"{shard.name} {meta['digest']}\0".encode("utf-8", "surrogateescape"))
    return SourceIndex(first, samples, keys, key_end, rows, dict(left_out), digest.hexdigest())


def _share(folder: Path, stamp: str, join: Callable[[NewArray], SourceIndex]) -> None:
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)

    def new(name: str, size: int, dtype: Any) -> np.ndarray:
        return np.lib.format.open_memmap(part / f"{name}.npy", mode="w+", dtype=dtype, shape=(size,))

    index = join(new)
    meta = {"stamp": stamp, "languages": list(index.rows), "left_out": index.left_out, "digest": index.digest}
    (part / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)  # of shards that have changed; whoever has it mapped keeps it
    os.replace(part, folder)


def _map(folder: Path, stamp: str) -> SourceIndex | None:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["stamp"] != stamp:
            return None
        names = ["first", "samples", "keys", "key_end", *(f"rows_{i}" for i in range(len(meta["languages"])))]
        first, samples, keys, key_end, *rows = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in names)
    except (OSError, ValueError, KeyError):
        return None
    by_language = dict(zip(meta["languages"], rows, strict=True))
    return SourceIndex(first, samples, keys, key_end, by_language, meta["left_out"], meta["digest"])
