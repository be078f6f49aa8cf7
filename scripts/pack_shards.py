"""Makes webdataset shards of image-text pairs.

    python scripts/pack_shards.py PAIRS.jsonl OUT_DIR
    python scripts/pack_shards.py PICTURES/   OUT_DIR --language en
    python scripts/pack_shards.py PAIRS.jsonl OUT_DIR --split 75/25      (makes OUT_DIR/train and OUT_DIR/test)
    python scripts/pack_shards.py PAIRS.jsonl OUT_DIR --split 80/20 --group patient_id --part train

PAIRS.jsonl has one JSON object a line: `image`, the picture's path relative to the file, and `zh`, `en` or both, each a
caption or a list of captions; other fields are kept.  In a folder, a picture a.jpg has its captions in a.zh.txt and
a.en.txt, or in a.txt with --language; what is hidden there (.thumbnails/, ._a.jpg) is not looked at.

A shard holds 00000012.jpg and 00000012.json for row 12.  The same input gives the same bytes, whatever --workers is.
Rows that cannot be used are left out, reported by reason, and listed in OUT_DIR/left_out.jsonl; so are pictures that do
not lie below the folder of PAIRS.jsonl, unless --allow-outside.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import multiprocessing
import os
import re
import stat
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from data.caption import is_empty
from data.decode import open_image, upright
from data.scan import IMAGE_EXTENSIONS
from data.source import BadSample
from data.split import held_out_share, part_of

LANGUAGES = ("zh", "en")
PICTURES = frozenset(f".{extension}" for extension in IMAGE_EXTENSIONS)
NUM_SHOWN = 3  # rows named per reason
DETAIL_SHOWN = 300  # characters; a name can be as long as a line, and left_out.jsonl has all of it
OWN_FILES = re.compile(r"\d{5}\.tar(\.part)?|\d{5}\.[0-9a-f]{8}\.index\.npz|left_out\.jsonl")


class LeftOut(Exception):
    """A row that cannot be packed: a few fixed words to count, and what was found and expected."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Checked(NamedTuple):
    part: str  # "train", "test", or "" without a split
    reason: str  # "" for a row that can be packed
    detail: str


@dataclass(frozen=True)
class Rows:
    """Where the files of a row may lie."""

    root: Path
    allow_outside: bool

    def path(self, name: str) -> Path:
        """`name`, below the root, links followed: somebody else's JSONL or archive may name no other files."""
        path = self.root / name
        if not self.allow_outside and not path.resolve().is_relative_to(self.root.resolve()):
            raise LeftOut(
                "outside the folder", f"{name} is not below {self.root}; --allow-outside takes it nevertheless"
            )
        return path


@dataclass(frozen=True)
class JsonlRows(Rows):
    """Rows of a JSONL by their place in the file, so that ten million of them are ten million numbers."""

    file: Path
    fields: dict[str, str]
    starts: array  # byte at which each row starts
    numbers: array  # its line number, from 1

    @classmethod
    def scan(cls, file: Path, fields: dict[str, str], *, allow_outside: bool = False) -> JsonlRows:
        starts, numbers, at = array("q"), array("q"), 0
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    starts.append(at)
                    numbers.append(number)
                at += len(line)
        return cls(file.parent, allow_outside, file, fields, starts, numbers)

    def read(self, i: int) -> dict[str, Any]:
        with open(self.file, "rb") as lines:
            lines.seek(self.starts[i])
            raw = lines.readline()
        try:
            record = json.loads(raw.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise LeftOut("not UTF-8", f"{error.reason} at byte {error.start} of the line; expected UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise LeftOut("not JSON", f"{error}; expected one JSON object a line") from error
        if not isinstance(record, dict):
            raise LeftOut("not JSON", f"a {type(record).__name__}; expected an object with image, zh, en")
        if not isinstance(record.get("image"), str) or not record["image"]:
            found = repr(record["image"])[:60] if "image" in record else f"only {', '.join(record) or 'nothing'}"
            raise LeftOut("no image field", f"field image: found {found}; expected a path relative to {self.root}")
        return record | {name: record[field] for name, field in self.fields.items() if field in record}


@dataclass(frozen=True)
class FolderRows(Rows):
    """Pictures of a folder and the text files beside them."""

    language: str | None
    pictures: list[str]
    numbers: Sequence[int]

    @classmethod
    def scan(cls, root: Path, language: str | None, *, allow_outside: bool = False) -> FolderRows:
        pictures = [path.relative_to(root) for path in root.rglob("*") if path.suffix.lower() in PICTURES]
        shown = sorted(
            str(path)
            for path in pictures
            if not any(part.startswith(".") for part in path.parts) and (root / path).is_file()
        )
        return cls(root, allow_outside, language, shown, range(1, len(shown) + 1))

    def read(self, i: int) -> dict[str, Any]:
        record: dict[str, Any] = {"image": self.pictures[i]}
        stem = Path(self.pictures[i]).with_suffix("")
        for name in LANGUAGES:
            if (text := self._text(f"{stem}.{name}.txt")) is not None:
                record[name] = text
        plain = self._text(f"{stem}.txt")
        if plain is not None and self.language is None and len(record) == 1:
            raise LeftOut("language not said", f"{stem.name}.txt could be any; expected --language zh or --language en")
        if plain is not None and self.language is not None:
            record.setdefault(self.language, plain)
        return record

    def _text(self, name: str) -> str | None:
        """None where no file has this name, which may be longer than a name can be."""
        try:
            return _file_bytes(self.path(name)).decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise LeftOut("not UTF-8", f"{name}: {error.reason} at byte {error.start}; expected UTF-8") from error
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
                return None
            raise LeftOut("unreadable text", f"{name}: {error.strerror or error}") from error
        except RuntimeError as error:  # links in a circle
            raise LeftOut("unreadable text", f"{name}: {error}") from error


@dataclass(frozen=True)
class Packer:
    """What a worker needs to check a row and to write a shard."""

    rows: JsonlRows | FolderRows
    test_share: float | None
    group: str | None
    shorter_side: int | None

    def check(self, i: int) -> Checked:
        part = ""
        try:
            record = self.rows.read(i)
            part = self._part(record)
            _check_captions(record)
            self._picture(record)
        except LeftOut as row:
            return Checked(part, row.reason, row.detail)
        return Checked(part, "", "")

    def _part(self, record: dict[str, Any]) -> str:
        """By the picture's name, or a field like `patient_id`: what is equal in it stays together."""
        if self.test_share is None:
            return ""
        group = record["image"] if self.group is None else record.get(self.group)
        if isinstance(group, bool) or not isinstance(group, str | int) or group == "":
            raise LeftOut("no group", f"field {self.group!r} is {group!r}")
        return part_of(str(group), self.test_share)

    def _picture(self, record: dict[str, Any]) -> tuple[bytes, str]:
        """The picture's file and extension, seen to decode to the end."""
        try:
            raw = _file_bytes(self.rows.path(record["image"]))
            image = open_image(raw)
            extension = {"JPEG": "jpg", "MPO": "jpg"}.get(image.format or "", (image.format or "").lower())
            if self.shorter_side is not None and min(image.size) > self.shorter_side:
                return _shrunk(image, self.shorter_side), "jpg"
            image.draft("RGB", (1, 1))  # entropy decoding finds a cut, and the rest can be had small
            image.load()
        except OSError as error:
            reason = "no such picture" if isinstance(error, FileNotFoundError) else "unreadable image"
            if "truncated" in str(error).lower():
                reason = "truncated image"
            raise LeftOut(reason, f"{record['image']}: {error.strerror or error}") from error
        except BadSample as bad:
            raise LeftOut(bad.reason, f"{record['image']}: {bad.detail}") from bad
        except (
            ValueError,
            SyntaxError,
            EOFError,
            RuntimeError,
        ) as error:  # Pillow's on damaged files; links in a circle
            raise LeftOut("unreadable image", f"{record['image']}: {error}") from error
        return raw, extension

    def write(self, job: tuple[Path, list[int]]) -> int:
        """One shard, complete or not at all."""
        os.environ["WDS_SECURE"] = "1"
        from webdataset import TarWriter

        file, numbers = job
        part = file.with_suffix(".tar.part")
        with open(part, "wb") as out:
            writer = TarWriter(out, user="", group="", mode=0o644, mtime=0, compress=False, encoder=False)
            for i in numbers:
                record = self.rows.read(i)
                raw, extension = self._picture(record)
                record.setdefault("sha256", sha256(raw).hexdigest())
                text = json.dumps(record, ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass")
                writer.write({"__key__": f"{self.rows.numbers[i]:08d}", extension: raw, "json": text})
            writer.close()
        os.replace(part, file)
        return len(numbers)


def _file_bytes(path: Path) -> bytes:
    """A pipe would be waited for, a device be read without end.  Raises OSError."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a file")
    return path.read_bytes()


def _check_captions(record: dict[str, Any]) -> None:
    texts = 0
    for language in LANGUAGES:
        value = record.get(language)
        captions = [value] if isinstance(value, str) else value if value is not None else []
        if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
            raise LeftOut(
                "caption is not text", f"field {language}: {repr(value)[:60]}; expected a string or a list of strings"
            )
        texts += any(not is_empty(caption) for caption in captions)
    if not texts:
        raise LeftOut("empty text", "fields zh, en: neither holds a caption; expected at least one")


def _shrunk(image: Image.Image, shorter_side: int) -> bytes:
    """JPEG of the picture with its shorter side brought to `shorter_side` pixels, upright."""
    picture = upright(image)
    scale = shorter_side / min(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    out = io.BytesIO()
    picture.resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=95)
    return out.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    fields = {name: getattr(args, name) for name in LANGUAGES}
    rows: JsonlRows | FolderRows
    if args.source.is_dir():
        rows = FolderRows.scan(args.source, args.language, allow_outside=args.allow_outside)
    else:
        rows = JsonlRows.scan(args.source, fields, allow_outside=args.allow_outside)
    if not len(rows.numbers):
        raise SystemExit(f"{args.source}: {'no pictures' if args.source.is_dir() else 'no rows'} in it")
    folders = _folders(args)
    for folder in folders.values():
        _make_room(folder, args.overwrite)
    packer = Packer(rows, args.split, args.group, args.resize)
    checked = list(_parallel(packer.check, range(len(rows.numbers)), args.workers, "checking", "row"))
    _report(rows, checked, args.out)
    jobs = []
    for part, folder in folders.items():
        kept = [i for i, row in enumerate(checked) if row.part == part and not row.reason]
        chunks = [kept[at : at + args.samples_per_shard] for at in range(0, len(kept), args.samples_per_shard)]
        jobs.append([(folder / f"{n:05d}.tar", chunk) for n, chunk in enumerate(chunks)])
    if not any(jobs):
        raise SystemExit(f"{args.source}: none of {len(checked)} rows can be packed; the reasons are above")
    shards = [job for part in jobs for job in part]
    num_samples = sum(_parallel(packer.write, shards, args.workers, "writing", "shard", chunksize=1))
    parts = [f"{_count(sum(len(c) for _, c in js), js)} in {f}" for js, f in zip(jobs, folders.values(), strict=True)]
    print(f"packed {_count(num_samples, shards)}: {', '.join(parts)}")
    return 0


def _count(samples: int, shards: Sequence[Any]) -> str:
    return f"{samples} sample{'s' * (samples != 1)} into {len(shards)} shard{'s' * (len(shards) != 1)}"


def _folders(args: argparse.Namespace) -> dict[str, Path]:
    if args.split is None:
        return {"": args.out}
    return {args.part: args.out} if args.part else {part: args.out / part for part in ("train", "test")}


def _make_room(folder: Path, overwrite: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    old = [path for path in folder.iterdir() if OWN_FILES.fullmatch(path.name)]
    shards = sum(path.suffix == ".tar" for path in old)
    if shards and not overwrite:
        raise SystemExit(f"{folder} holds {shards} shards already: give another folder, or --overwrite")
    for path in old:
        path.unlink()


def _parallel(
    work: Callable[[Any], Any], items: Sequence[Any], workers: int, title: str, unit: str, chunksize: int = 64
) -> Iterator[Any]:
    """In the order of `items`, whatever finishes first."""
    bar = tqdm(total=len(items), desc=title, unit=unit, disable=None)
    with bar, ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        for result in pool.map(work, items, chunksize=chunksize):
            bar.update()
            yield result


def _report(rows: JsonlRows | FolderRows, checked: Sequence[Checked], out: Path) -> None:
    bad = [(rows.numbers[i], row) for i, row in enumerate(checked) if row.reason]
    (out / "left_out.jsonl").unlink(missing_ok=True)
    if not bad:
        return
    print(f"left out {len(bad)} of {len(checked)} rows:")
    for reason, number in Counter(row.reason for _, row in bad).most_common():
        print(f"  {number} {reason}")
        for at, row in [(at, row) for at, row in bad if row.reason == reason][:NUM_SHOWN]:
            print(f"      row {at}: {row.detail[:DETAIL_SHOWN]}")
    lines = [json.dumps({"row": at, "reason": r.reason, "detail": r.detail}, ensure_ascii=False) for at, r in bad]
    (out / "left_out.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")
    print(f"  all of them in {out / 'left_out.jsonl'}")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a JSONL file, or a folder of pictures with text files")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--samples-per-shard", type=int, default=1000, help="default 1000")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; default one per core")
    parser.add_argument(
        "--split", type=_test_share, metavar="75/25", help="train/test, by a hash of the picture's name"
    )
    parser.add_argument("--group", metavar="FIELD", help="with --split: by this field of the JSONL, e.g. patient_id")
    parser.add_argument("--part", choices=("train", "test"), help="with --split: only this part, into OUT_DIR itself")
    parser.add_argument(
        "--resize", type=int, metavar="PIXELS", help="shrink larger pictures to this shorter side (JPEG)"
    )
    parser.add_argument("--language", choices=LANGUAGES, help="of a.txt beside a.jpg in a folder")
    parser.add_argument("--zh", metavar="FIELD", default="zh", help="field of the JSONL with the Chinese captions")
    parser.add_argument("--en", metavar="FIELD", default="en", help="field of the JSONL with the English captions")
    parser.add_argument(
        "--allow-outside", action="store_true", help="take files that do not lie below SOURCE's folder, links followed"
    )
    parser.add_argument("--overwrite", action="store_true", help="remove the shards that OUT_DIR holds first")
    args = parser.parse_args(argv)
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"{args.out} is a file; expected a folder for the shards")
    if not args.source.exists():
        parser.error(f"{args.source} does not exist; expected a JSONL file or a folder of pictures")
    for name in ("part", "group"):
        if getattr(args, name) and args.split is None:
            parser.error(f"--{name} needs --split")
    for name in ("samples_per_shard", "workers", "resize"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; expected 1 or more")
    return args


def _test_share(text: str) -> float:
    try:
        return held_out_share(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
