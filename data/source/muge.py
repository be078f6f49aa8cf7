"""MUGE's image retrieval: shopping pictures in a table, and queries with the pictures that answer them.

MR_valid_imgs.tsv           1000002<tab>/9j/4AAQSkZJ...    a picture a line, base64
MR_valid_queries.jsonl      {"query_id": 8428, "query_text": "高级感托特包斜挎", "item_ids": [1076345, 517602]}
Chinese-CLIP lays out every set so, MUGE and Flickr30k-CN for instance, and calls them valid_imgs.tsv and
valid_texts.jsonl, with text_id, text and image_ids.  A query is one text, right for all its pictures; pictures that
nobody asked for are candidates all the same.  Published numbers are of the valid part, text to image: 5k queries, 30k
pictures.
"""

from __future__ import annotations

import base64
import binascii
import logging
import os
from array import array
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data.records import Malformed, as_object, read_rows, text_of
from data.source import BadSample
from data.source.pairs import Entry, PairSource

log = logging.getLogger(__name__)

NAMES = (("query_id", "query_text", "item_ids"), ("text_id", "text", "image_ids"))


@dataclass(kw_only=True)
class MugeTable(PairSource):
    """
    Args:
        images: the table of pictures.
        queries: the file of queries.
        unpaired: "keep" pictures that no query asks for, as a pool for retrieval needs; "leave_out" for training.
        language: of all queries.
    """

    images: str
    queries: str
    unpaired: Literal["keep", "leave_out"] = "leave_out"
    language: str = "zh"
    image_root: str = ""  # the table's place
    name: str = "muge"

    _place: dict[str, int] = field(default_factory=dict, init=False, repr=False)
    _start: array[int] = field(default_factory=lambda: array("q"), init=False, repr=False)
    _end: array[int] = field(default_factory=lambda: array("q"), init=False, repr=False)

    def __post_init__(self) -> None:
        self.table = Path(self.images).expanduser()
        self.image_root = str(self.table.parent)
        if self.unpaired not in ("keep", "leave_out"):
            raise ValueError(f"{self.name}: unpaired is {self.unpaired!r}; expected keep or leave_out")
        self._scan()
        super().__post_init__()

    def described(self) -> str:
        return f"{self.table.name}, {Path(self.queries).name}, unpaired {self.unpaired}"

    def entries(self) -> Iterator[Entry]:
        asked: dict[str, list[tuple[str, str]]] = {item: [] for item in self._place}
        unknown = 0
        file = Path(self.queries).expanduser()
        if not file.is_file():
            raise ValueError(f"{self.name}: no file at {file}")
        for number, value in read_rows(file):
            try:
                told, text, items = _query(as_object(value))
            except Malformed as error:
                raise ValueError(f"{self.name}: {file}, row {number}: {error}") from error
            for item in items:
                if item in asked:
                    asked[item].append((told, text))
                else:
                    unknown += 1
        if unknown:
            log.warning("%s: %d pictures that queries name are not in %s", self.name, unknown, self.table)
        for item, queries in asked.items():
            if queries or self.unpaired == "keep":
                texts, query_ids = tuple(text for _, text in queries), tuple(query_id for query_id, _ in queries)
                yield Entry(item, texts, self.language, f"{self.table.name}:{item}", query_ids)

    def open(self, reference: str) -> bytes:
        line = self._place[reference]
        try:
            with self.table.open("rb", buffering=0) as file:
                size = self._end[line] - self._start[line]
                packed = os.pread(file.fileno(), size, self._start[line])
            # both alphabets occur; the url-safe one is made the other
            return base64.b64decode(packed.translate(bytes.maketrans(b"-_", b"+/")), validate=True)
        except (OSError, binascii.Error) as error:
            raise BadSample("image cannot be read", detail=f"{self.table}, {reference}: {error}") from error

    def _scan(self) -> None:
        """Where each picture lies in the table; a picture itself is read when it is wanted."""
        if not self.table.is_file():
            raise ValueError(f"{self.name}: no file at {self.table}")
        at = 0
        with self.table.open("rb") as file:
            for number, line in enumerate(file, start=1):
                told, tab, packed = line.partition(b"\t")
                if line.strip() and not tab:
                    raise ValueError(
                        f"{self.name}: {self.table}, line {number}: expected an id, a tab and base64: {line[:40]!r}"
                    )
                if tab:
                    item = told.removeprefix(BOM_UTF8).decode("utf-8", "replace").strip()
                    self._place[item] = len(self._start)
                    self._start.append(at + len(told) + 1)
                    self._end.append(at + len(told) + 1 + len(packed.rstrip()))
                at += len(line)


def _query(row: Any) -> tuple[str, str, list[str]]:
    """(id, text, pictures)"""
    names = next((names for names in NAMES if names[0] in row), None)
    if names is None:
        raise Malformed("query_id", "query_id, or text_id as Chinese-CLIP writes it", sorted(map(str, row)))
    items = row.get(names[2])
    if not isinstance(items, list) or not items:
        raise Malformed(names[2], "the pictures that are right (the test part is published without them)", items)
    return text_of(row, names[0]), text_of(row, names[1]), [str(item) for item in items]
