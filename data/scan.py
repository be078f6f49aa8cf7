"""One shard -> where its samples lie and which languages they have, from tar headers alone.

A language that stands only in the JSON members makes those be read too; an image never is.  Members may come in any
order: img2dataset writes them as downloads complete.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from posixpath import normpath
from typing import Any

import numpy as np

VERSION = 4  # of what a scan finds; counts up when old index files have to be made anew
IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif"})
PARTS = {"image": IMAGE_EXTENSIONS, "text": frozenset({"txt"}), "json": frozenset({"json"})}
PART_OF = {extension: part for part, extensions in PARTS.items() for extension in extensions}
# Offsets are -1 where the member is missing.
SAMPLE = np.dtype([(f"{part}_{what}", "<i8") for part in PARTS for what in ("at", "bytes")])
_LANGUAGE_NAMES = {"chinese": "zh", "cn": "zh", "zho": "zh", "chi": "zh", "cmn": "zh", "english": "en", "eng": "en"}


@dataclass(frozen=True)
class Layout:
    """Where a sample's language stands; exactly one of the three.

    language: all samples of the source are in it.
    language_field: a column of the parquet beside the shard, else a field of the JSON members.
    caption_fields: language -> field of the JSON members that holds its caption or list of captions.
    """

    language: str | None = None
    language_field: str | None = None
    caption_fields: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("language", "language_field", "caption_fields") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(
                "a shard source needs exactly one of language, language_field, caption_fields, the others null; got "
                + (", ".join(given) or "none")
            )

    @property
    def signature(self) -> str:
        text = json.dumps(
            [VERSION, self.language, self.language_field, dict(self.caption_fields or {})], sort_keys=True
        )
        return blake2b(text.encode(), digest_size=4).hexdigest()


@dataclass(frozen=True)
class ShardIndex:
    """One shard's samples in the order of their first member; keys are UTF-8 bytes joined without a gap."""

    samples: np.ndarray  # SAMPLE
    keys: np.ndarray  # uint8
    key_end: np.ndarray  # int64: key i is keys[key_end[i - 1] : key_end[i]]
    rows: dict[str, np.ndarray]  # language -> int32, the samples that have it
    left_out: dict[str, int]  # reason -> how many could not even be indexed


def normal_language(value: object) -> str:
    """'zh-CN', 'ZH_cn', 'chinese' -> 'zh'; '' for nothing."""
    name = str(value if value is not None else "").strip().lower().replace("_", "-").split("-")[0]
    return "" if name in {"nan", "none", "null"} else _LANGUAGE_NAMES.get(name, name)


def scan_shard(shard: Path, layout: Layout) -> ShardIndex:
    """Reads every header of the tar.  Raises ValueError where it is no uncompressed tar."""
    places, left_out = _places(shard)
    keys = list(places)
    samples = np.array([tuple(place) for place in places.values()], SAMPLE)
    rows = _rows_by_language(shard, layout, keys, samples, left_out)
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    return ShardIndex(
        samples=samples,
        keys=np.frombuffer(b"".join(encoded), np.uint8),
        key_end=np.cumsum([len(key) for key in encoded], dtype=np.int64),
        rows=rows,
        left_out=dict(left_out),
    )


def _places(shard: Path) -> tuple[dict[str, list[int]], Counter[str]]:
    """key -> offsets and sizes in the order of SAMPLE."""
    columns = {part: 2 * i for i, part in enumerate(PARTS)}
    places: dict[str, list[int]] = {}
    left_out: Counter[str] = Counter()
    for name, at, size in _members(shard, left_out):
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")  # webdataset's rule: the key ends at the first dot
        part = PART_OF.get(extension.lower())
        if part is None or not stem:
            if stem and extension.lower().rpartition(".")[2] in IMAGE_EXTENSIONS:
                left_out["image with a second dot in its name"] += 1  # to webdataset a field of its own, like seg.png
            continue
        place = places.setdefault(f"{folder}/{stem}" if folder else stem, [-1, 0, -1, 0, -1, 0])
        column = columns[part]
        if place[column] >= 0:
            left_out["duplicate key"] += 1  # the first one stays, as its neighbours are its own
        else:
            place[column : column + 2] = [at, size]
    return places, left_out


def _members(shard: Path, left_out: Counter[str], *, before: int | None = None) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of every file in the tar, or of those before the header at `before`.

    A hard link is the file before it that it names.  A tar that was cut short gives what it still has: whatever reaches
    past its end is found when it is read.
    """
    end, files = shard.stat().st_size, _Files(shard)
    with open_tar(shard) as tar:
        try:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
                if tar.offset <= member.offset:  # a size below 0 leads back, for ever
                    left_out["rest of a shard after a broken header"] += 1
                    return
                if member.offset == before:
                    return
                place = None
                if member.isreg():  # one byte too many says that it is cut; no header may ask for a terabyte
                    place = member.offset_data, min(member.size, max(0, end - member.offset_data) + 1)
                elif member.islnk():
                    place = files.named_by(member)
                    if place is None:
                        left_out["hard link to no member before it"] += 1
                elif member.issym():
                    left_out["symbolic link, which is never followed"] += 1
                if place is not None:
                    files.add(member.name, place)
                    yield member.name, *place
                if tar.offset > end:
                    raise tarfile.ReadError("unexpected end of data")  # tarfile's own, where it can seek so far
        except tarfile.TarError:
            left_out["shard cut short"] += 1
            return
        reason = _what_is_lost(tar)
        if reason:
            left_out[reason] += 1


class _Files:
    """The files of a tar so far, for hard links to them.

    Names take a lot of memory and few tars have links, so they are kept from the first link on; those before it are
    found in a second pass.
    """

    def __init__(self, shard: Path):
        self.shard = shard
        self._places: dict[str, tuple[int, int]] | None = None

    def add(self, name: str, place: tuple[int, int]) -> None:
        if self._places is not None:
            self._places[normpath(name)] = place

    def named_by(self, link: tarfile.TarInfo) -> tuple[int, int] | None:
        """(offset, size); None where there is no such file before the link."""
        if self._places is None:
            earlier = _members(self.shard, Counter(), before=link.offset)
            self._places = {normpath(name): (at, size) for name, at, size in earlier}
        return self._places.get(normpath(link.linkname))


def open_tar(shard: Path, *, name: str | None = None) -> tarfile.TarFile:
    """At its first header.  Raises ValueError where it is no uncompressed tar; `name` is what that is called then."""
    try:
        return tarfile.open(shard, "r:")
    except tarfile.TarError as error:
        begin = first_bytes(shard)
        told = f"not an uncompressed tar ({error}), it begins with {begin!r}" if begin else "the file is empty"
        raise ValueError(f"{name or shard}: {told}; {_way_out(begin)}") from error


def first_bytes(file: Path, size: int = 60) -> bytes:
    with open(file, "rb") as content:
        return content.read(size)


def _way_out(begin: bytes) -> str:
    if begin.lstrip().startswith(b"<"):
        return "a web page: does the address need a login, or another link for the file itself?"
    return "expected a tar" if not begin else "a .tar.gz has to be unpacked to .tar"


def _what_is_lost(tar: tarfile.TarFile) -> str:
    """Where tarfile takes something for the end and says nothing."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if not block:
        return "shard cut short"  # between two members: blocks of zeros end a tar
    if any(block):
        return "rest of a shard after a broken header"
    while chunk := tar.fileobj.read(1 << 20):
        if any(chunk):
            return "rest of a shard after an end in its middle"  # as cat a.tar b.tar makes
    return ""


def _rows_by_language(
    shard: Path, layout: Layout, keys: list[str], samples: np.ndarray, left_out: Counter[str]
) -> dict[str, np.ndarray]:
    if layout.language:
        return {layout.language: np.arange(len(keys), dtype=np.int32)}
    rows: dict[str, list[int]] = {}
    for i, languages in enumerate(_languages(shard, layout, keys, samples)):
        if not languages:
            left_out["no language"] += 1
        for language in languages:
            rows.setdefault(language, []).append(i)
    return {language: np.array(found, np.int32) for language, found in sorted(rows.items())}


def _languages(shard: Path, layout: Layout, keys: list[str], samples: np.ndarray) -> list[list[str]]:
    """The languages of each sample, without touching an image.

    A sample whose JSON is missing or broken counts for every language of `caption_fields`: reading it will say what is
    wrong, and the share of such samples is what `max_skip_rate` watches.
    """
    if layout.language_field:
        column = _parquet_column(shard.with_suffix(".parquet"), layout.language_field)
        if column is not None:
            return [[name] if (name := normal_language(column.get(key))) else [] for key in keys]
    found: list[list[str]] = []
    with open(shard, "rb") as tar:
        for at, size in zip(samples["json_at"].tolist(), samples["json_bytes"].tolist(), strict=True):
            record = read_json(os.pread(tar.fileno(), size, at)) if at >= 0 else None
            if layout.language_field:
                name = normal_language(record.get(layout.language_field)) if record else ""
                found.append([name] if name else [])
            else:
                fields = layout.caption_fields or {}
                found.append([name for name, field in fields.items() if record is None or record.get(field)])
    return found


def read_json(raw: bytes) -> dict[str, Any] | None:
    """None for what is not a JSON object in UTF-8."""
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    return record if isinstance(record, dict) else None


def _parquet_column(parquet: Path, column: str) -> dict[str, Any] | None:
    """key -> value from img2dataset's table of a shard; None where there is no such table or column."""
    if not parquet.exists():
        return None
    import pyarrow.parquet as pq

    try:
        names = pq.read_schema(parquet).names
        if "key" not in names or column not in names:
            return None
        table = pq.read_table(parquet, columns=["key", column])
    except (OSError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
        raise ValueError(f"{parquet}: not a parquet file ({error})") from error
    return dict(zip(map(str, table["key"].to_pylist()), table[column].to_pylist(), strict=True))
