"""Flickr30k-CN and its kin: lists of Flickr30k's images with captions.

A folder, as Flickr30k-CN is published (li-xirong/cross-lingual-cap), `flickr30kzhmbosontest` for instance:
    ImageSets/<folder>.txt               an image id a line: 1007129816
    TextData/seg.<folder>.caption.txt    id#zhm#number, then the words: 一个:m 男人:n 戴着:v ...
    People's translations (zhm, the test part) have :part-of-speech behind each word; machine translations (zhb, the
    other parts) have none, and two spaces where a comma was.
A file, as the kin of it are published:
    6228559981<tab>在城市中，一个面带微笑的小孩 ...      Flickr30k-CNA; the id may end in .jpg, #number or both
    image,caption, then 1007129816.jpg,The man ...       Karpathy's parts as lists (CLIP benchmark), also in Chinese
Chinese-CLIP's Flickr30k-CN has MUGE's layout: `data.source.muge`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.records import Malformed
from data.source.pairs import Entry, PairSource, checked, ids_of, lines_of

_PART_OF_SPEECH = re.compile(r":[A-Za-z]+$")
_LISTED = re.compile(r"(?P<id>[^\s,#]+?)(\.jpe?g)?(#\w+)?(?P<mark>\t|,)\s*(?P<caption>.*\S)")
_HEADER = ("image,caption", "image,comment", "image_name,comment")


@dataclass(kw_only=True)
class Flickr30kCn(PairSource):
    """
    Args:
        path: the folder or the file, see above.
        language: of all captions.
    """

    path: str
    language: str = "zh"
    name: str = "flickr30k_cn"

    def described(self) -> str:
        return Path(self.path).name

    def entries(self) -> Iterator[Entry]:
        place = Path(self.path).expanduser()
        said = self._segmented(place) if place.is_dir() else self._listed(place)
        for image_id, captions in said.items():
            if captions:
                try:
                    yield Entry(checked(f"{image_id}.jpg"), tuple(captions), self.language, f"flickr:{image_id}")
                except Malformed as error:
                    raise ValueError(f"{self.name}: {place}: {error}") from error

    def _segmented(self, folder: Path) -> dict[str, list[str]]:
        named = folder / "ImageSets" / f"{folder.name}.txt"
        found = [named] if named.is_file() else sorted((folder / "ImageSets").glob("*.txt"))
        if len(found) > 1:
            raise ValueError(f"{self.name}: {folder}/ImageSets has {len(found)} lists, and none is called {named.name}")
        sets = found[0] if found else named
        said: dict[str, list[str]] = {image_id: [] for image_id in ids_of(sets)}
        file = folder / "TextData" / f"seg.{folder.name}.caption.txt"
        for number, line in lines_of(file):
            told, _, words = line.partition(" ")
            image_id, *more = told.split("#")
            if len(more) != 2 or not words.strip():
                raise ValueError(f"{self.name}: {file}, line {number}: expected id#zhm#number and words: {line[:80]!r}")
            if image_id in said:
                said[image_id].append(joined(words, tagged=more[0] == "zhm"))
        return said

    def _listed(self, file: Path) -> dict[str, list[str]]:
        said: dict[str, list[str]] = {}
        for number, line in lines_of(file):
            if number == 1 and line.strip().lower().replace(" ", "") in _HEADER:
                continue
            found = _LISTED.fullmatch(line.strip())
            if found is None:
                expected = "expected an image, a tab or a comma, and a caption"
                raise ValueError(f"{self.name}: {file}, line {number}: {expected}: {line[:80]!r}")
            said.setdefault(found["id"], []).append(
                unquoted(found["caption"]) if found["mark"] == "," else found["caption"]
            )
        return said


def unquoted(caption: str) -> str:
    """As CSV writes one with a comma or quotes in it: "He said ""hi"", then left"."""
    inner = caption[1:-1].replace('""', "")
    if len(caption) > 1 and caption[0] == caption[-1] == '"' and '"' not in inner:
        return caption[1:-1].replace('""', '"').strip()
    return caption


def joined(words: str, *, tagged: bool) -> str:
    """A sentence of its words."""
    if tagged:
        return "".join(_PART_OF_SPEECH.sub("", word) for word in words.split())
    clauses = (re.sub(r"\s", "", clause) for clause in re.split(r"\s{2,}", words.strip()))
    return "，".join(clause for clause in clauses if clause)
