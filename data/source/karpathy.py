"""Karpathy's splits of COCO, Flickr30k and Flickr8k: `dataset_coco.json`, `dataset_flickr30k.json`.

{"images": [{"filepath": "val2014", "filename": "COCO_val2014_000000391895.jpg", "split": "test", "cocoid": 391895,
             "sentences": [{"raw": "A man with a red helmet on a small moped.", ...}, ...], ...}, ...]}
Flickr's files have no `filepath`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.records import Malformed, as_object, read_rows, text_of
from data.source.pairs import Entry, PairSource, checked


@dataclass(kw_only=True)
class KarpathyJson(PairSource):
    """
    Args:
        path: the JSON file.
        split: train, restval (COCO's other training images), val or test, or a list of them.
        language: of all captions.
    """

    path: str
    split: str | Sequence[str] = "test"
    language: str = "en"
    name: str = "karpathy"

    def described(self) -> str:
        return f"split {', '.join(self._splits())} of {Path(self.path).name}"

    def entries(self) -> Iterator[Entry]:
        file, splits, seen = Path(self.path).expanduser(), self._splits(), set()
        if not file.is_file():
            raise ValueError(f"{self.name}: no file at {file}")
        for number, value in read_rows(file, under="images"):
            try:
                row = as_object(value)
                split = text_of(row, "split")
                seen.add(split)
                if split not in splits:
                    continue
                sentences = row.get("sentences")
                if not isinstance(sentences, list) or not sentences:
                    raise Malformed("sentences", "a list of captions", sentences)
                captions = tuple(text_of(as_object(sentence), "raw") for sentence in sentences)
                image = "/".join(str(row[key]) for key in ("filepath", "filename") if row.get(key))
                yield Entry(checked(image), captions, self.language, f"{file.stem}:{text_of(row, 'filename')}")
            except Malformed as error:
                raise ValueError(f"{self.name}: {file}, image {number}: {error}") from error
        if not seen & set(splits):
            raise ValueError(f"{self.name}: {file} has no split {', '.join(splits)}; it has {', '.join(sorted(seen))}")

    def _splits(self) -> tuple[str, ...]:
        return (self.split,) if isinstance(self.split, str) else tuple(self.split)
