"""Small tars, pictures and a codec for the tests of the data part."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data.loader import Loader
from data.mixture import Mixture
from data.source import BadSample, RawSample
from data.source.shards import ShardSource
from data.transform import TrainTransform

BOTH = {"zh": "zh", "en": "en"}  # languages and their fields in the JSON of `bilingual_members`


def picture(number: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A smooth picture of its own for every number."""
    x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    channels = [128 + 127 * np.sin(number + k + 3 * x + (k + 1) * y) for k in range(3)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def jpeg(number: int, size: tuple[int, int] = (40, 30)) -> bytes:
    out = io.BytesIO()
    picture(number, size).save(out, "JPEG", quality=95)
    return out.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """Members in exactly this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def bilingual_members(numbers: Sequence[int], **more: Any) -> list[tuple[str, bytes]]:
    members = []
    for n in numbers:
        record = {"zh": f"第{n}张图", "en": f"picture number {n}", **more}
        members += [(f"{n:05d}.jpg", jpeg(n)), (f"{n:05d}.json", json.dumps(record).encode())]
    return members


def img2dataset_shard(
    folder: Path, name: str, numbers: range, *, parquet: bool = True, lang_in_json: bool = False
) -> Path:
    """As img2dataset 1.47 writes it: members as downloads complete, failures only in the parquet."""
    keys = {n: f"{name}{n:04d}" for n in numbers}
    language = {n: "zh" if n % 3 == 0 else "en" for n in numbers}
    rows = [
        {"key": keys[n], "lang": language[n], "status": "success", "url": f"http://a/{n}", "caption": f"caption {n}"}
        for n in numbers
    ]
    members = []
    for row, n in zip(rows, numbers, strict=True):
        record = row if lang_in_json else {k: v for k, v in row.items() if k != "lang"}
        members.append((f"{row['key']}.jpg", jpeg(n)))
        members.append((f"{row['key']}.txt", f"caption {n}".encode()))
        members.append((f"{row['key']}.json", json.dumps(record).encode()))
    order = np.random.default_rng(0).permutation(len(members))
    if parquet:
        failed = {"key": f"{name}9999", "lang": "zh", "status": "failed_to_download", "url": "http://b", "caption": "-"}
        pq.write_table(pa.Table.from_pylist([*rows, failed]), folder / f"{name}.parquet")
    return write_tar(folder / f"{name}.tar", [members[i] for i in order])


def read_all(source: ShardSource, language: str) -> list:
    return [source.read(language, i) for i in range(source.num_samples(language))]


def without(members: Sequence[tuple[str, bytes]], name: str) -> list[tuple[str, bytes]]:
    return [member for member in members if member[0] != name]


def replaced(members: Sequence[tuple[str, bytes]], name: str, content: bytes) -> list[tuple[str, bytes]]:
    return [(n, content if n == name else old) for n, old in members]


class LetterCodec:
    """A token for every character."""

    vocab_size, pad_id, unk_id = 0x110000, 0, 1

    def encode(self, text: str) -> list[int]:
        return [2, *(ord(character) for character in text), 3]

    def bos_id(self, language: str) -> int:
        return {"zh": 4, "en": 5}.get(language, 6)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids if i > 9)


class MemorySource:
    """Samples that are only numbers; `bad` ones cannot be used."""

    def __init__(self, sizes: Mapping[str, int], *, name: str = "memory", bad: Sequence[int] = ()):
        self.name, self.sizes, self.bad = name, dict(sizes), frozenset(bad)
        self.languages = tuple(sizes)

    def num_samples(self, language: str) -> int:
        return self.sizes.get(language, 0)

    def read(self, language: str, index: int) -> RawSample:
        if index in self.bad:
            raise BadSample("truncated image", shard=f"{self.name}.tar", key=str(index))
        captions = (f"{self.name} {language} {index}",)
        return RawSample(picture(index, (16, 12)), captions, key=str(index), shard=f"{self.name}.tar")

    def fingerprint(self) -> dict[str, Any]:
        return {"samples": self.sizes}


def make_loader(sources: Mapping[str, Any], *, languages: Mapping[str, float] | None = None, **options: Any) -> Loader:
    settings: dict[str, Any] = {"global_batch_size": 16, "seed": 3, "max_text_tokens": 64, **options}
    return Loader(
        sources, Mixture(languages or {"zh": 1, "en": 1}), TrainTransform(image_size=8), LetterCodec(), **settings
    )


def texts(batch: Any) -> list[str]:
    return [LetterCodec().decode(row) for row in batch.text_ids_BL.tolist()]
