"""Shards from a JSONL or a folder: what goes in comes out, the same bytes every time, and nothing vanishes silently."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from hashlib import sha256
from pathlib import Path

import pytest
from PIL import Image

from data.source.shards import ShardSource
from tests.data.shard_files import jpeg, picture

ROOT = Path(__file__).resolve().parents[2]
BOTH = {"zh": "zh", "en": "en"}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("pack_shards", ROOT / "scripts" / "pack_shards.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["pack_shards"] = module  # its worker processes look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pack(script, capsys):
    """Runs the script in this process and returns what it printed."""

    def run(*arguments: object, fails: bool = False) -> str:
        capsys.readouterr()
        try:
            code = script.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = 1
            print(end)
        printed = capsys.readouterr()
        assert (code != 0) == fails, printed
        return printed.out + (printed.err if fails else "")

    return run


def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "pack_shards.py"), str(pairs(tmp_path, 3)), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.splitlines()[-1] == f"packed 3 samples into 1 shard: 3 samples into 1 shard in {tmp_path / 'out'}"
    )


def write_pairs(folder: Path, records: list[dict | bytes]) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = [
        record if isinstance(record, bytes) else json.dumps(record, ensure_ascii=False).encode() for record in records
    ]
    (folder / "pairs.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder / "pairs.jsonl"


def pairs(folder: Path, number: int) -> Path:
    records = []
    for n in range(number):
        records.append(
            {"image": f"images/{n}.jpg", "zh": f"第{n}张", "en": [f"number {n}", f"no {n}"], "more": {"n": n}}
        )
    file = write_pairs(folder, records)
    for n in range(number):
        (folder / "images" / f"{n}.jpg").write_bytes(jpeg(n))
    return file


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.tar"))}


def test_every_pair_arrives(tmp_path: Path, pack) -> None:
    out = pack(pairs(tmp_path, 25), tmp_path / "out", "--samples-per-shard", 10, "--workers", 2)
    assert out.splitlines()[-1].startswith("packed 25 samples into 3 shards") and "left out" not in out
    source = ShardSource(str(tmp_path / "out"), caption_fields=BOTH)
    samples = [source.read("en", i) for i in range(source.num_samples("en"))]
    assert [sample.captions for sample in samples] == [(f"number {n}", f"no {n}") for n in range(25)]
    assert [sample.image for sample in samples] == [jpeg(n) for n in range(25)]
    assert [sample.key for sample in samples] == [f"{n + 1:08d}" for n in range(25)]
    assert samples[3].image_id == "sha256:" + sha256(jpeg(3)).hexdigest()
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        record = json.load(tar.extractfile("00000003.json"))
    assert record["more"] == {"n": 2} and record["image"] == "images/2.jpg" and record["zh"] == "第2张"


def test_bytes_do_not_depend_on_workers_or_time(tmp_path: Path, pack) -> None:
    file = pairs(tmp_path, 23)
    for n, workers in enumerate((1, 3)):
        pack(file, tmp_path / str(n), "--samples-per-shard", 5, "--workers", workers, "--split", "75/25")
    expected = contents(tmp_path / "0")
    assert contents(tmp_path / "1") == expected and len(expected) >= 4


def test_split_by_the_name_of_the_picture(tmp_path: Path, pack) -> None:
    file = pairs(tmp_path, 60)
    out = pack(file, tmp_path / "both", "--split", "75/25")
    pack(file, tmp_path / "test_only", "--split", "75/25", "--part", "test")
    assert contents(tmp_path / "test_only") == contents(tmp_path / "both" / "test")
    parts = {part: ShardSource(str(tmp_path / "both" / part), caption_fields=BOTH) for part in ("train", "test")}
    keys = {part: {source.read("zh", i).key for i in range(source.num_samples("zh"))} for part, source in parts.items()}
    assert not keys["train"] & keys["test"] and len(keys["train"] | keys["test"]) == 60
    assert 6 <= len(keys["test"]) <= 24
    assert re.match(r"packed 60 samples into 2 shards: \d+ samples into 1 shard in .*/train, ", out.splitlines()[-1])
    names = [f"images/{n}.jpg" for n in range(60)]
    expected = {f"{n + 1:08d}" for n, name in enumerate(names) if sha256(name.encode()).digest()[0] < 64}
    assert keys["test"] == expected


def test_what_is_left_out_is_told(tmp_path: Path, pack) -> None:
    good = {"image": "images/0.jpg", "zh": "好", "en": "good"}
    records: list[dict | bytes] = [
        good,
        b'{"image": "images/0.jpg", "zh": ',
        '{"image": "images/0.jpg", "zh": "中文"}'.encode("gbk"),
        b"[1, 2]",
        {"img": "images/0.jpg", "zh": "好"},
        {"image": 5},
        {"image": "images/none.jpg", "en": "a"},
        {"image": "images/cut.jpg", "en": "a"},
        {"image": "images/page.jpg", "en": "a"},
        {"image": "images/0.jpg", "en": " \u200b", "zh": []},  # what the loader calls empty too
        {"image": "images/0.jpg", "en": {"a": 1}},
        b"",
        good | {"zh": ["一", "二"]},
    ]
    file = write_pairs(tmp_path, records)
    for name, raw in {"0": jpeg(0), "cut": jpeg(1, (300, 200))[:3000], "page": b"<html>"}.items():
        (tmp_path / "images" / f"{name}.jpg").write_bytes(raw)
    out = pack(file, tmp_path / "out")
    assert "left out 10 of 12 rows" in out
    assert out.splitlines()[-1].startswith("packed 2 samples into 1 shard")
    told = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text("utf-8").splitlines()]
    expected = {
        2: "not JSON",
        3: "not UTF-8",
        4: "not JSON",
        5: "no image field",
        6: "no image field",
        7: "no such picture",
        8: "truncated image",
        9: "unreadable image",
        10: "empty text",
        11: "caption is not text",
    }
    assert {entry["row"]: entry["reason"] for entry in told} == expected
    assert re.search(r"row 5: field image: found only img, zh; expected a path relative to", out)
    assert re.search(r"row 11: field en: .*expected a string or a list of strings", out)


def test_files_outside_the_folder_are_left_out_unless_allowed(tmp_path: Path, pack) -> None:
    """A JSONL from elsewhere, or links in an unpacked archive, could pull any picture of this machine into a shard."""
    folder, private = tmp_path / "mine", tmp_path / "private"
    private.mkdir()
    (private / "x.jpg").write_bytes(jpeg(1))
    names = [
        "images/0.jpg",
        "../private/x.jpg",
        str(private / "x.jpg"),
        "images/link.jpg",
        "images/../../private/x.jpg",
    ]
    names += ["images/../images/0.jpg", str(folder / "images" / "0.jpg")]
    file = write_pairs(folder, [{"image": name, "en": f"row {n}"} for n, name in enumerate(names)])
    (folder / "images" / "0.jpg").write_bytes(jpeg(0))
    (folder / "images" / "link.jpg").symlink_to(private / "x.jpg")
    out = pack(file, tmp_path / "out")
    assert "left out 4 of 7 rows" in out and "4 outside the folder" in out and "--allow-outside" in out
    told = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text("utf-8").splitlines()]
    assert [entry["row"] for entry in told] == [2, 3, 4, 5]
    source = ShardSource(str(tmp_path / "out"), caption_fields={"en": "en"})
    assert [source.read("en", i).image for i in range(3)] == [jpeg(0)] * 3
    out = pack(file, tmp_path / "all", "--allow-outside")
    assert "left out" not in out and out.splitlines()[-1].startswith("packed 7 samples")


def test_links_out_of_a_folder_of_pictures_are_left_out(tmp_path: Path, pack) -> None:
    folder, secret = tmp_path / "pictures", tmp_path / "secret.txt"
    folder.mkdir()
    secret.write_text("a password")
    for n in range(3):
        (folder / f"{n}.jpg").write_bytes(jpeg(n))
        (folder / f"{n}.en.txt").write_text(f"picture {n}")
    (folder / "1.en.txt").unlink()
    (folder / "1.en.txt").symlink_to(secret)
    (folder / "2.jpg").unlink()
    (folder / "2.jpg").symlink_to("2.jpg")  # a circle
    out = pack(folder, tmp_path / "out")
    assert "1 outside the folder" in out and out.splitlines()[-1].startswith("packed 1 sample ")
    assert b"a password" not in b"".join(contents(tmp_path / "out").values())


def test_nothing_to_pack_is_an_error(tmp_path: Path, pack) -> None:
    file = write_pairs(tmp_path, [{"image": "images/none.jpg", "en": "a"}])
    out = pack(file, tmp_path / "out", fails=True)
    assert "no such picture" in out and "none of 1 rows" in out
    (tmp_path / "images" / "none.jpg").write_bytes(jpeg(0))
    pack(file, tmp_path / "out")  # nothing of the failed attempt is in the way
    assert not (tmp_path / "out" / "left_out.jsonl").exists()
    assert "does not exist" in pack(tmp_path / "nothing.jsonl", tmp_path / "out", fails=True)
    assert "expected train/test like 80/20" in pack(file, tmp_path / "out", "--split", "75", fails=True)


def test_a_file_in_the_folders_place_is_an_error(tmp_path: Path, pack) -> None:
    file = pairs(tmp_path, 1)
    assert "is a file; expected a folder" in pack(file, file, fails=True)


def test_a_name_without_end_is_shown_in_part(tmp_path: Path, pack) -> None:
    file = write_pairs(tmp_path, [{"image": "x" * 5000, "en": "x"}])
    assert max(map(len, pack(file, tmp_path / "out", fails=True).splitlines())) < 400
    assert "x" * 5000 in (tmp_path / "out/left_out.jsonl").read_text()


def test_earlier_shards_are_not_overwritten_unless_told(tmp_path: Path, pack) -> None:
    file, out = pairs(tmp_path, 12), tmp_path / "out"
    pack(file, out, "--samples-per-shard", 4)
    (out / "mine.txt").write_text("kept")
    before = contents(out)
    assert "--overwrite" in pack(file, out, "--samples-per-shard", 100, fails=True)
    assert contents(out) == before
    pack(file, out, "--samples-per-shard", 100, "--overwrite")
    assert list(contents(out)) == ["00000.tar"] and (out / "mine.txt").read_text() == "kept"


def test_a_folder_of_pictures_with_text_files(tmp_path: Path, pack) -> None:
    folder = tmp_path / "pictures" / "deep"
    folder.mkdir(parents=True)
    for n in range(3):
        (folder / f"{n}.jpg").write_bytes(jpeg(n))
    picture(3).save(folder / "3.png")
    (folder / "0.zh.txt").write_text("零", encoding="utf-8")
    (folder / "0.en.txt").write_text("zero", encoding="utf-8")
    (folder / "1.txt").write_text("one\n", encoding="utf-8")
    (folder / "3.en.txt").write_text("three", encoding="utf-8")
    out = pack(tmp_path / "pictures", tmp_path / "out", "--language", "en")
    assert "left out 1 of 4 rows" in out and "1 empty text" in out
    source = ShardSource(str(tmp_path / "out"), caption_fields=BOTH)
    assert [source.read("en", i).captions for i in range(3)] == [("zero",), ("one",), ("three",)]
    assert source.num_samples("zh") == 1 and source.read("en", 2).image == (folder / "3.png").read_bytes()
    assert "expected --language zh or --language en" in pack(tmp_path / "pictures", tmp_path / "out2")


def test_what_is_no_file_is_neither_waited_for_nor_the_end(tmp_path: Path, pack) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    longest = "鹊" * 83 + ".jpg"  # 253 bytes of at most 255: no .zh.txt has room beside it
    for name in ("pipe.jpg", "folder.jpg", "right.jpg", longest):
        picture(1).save(folder / name)
    os.mkfifo(folder / "pipe.en.txt")
    (folder / "folder.en.txt").mkdir()
    (folder / "right.en.txt").write_text("a caption")
    out = pack(folder, tmp_path / "out")
    assert "2 unreadable text" in out and "pipe.en.txt: not a file" in out and "folder.en.txt: not a file" in out
    assert "1 empty text" in out and "packed 1 sample into" in out
    (folder / "pairs.jsonl").write_text(json.dumps({"image": "pipe.en.txt", "en": "a pipe"}))
    assert "pipe.en.txt: not a file" in pack(folder / "pairs.jsonl", tmp_path / "none", fails=True)


def test_hidden_files_of_a_folder_are_not_looked_at(tmp_path: Path, pack) -> None:
    root = tmp_path / ".pictures"  # what the user names may be hidden
    for name in ("0.jpg", "._0.jpg", ".thumbnails/0.jpg", "deep/.1.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(0))
        (root / name).with_suffix(".en.txt").write_text(name)
    out = pack(root, tmp_path / "out")
    assert "left out" not in out and out.splitlines()[-1].startswith("packed 1 sample ")
    assert ShardSource(str(tmp_path / "out"), caption_fields=BOTH).read("en", 0).captions == ("0.jpg",)


def test_other_field_names_and_smaller_pictures(tmp_path: Path, pack) -> None:
    file = write_pairs(
        tmp_path,
        [{"image": "images/0.png", "captions_en": ["a", "b"]}, {"image": "images/1.jpg", "captions_en": ["c"]}],
    )
    picture(0, (120, 80)).convert("RGBA").save(tmp_path / "images" / "0.png")
    (tmp_path / "images" / "1.jpg").write_bytes(jpeg(1))
    pack(file, tmp_path / "out", "--en", "captions_en", "--resize", 40)
    source = ShardSource(str(tmp_path / "out"), caption_fields={"en": "en"})
    assert source.read("en", 0).captions == ("a", "b") and source.read("en", 1).image == jpeg(1)
    small = Image.open(io.BytesIO(source.read("en", 0).image))
    assert (small.size, small.format, small.mode) == ((60, 40), "JPEG", "RGB")


def test_the_shared_drawings(shared_dir: Path, tmp_path: Path, pack) -> None:
    file = shared_dir / "data" / "bilingual" / "pairs.jsonl"
    if not file.exists():
        pytest.skip(f"no {file}")
    out = pack(file, tmp_path, "--split", "75/25")
    assert out.splitlines()[-1].startswith("packed 1219 samples into 2 shards")
    records = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    found = 0
    for part in ("train", "test"):
        source = ShardSource(
            str(tmp_path / part), caption_fields=BOTH, keyword_fields={"zh": "keywords_zh"}, max_keywords=4
        )
        for i in range(source.num_samples("zh")):
            sample = source.read("zh", i)
            record = records[int(sample.key) - 1]
            assert sample.captions == (record["zh"],) and sample.keywords == tuple(record["keywords_zh"])
            assert sample.image == (file.parent / record["image"]).read_bytes()
            found += 1
    assert found == 1219 and 280 <= source.num_samples("en") <= 330
