"""Image-text shards, as img2dataset writes them or with both languages in the JSON, read by number through an index."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from data.index import load_source_index
from data.scan import Layout, read_json
from data.shard_list import cache_home, expand_shards, local_copies
from data.source import BadSample, RawSample

log = logging.getLogger(__name__)

MAX_OPEN_SHARDS = 128  # per process; far below the usual limit of 1024 open files


class ShardSource:
    """webdataset tars: `key.jpg`, `key.txt`, `key.json` in any order.

    Args:
        paths: tar files: braces, globs, folders, remote addresses, a list of them or joined by `::`.
        language: every caption (`key.txt`, else `caption` in the JSON) is in this language; or
        language_field: ... in the language that this column of the parquet beside the shard, or this field of the
            JSON, names; or
        caption_fields: language -> field of the JSON with one caption or a list of them.
        keyword_fields: language -> field of the JSON with a list of keywords that may be mixed into the caption.
        max_keywords: how many of them at most; 0 leaves them out.
        image_id_fields: the first of these found in the JSON tells equal images; without any, their bytes do.
        cache_dir: where remote shards are kept; default ~/.cache/queqiao/shards.
        index_workers: processes that scan shards the first time; default one per core.
        name: how logs and errors call it when it is used alone.

    Raises:
        ValueError: no shard found, a file that is no tar, a language nowhere to be found.
    """

    def __init__(
        self,
        paths: str | Sequence[str],
        *,
        language: str | None = None,
        language_field: str | None = None,
        caption_fields: Mapping[str, str] | None = None,
        keyword_fields: Mapping[str, str] | None = None,
        max_keywords: int = 0,
        image_id_fields: Sequence[str] = ("image_id", "sha256", "url"),
        cache_dir: str | None = None,
        index_workers: int | None = None,
        name: str = "shards",
    ):
        self.name = name
        self.layout = Layout(language, language_field, dict(caption_fields) if caption_fields else None)
        self.keyword_fields, self.max_keywords = dict(keyword_fields or {}), max_keywords
        self.image_id_fields = tuple(image_id_fields)
        cache = Path(cache_dir) if cache_dir else cache_home() / "shards"
        self.shards = local_copies(expand_shards(paths), cache, with_parquet=language_field is not None)
        self._index = load_source_index(self.shards, self.layout, name=name, workers=index_workers)
        self.languages = tuple(self._index.rows)
        self.left_out = dict(self._index.left_out)
        self._open: OrderedDict[int, FileIO] = OrderedDict()
        counts = {language: self.num_samples(language) for language in self.languages}
        if not sum(counts.values()):
            raise ValueError(f"{self.name}: no usable sample in {len(self.shards)} shards ({self._why_empty()})")
        log.info("%s: %d shards, samples per language %s", self.name, len(self.shards), counts)
        if self.left_out:
            log.warning("%s: left out of the index: %s", self.name, self.left_out)

    def _why_empty(self) -> str:
        looked = {
            "language_field": f"no language under {self.layout.language_field!r} in the parquet or the JSON",
            "caption_fields": f"no caption under {self.layout.caption_fields} in the JSON",
        }
        reasons = [text for option, text in looked.items() if getattr(self.layout, option) and len(self._index.samples)]
        return "; ".join(reasons) or f"the first is {self.shards[0]}; expected members like 000.jpg and 000.txt"

    def num_samples(self, language: str) -> int:
        return len(self._index.rows.get(language, ()))

    def read(self, language: str, index: int) -> RawSample:
        sample = int(self._index.rows[language][index])
        shard = int(np.searchsorted(self._index.first, sample, "right")) - 1
        where = {"shard": str(self.shards[shard]), "key": self.key(sample)}
        image = self._member(sample, shard, "image", where)
        if image is None:
            raise BadSample("no image", **where)
        record = self._record(sample, shard, where)
        captions = self._captions(sample, shard, language, record, where)
        keywords = _strings((record or {}).get(self.keyword_fields.get(language, "")), where)
        image_id = next((f"{name}:{record[name]}" for name in self.image_id_fields if record and record.get(name)), "")
        return RawSample(image, captions, where["key"], where["shard"], image_id, keywords, self.max_keywords)

    def key(self, sample: int) -> str:
        key_end = self._index.key_end
        start = int(key_end[sample - 1]) if sample else 0
        return self._index.keys[start : int(key_end[sample])].tobytes().decode("utf-8", "backslashreplace")

    def fingerprint(self) -> Mapping[str, Any]:
        return {
            "shards": len(self.shards),
            "samples": {language: self.num_samples(language) for language in self.languages},
            "index": self._index.digest,
            "captions": {**asdict(self.layout), "keywords": self.keyword_fields, "max_keywords": self.max_keywords},
        }

    def _record(self, sample: int, shard: int, where: Mapping[str, str]) -> dict[str, Any] | None:
        raw = self._member(sample, shard, "json", where)
        if raw is None:
            return None
        record = read_json(raw)
        if record is None and self.layout.caption_fields:
            raise BadSample("broken JSON", **where)
        return record

    def _captions(
        self, sample: int, shard: int, language: str, record: dict[str, Any] | None, where: Mapping[str, str]
    ) -> tuple[str, ...]:
        if self.layout.caption_fields:
            if record is None:
                raise BadSample("no JSON", **where)
            captions = _strings(record.get(self.layout.caption_fields[language]), where)
        else:
            raw = self._member(sample, shard, "text", where)
            if raw is not None:
                try:
                    captions = (raw.decode("utf-8-sig"),)
                except UnicodeDecodeError as error:
                    raise BadSample("text is not UTF-8", detail=str(error), **where) from error
            elif record and "caption" in record:
                captions = _strings(record["caption"], where)
            else:
                raise BadSample("no text", **where)
        captions = tuple(caption for caption in captions if caption.strip())
        if not captions:
            raise BadSample("empty text", **where)
        return captions

    def _member(self, sample: int, shard: int, part: str, where: Mapping[str, str]) -> bytes | None:
        place = self._index.samples[sample]
        at, size = int(place[f"{part}_at"]), int(place[f"{part}_bytes"])
        if at < 0:
            return None
        try:
            raw = os.pread(self._file(shard), size, at)
        except OSError as error:
            raise BadSample("shard cannot be read", detail=str(error), **where) from error
        if len(raw) < size:
            raise BadSample("truncated shard", detail=f"{len(raw)} of {size} bytes at {at}", **where)
        return raw

    def _file(self, shard: int) -> int:
        """A file descriptor; `pread` needs no position, so forked workers may inherit it."""
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            if len(self._open) >= MAX_OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
            self._open[shard] = open(self.shards[shard], "rb", buffering=0)
        return self._open[shard].fileno()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # descriptors mean nothing in a spawned process


def _strings(value: object, where: Mapping[str, str]) -> tuple[str, ...]:
    """A string or a list of strings; anything else is a bad sample."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise BadSample("caption is not text", detail=repr(value)[:80], **where)
