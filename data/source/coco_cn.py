"""COCO-CN as it is published (li-xirong/coco-cn, version 1805).

coco-cn_test.txt                       an image id a line: COCO_train2014_000000000036
imageid.human-written-caption.txt      id#number, a tab, the caption
The pictures are COCO's of 2014, in `train2014/` and `val2014/` or all in one folder.  Published retrieval numbers are
of the test part's 1000 images with the 1053 captions written for them; the 5000 translated ones are another set.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.records import Malformed
from data.source import BadSample
from data.source.pairs import Entry, PairSource, checked, ids_of, lines_of


@dataclass(kw_only=True)
class CocoCn(PairSource):
    """
    Args:
        path: the folder of the lists.
        part: train, val or test.
        captions: human-written, or manually-translated, which the test part alone has.
    """

    path: str
    part: Literal["train", "val", "test"] = "test"
    captions: Literal["human-written", "manually-translated"] = "human-written"
    name: str = "coco_cn"

    def described(self) -> str:
        return f"part {self.part}, {self.captions} captions"

    def entries(self) -> Iterator[Entry]:
        folder = Path(self.path).expanduser()
        said: dict[str, list[str]] = {}
        file = folder / f"imageid.{self.captions}-caption.txt"
        for number, line in lines_of(file):
            told, tab, caption = line.partition("\t")
            image_id, mark, _ = told.partition("#")
            if not tab or not mark or not caption.strip():
                raise ValueError(
                    f"{self.name}: {file}, line {number}: expected id#number, a tab and a caption: {line!r}"
                )
            said.setdefault(image_id, []).append(caption.strip())
        for image_id in ids_of(folder / f"coco-cn_{self.part}.txt"):
            if image_id in said:
                try:
                    yield Entry(checked(image_id), tuple(said[image_id]), "zh", f"coco:{image_id}")
                except Malformed as error:
                    raise ValueError(f"{self.name}: {folder}/coco-cn_{self.part}.txt: {error}") from error

    def open(self, reference: str) -> bytes:
        """COCO_val2014_000000000042 -> val2014/COCO_val2014_000000000042.jpg, or without the folder."""
        folder = reference.removeprefix("COCO_").partition("_")[0]
        try:
            return super().open(f"{folder}/{reference}.jpg")
        except BadSample:
            return super().open(f"{reference}.jpg")
