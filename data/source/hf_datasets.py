"""Hugging Face `datasets`: a folder written by `save_to_disk`, Parquet files, or a name on the hub; columns by a map.

Pictures are the encoded bytes in an Image column (or a list of them), or paths in a text column.  A path that an Image
column holds instead of bytes counts like any other: it has to lie below `image_root`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

from data.source import BadSample
from data.source.columns import ColumnSource

INSIDE = "#"  # begins a reference to picture n of a row, which no path can be taken for


@dataclass(kw_only=True)
class HfDataset(ColumnSource):
    """See `ColumnSource`.

    Args:
        path: a folder of `save_to_disk`, a folder or glob of Parquet files, or a hub name.
        config: the hub data set's configuration, where it has several.
        hub_split: which of its splits is read.
        cache_dir: where `datasets` keeps what it fetches and converts.
    """

    config: str | None = None
    hub_split: str = "train"
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
        if "image" in self.map:
            self._data = self._undecoded(self._data, self.map["image"])
        return [Path(str(self.path))]

    def rows(self, file: Path) -> Iterator[tuple[int, object]]:
        """Rows from 1, a reference in place of each picture: no picture is read.  A null is a row of text alone."""
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
        from datasets import DatasetDict, load_dataset, load_from_disk

        wish, cache = os.path.expanduser(str(self.path)), self.cache_dir
        found = sorted(glob(os.path.join(wish, "*.parquet")) if os.path.isdir(wish) else glob(wish))
        if os.path.isdir(wish) and not found:
            data = load_from_disk(wish)
        elif found:
            data = load_dataset("parquet", data_files=found, split="train", cache_dir=cache)
        else:
            data = load_dataset(wish, self.config, split=self.hub_split, cache_dir=cache)
        if isinstance(data, DatasetDict):
            if self.hub_split not in data:
                raise ValueError(f"{self.name}: {wish} has no split {self.hub_split!r}; it has {list(data)}")
            data = data[self.hub_split]
        return data

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
