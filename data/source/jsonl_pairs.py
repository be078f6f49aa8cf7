"""Pictures with their captions, one a line: what `scripts/pack_shards.py` packs, read as it is.

{"image": "images/0001.jpg", "zh": "雪地里的一只狐狸", "en": ["a fox in the snow", "a fox"], "image_id": "1"}
A JSON list of such objects is read too, as LAVIS publishes Karpathy's parts: {"image": ..., "caption": [...]}.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.records import Malformed, as_object, files_of, read_rows, text_of, texts_of
from data.source.pairs import Entry, PairSource, checked


@dataclass(kw_only=True)
class JsonlPairs(PairSource):
    """
    Args:
        path: the file, a glob, or a list of them.
        caption_fields: language -> the field with a caption or a list of them.
        image_root: where picture paths start; default: the folder of the first file.
    """

    path: str | Sequence[str]
    caption_fields: Mapping[str, str] = field(default_factory=lambda: {"zh": "zh", "en": "en"})
    image_root: str = ""
    name: str = "jsonl_pairs"

    def __post_init__(self) -> None:
        self.files: list[Path] = files_of(self.path)
        self.image_root = self.image_root or str(self.files[0].parent)
        super().__post_init__()

    def described(self) -> str:
        return f"{', '.join(file.name for file in self.files[:3])} with captions under {dict(self.caption_fields)}"

    def entries(self) -> Iterator[Entry]:
        for file in self.files:
            for number, value in read_rows(file):
                try:
                    row = as_object(value)
                    image = checked(text_of(row, "image"))
                    image_id = str(row.get("image_id") or image)
                    for language, name in self.caption_fields.items():
                        captions = texts_of(row, name, "caption")
                        if captions:
                            yield Entry(image, captions, language, image_id)
                except Malformed as error:
                    raise ValueError(f"{self.name}: {file}, row {number}: {error}") from error
