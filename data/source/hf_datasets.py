"""Hugging Face `datasets`: a folder written by `save_to_disk`, Parquet files, or a name on the hub; columns by a map.

Pictures are the encoded bytes in an Image column (or a list of them), or paths in a text column.  A path that an Image
column holds instead of bytes counts like any other: it has to lie below `image_root`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from glob import escape, glob
from pathlib import Path, PurePath
from typing import Any

from data.source import BadSample
from data.source.columns import ColumnSource

INSIDE = "#"  # begins a reference to picture n of a row, which no path can be taken for
DEFAULT_SPLIT = "train"  # what files are whose names tell none, as `datasets` has it
_SAVED = ("state.json", "dataset_dict.json")  # one of them is in what save_to_disk writes
_HUB_NAME = re.compile(r"(?!.*\.parquet$)\w[\w.-]*(/[\w.-]+)?")  # a path that is not there is not asked for on the Hub
_SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}")  # below data/, where the hub writes splits of any name


@dataclass(kw_only=True)
class HfDataset(ColumnSource):
    """See `ColumnSource`.

    Args:
        path: a folder of `save_to_disk`, a folder or glob of Parquet files, or a hub name.  Of a folder's files those
            of `hub_split` are read, by their names (`split_told`); a file or glob of one split is read as it is.
        config: the hub data set's configuration, where it has several.
        hub_split: which of its splits is read.
        cache_dir: where `datasets` keeps what it fetches and converts.
    """

    config: str | None = None
    hub_split: str = DEFAULT_SPLIT
    cache_dir: str | None = None
    name: str = "hf_datasets"
    _data: Any = field(default=None, init=False, repr=False)

    def find_files(self) -> list[Path]:
        self._data = self._load()
        missing = [column for column in self.map.values() if column not in self._data.column_names]
        if self.group is not None and self.group not in self._data.column_names:
            missing.append(self.group)
        if missing:
            raise ValueError(f"{self.name}: {self.path} has no column {missing}; it has {self._data.column_names}")
        used = {*self.map.values(), self.group, "language"}
        # reading a row decodes every picture in it, a mask that nobody asked for as well
        self._data = self._data.select_columns([column for column in self._data.column_names if column in used])
        if "image" in self.map:
            self._data = self._undecoded(self._data, self.map["image"])
            self.pictures_have_names = not self._holds_pictures
        if self.split is not None and self.group is None and not self.pictures_have_names:
            raise ValueError(
                f"{self.name}: split={self.split} needs group: the pictures are in the table and have no names to keep "
                f"equal ones together by; name a column that tells the picture or the patient"
            )
        return [Path(str(self.path))]

    def rows(self, file: Path) -> Iterator[tuple[int, object]]:
        """Rows from 1, a reference in place of each picture: none is read.  A null is a row of text alone."""
        if "image" not in self.map or not self._holds_pictures:
            yield from enumerate(self._data, start=1)
            return
        column = self.map["image"]
        texts = self._data.remove_columns(column)
        for number, (row, count) in enumerate(zip(texts, self._picture_counts(column), strict=True), start=1):
            yield number, {**row, column: [f"{INSIDE}{n}" for n in range(count)]}

    def _picture_counts(self, column: str) -> Iterator[int]:
        import pyarrow.compute as pc

        for batch in self._data.select_columns(column).with_format("arrow").iter(batch_size=1000):
            cells = batch.column(column)
            counts = pc.list_value_length(cells) if self._is_list else cells.is_valid()
            yield from (int(count or 0) for count in counts.to_pylist())

    def images(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        if "image" in self.map and self._holds_pictures:
            return tuple(row[self.map["image"]])
        return super().images(row)

    def check_image(self, reference: str) -> None:
        if not self._holds_pictures:
            super().check_image(reference)

    def open(self, reference: str, file: int, row: int) -> Any:
        if not self._holds_pictures:
            return super().open(reference, file, row)
        value = self._data[row - 1][self.map["image"]]
        cell = value[int(reference.removeprefix(INSIDE))] if self._is_list else value
        if not cell or not (cell.get("bytes") or cell.get("path")):
            raise BadSample("no image")
        if cell.get("bytes"):
            return cell["bytes"]
        return super().open(cell["path"], file, row)

    def _load(self) -> Any:
        from datasets import DatasetDict, exceptions

        wish = Path(str(self.path)).expanduser()
        read, hint = self._reader(wish)
        try:
            data = read()
        except (OSError, ValueError, exceptions.DatasetsError) as error:
            is_empty = isinstance(error, exceptions.DatasetGenerationError)  # what happened is in its cause
            cause = error.__cause__ if is_empty else None
            raise ValueError(f"{self.name}: {wish} cannot be read ({cause or error}){hint}") from error
        if isinstance(data, DatasetDict):
            if self.hub_split not in data:
                raise ValueError(f"{self.name}: {wish} has no split {self.hub_split!r}; it has {list(data)}")
            data = data[self.hub_split]
        return data

    def _reader(self, wish: Path) -> tuple[Callable[[], Any], str]:
        """How `datasets` reads it, and what else to try where that fails.  Raises ValueError: nothing is there."""
        from datasets import load_dataset, load_from_disk

        found = parquet_files(wish)
        if found:
            files = [escape(str(file)) for file in self._of_split(found, wish)]
            return partial(load_dataset, "parquet", data_files=files, split="train", cache_dir=self.cache_dir), ""
        if any((wish / name).is_file() for name in _SAVED):
            return partial(load_from_disk, str(wish)), ""
        if wish.is_dir():
            raise ValueError(
                f"{self.name}: {wish} is neither a folder of save_to_disk nor are there *.parquet in it or in its data/"
            )
        absent = f"there is no file at {wish} (working directory {os.getcwd()})"
        if not _HUB_NAME.fullmatch(str(self.path)):
            raise ValueError(f"{self.name}: {absent}")
        hint = f"; {absent}, so it was taken for a name on the Hub: give a local folder, or a mirror in HF_ENDPOINT"
        return partial(load_dataset, str(self.path), self.config, split=self.hub_split, cache_dir=self.cache_dir), hint

    def _of_split(self, files: Sequence[Path], wish: Path) -> Sequence[Path]:
        """Those of `hub_split`.  Raises ValueError where there are none, or names that leave it open."""
        base = wish if wish.is_dir() else Path(os.path.commonpath([file.parent for file in files]))
        told = {file: split_told(file.relative_to(base)) for file in files}
        splits = sorted({split for split in told.values() if split is not None})
        unclear = [file for file, split in told.items() if split is None]
        if splits and unclear:
            raise ValueError(
                f"{self.name}: {unclear[0]} tells no split, others tell {splits}: name the files that are meant by a "
                f"glob in path"
            )
        if not wish.is_dir() and len(splits) < 2:
            return files
        wanted = self.hub_split if self.hub_split in splits else split_told(PurePath(self.hub_split)) or self.hub_split
        found = [file for file, split in told.items() if (split or DEFAULT_SPLIT) == wanted]
        if not found:
            raise ValueError(f"{self.name}: {wish} has no split {self.hub_split!r}; it has {splits or [DEFAULT_SPLIT]}")
        return found

    def _undecoded(self, data: Any, column: str) -> Any:
        """The same, with files instead of decoded pictures in the image column."""
        from datasets import Image, List, Sequence

        feature = data.features[column]
        inner = feature.feature if isinstance(feature, List | Sequence) else feature
        self._is_list = inner is not feature
        self._holds_pictures = (  # as Image, or as other tools write them: {bytes, path}, or bytes alone
            isinstance(inner, Image)
            or (isinstance(inner, Mapping) and set(inner) == {"bytes", "path"})
            or getattr(inner, "dtype", None) in ("binary", "large_binary")
        )
        if not self._holds_pictures:
            return data
        plain = Image(decode=False)
        return data.cast_column(column, List(plain) if self._is_list else plain)


def parquet_files(wish: Path) -> list[Path]:
    """The file, or what a glob finds.

    Of a folder those in it, else in its data/, as the hub has it; of both also those in folders that tell a split.
    """
    if not wish.is_dir():
        return [wish] if wish.is_file() else sorted(map(Path, glob(str(wish))))
    for place in (wish, wish / "data"):
        inside = (file for file in place.glob("*/*.parquet") if split_told(PurePath(file.parent.name)))
        found = [file for file in (*place.glob("*.parquet"), *inside) if not file.name.startswith(".")]
        if found:
            return sorted(found)
    return []


def split_told(path: PurePath) -> str | None:
    """The split that names in a relative path tell, by the rules and words of `datasets`; None: none, or several.

    data/NAME-00000-of-00001.parquet is of split NAME; train, dev or eval as a word of the file or of a folder stand for
    train, validation and test.
    """
    from datasets.data_files import SPLIT_KEYWORDS

    shard = _SHARD.match(path.name)
    if shard and path.parent.name == "data":
        return shard[1]
    words = set(re.split(r"[-._ 0-9]+", " ".join(path.parts).lower()))
    told = [str(split) for split, keywords in SPLIT_KEYWORDS.items() if words & set(keywords)]
    return told[0] if len(told) == 1 else None
