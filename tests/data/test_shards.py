"""Every form of shard is read by number through the index, and what is wrong with one is said."""

from __future__ import annotations

import io
import json
import os
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import data.index
from data.scan import open_tar
from data.shard_list import expand_shards
from data.source import BadSample
from data.source.shards import ShardSource
from tests.data.shard_files import (
    BOTH,
    bilingual_members,
    img2dataset_shard,
    jpeg,
    read_all,
    replaced,
    without,
    write_tar,
)


@pytest.mark.parametrize("where", ["parquet", "json"])
def test_img2dataset_in_completion_order(tmp_path: Path, where: str) -> None:
    for shard in range(2):
        numbers = range(shard * 20, shard * 20 + 20)
        img2dataset_shard(tmp_path, f"{shard:05d}", numbers, parquet=where == "parquet", lang_in_json=where == "json")
    source = ShardSource(f"{tmp_path}/{{00000..00001}}.tar", language_field="lang")
    assert source.languages == ("en", "zh")
    for language in source.languages:
        expected = {n for n in range(40) if (n % 3 == 0) == (language == "zh")}
        samples = read_all(source, language)
        assert {sample.captions for sample in samples} == {(f"caption {n}",) for n in expected}
        for sample in samples:
            n = int(sample.captions[0].split()[1])
            assert sample.image == jpeg(n)
            assert sample.key == f"{n // 20:05d}{n:04d}" and sample.shard == str(tmp_path / f"{n // 20:05d}.tar")
            assert sample.image_id == f"url:http://a/{n}"


def test_both_languages_in_the_json(tmp_path: Path) -> None:
    members = bilingual_members(range(3))
    members = replaced(members, "00001.json", json.dumps({"en": ["one", "two"], "keywords_en": ["k1", "k2"]}).encode())
    write_tar(tmp_path / "a.tar", members)
    source = ShardSource(str(tmp_path), caption_fields=BOTH, keyword_fields={"en": "keywords_en"}, max_keywords=4)
    assert (source.num_samples("zh"), source.num_samples("en"), source.num_samples("fr")) == (2, 3, 0)
    assert [sample.captions for sample in read_all(source, "zh")] == [("第0张图",), ("第2张图",)]
    sample = source.read("en", 1)
    assert (sample.captions, sample.keywords, sample.max_keywords) == (("one", "two"), ("k1", "k2"), 4)


def test_one_language_for_the_source(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "a.tar",
        [("x/1.jpg", jpeg(1)), ("x/1.txt", "一只狗".encode()), ("x/2.JPG", jpeg(2)), ("x/2.txt", b"b")],
    )
    source = ShardSource(str(tmp_path / "a.tar"), language="zh")
    assert [(s.key, s.captions) for s in read_all(source, "zh")] == [("x/1", ("一只狗",)), ("x/2", ("b",))]


def test_long_and_foreign_names(tmp_path: Path) -> None:
    long = "f" * 120 + "/" + "k" * 120
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, content in (
            (f"{long}.jpg", jpeg(1)),
            (f"{long}.txt", b"long"),
            ("é.jpg", jpeg(2)),
            ("é.txt", b"odd"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    source = ShardSource(str(tmp_path / "a.tar"), language="en")
    assert [(s.key, s.captions) for s in read_all(source, "en")] == [(long, ("long",)), ("\\xe9", ("odd",))]


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("no image", lambda m: without(m, "00001.jpg")),
        ("no JSON", lambda m: without(m, "00001.json")),
        ("broken JSON", lambda m: replaced(m, "00001.json", b'{"zh": "a')),
        ("caption is not text", lambda m: replaced(m, "00001.json", b'{"zh": 5, "en": 6}')),
        ("empty text", lambda m: replaced(m, "00001.json", b'{"zh": " ", "en": "\\n"}')),
    ],
)
def test_bad_json_samples_say_why(tmp_path: Path, reason: str, change) -> None:
    write_tar(tmp_path / "a.tar", change(bilingual_members(range(3))))
    source = ShardSource(str(tmp_path), caption_fields=BOTH)
    found = []
    for language in ("zh", "en"):
        assert source.num_samples(language) == 3
        for i in range(3):
            try:
                source.read(language, i)
            except BadSample as bad:
                found.append((bad.reason, bad.key, bad.shard))
    assert found == [(reason, "00001", str(tmp_path / "a.tar"))] * 2


@pytest.mark.parametrize(
    ("reason", "text"), [("no text", None), ("empty text", b" \n"), ("text is not UTF-8", "中文".encode("gbk"))]
)
def test_bad_text_samples_say_why(tmp_path: Path, reason: str, text: bytes | None) -> None:
    members = [("1.jpg", jpeg(1))] + ([("1.txt", text)] if text is not None else [])
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(BadSample) as bad:
        ShardSource(str(tmp_path), language="zh").read("zh", 0)
    assert (bad.value.reason, bad.value.key) == (reason, "1")


def test_duplicate_keys_keep_the_first_and_are_counted(tmp_path: Path) -> None:
    members = [("1.jpg", jpeg(1)), ("1.txt", b"first"), ("1.jpg", jpeg(2)), ("1.txt", b"second"), ("2.jpg", jpeg(3))]
    write_tar(tmp_path / "a.tar", members)
    source = ShardSource(str(tmp_path), language="en")
    assert source.num_samples("en") == 2 and source.left_out == {"duplicate key": 2}
    assert (source.read("en", 0).captions, source.read("en", 0).image) == (("first",), jpeg(1))


def test_samples_without_a_language_are_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", bilingual_members(range(2), lang="zh-CN") + bilingual_members(range(2, 5)))
    source = ShardSource(str(tmp_path), language_field="lang")
    assert (source.languages, source.num_samples("zh"), source.left_out) == (("zh",), 2, {"no language": 3})


def test_a_tar_cut_short_loses_its_last_member_only(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "a.tar", [(f"{n}.{x}", jpeg(n) if x == "jpg" else b"text") for n in range(4) for x in ("txt", "jpg")]
    )
    with tarfile.open(shard) as tar:
        last = tar.getmembers()[-1]
    os.truncate(shard, last.offset_data + 100)
    source = ShardSource(str(shard), language="en")
    assert source.left_out == {"shard cut short": 1}
    assert [source.read("en", i).image for i in range(3)] == [jpeg(n) for n in range(3)]
    with pytest.raises(BadSample, match="truncated shard"):
        source.read("en", 3)


def test_a_broken_header_in_the_middle_is_told(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [(f"{n}.txt", b"text") for n in range(4)])
    raw = bytearray(shard.read_bytes())
    raw[2048:2560] = b"x" * 512
    shard.write_bytes(raw)
    source = ShardSource(str(shard), language="en")
    assert source.num_samples("en") == 2 and source.left_out == {"rest of a shard after a broken header": 1}


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("cut between two members", "shard cut short"),
        ("zeros", "rest of a shard after an end in its middle"),
        ("joined by cat", "rest of a shard after an end in its middle"),
        ("size below 0", "rest of a shard after a broken header"),
        ("size beyond 64 bits", "shard cut short"),
    ],
)
def test_no_rest_of_a_shard_is_lost_without_a_word(tmp_path: Path, how: str, reason: str) -> None:
    tar = write_tar(tmp_path / "a.tar", [(f"{n}{part}", b"x" * 600) for n in range(4) for part in (".jpg", ".txt")])
    whole, third = tar.read_bytes(), 4 * 3 * 512  # each member takes three blocks
    header = tarfile.TarInfo("1.bin")
    header.size = {"size below 0": -512, "size beyond 64 bits": 1 << 70}.get(how, 0)
    tar.write_bytes(
        {
            "cut between two members": whole[:third],
            "zeros": whole[:third] + bytes(512) + whole[third + 512 :],
            "joined by cat": whole[:third] + bytes(10240) + whole,
        }.get(how, whole[:third] + header.tobuf(tarfile.GNU_FORMAT) + whole[third:])
    )
    source = ShardSource(str(tar), language="en")
    assert (source.num_samples("en"), source.left_out) == (2, {reason: 1})
    assert [sample.captions for sample in read_all(source, "en")] == [("x" * 600,)] * 2


def write_links(path: Path, members: list[tuple[str, bytes | str]], *, kind: bytes, form: int) -> Path:
    """A string is what the member is a link to."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = kind, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_hard_link_is_the_member_before_it(tmp_path: Path, form: int, monkeypatch) -> None:
    """`tar` writes one for a file that it has packed already: equal pictures of several samples."""
    pool = "p" * 150 + "/blob"  # neither a key nor an extension, and in a header of its own
    members: list[tuple[str, bytes | str]] = [
        (pool, jpeg(0)), ("1.txt", b"one"), ("1.jpg", pool), ("2.jpg", "./1.jpg"), ("2.txt", "1.txt"),
        ("again", b"old"), ("again", jpeg(5)), ("3.jpg", "again"), ("3.txt", b"three"),
    ]  # fmt: skip
    write_links(tmp_path / "a.tar", members, kind=tarfile.LNKTYPE, form=form)
    opened: list[Path] = []
    monkeypatch.setattr("data.scan.open_tar", lambda shard: opened.append(shard) or open_tar(shard))
    source = ShardSource(str(tmp_path), language="en")
    found = {sample.key: (sample.captions[0], sample.image) for sample in read_all(source, "en")}
    assert found == {"1": ("one", jpeg(0)), "2": ("one", jpeg(0)), "3": ("three", jpeg(5))}
    assert source.left_out == {} and len(opened) == 2, "names are looked up in a second pass, and only for links"


@pytest.mark.parametrize(
    ("kind", "target", "reason"),
    [
        (tarfile.LNKTYPE, "2.jpg", "hard link to no member before it"),
        (tarfile.LNKTYPE, "/etc/hostname", "hard link to no member before it"),
        (tarfile.SYMTYPE, "0.jpg", "symbolic link, which is never followed"),
        (tarfile.SYMTYPE, "/etc/hostname", "symbolic link, which is never followed"),
    ],
)
def test_a_link_that_is_not_followed_is_named(tmp_path: Path, kind: bytes, target: str, reason: str) -> None:
    members: list[tuple[str, bytes | str]] = [("0.jpg", jpeg(0)), ("0.txt", b"a"), ("1.jpg", target), ("1.txt", b"b")]
    members += [("2.jpg", jpeg(2)), ("2.txt", b"c")]
    write_links(tmp_path / "a.tar", members, kind=kind, form=tarfile.GNU_FORMAT)
    source = ShardSource(str(tmp_path), language="en")
    assert source.left_out == {reason: 1}
    assert [source.read("en", i).captions for i in (0, 2)] == [("a",), ("c",)]
    with pytest.raises(BadSample, match="no image"):
        source.read("en", 1)


def test_a_size_that_no_memory_holds_is_a_bad_sample(tmp_path: Path) -> None:
    header = tarfile.TarInfo("0.jpg")
    header.size = 1 << 50
    (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + b"x" * 600)
    with pytest.raises(BadSample, match="truncated shard"):
        ShardSource(str(tmp_path), language="en").read("en", 0)


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"<html>not found</html>" * 99, "not an uncompressed tar")]
)
def test_what_is_no_tar_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    write_tar(tmp_path / "00000.tar", bilingual_members(range(2)))
    (tmp_path / "00001.tar").write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s)1 of 2 shards.*00001.tar.*{message}"):
        ShardSource(str(tmp_path), caption_fields=BOTH)


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [])
    with pytest.raises(ValueError, match="no usable sample in 1 shards.*a.tar"):
        ShardSource(str(tmp_path), language="zh")
    write_tar(tmp_path / "a.tar", bilingual_members(range(2)))
    with pytest.raises(ValueError, match="no language under 'lang'"):
        ShardSource(str(tmp_path), language_field="lang")
    with pytest.raises(ValueError, match="exactly one of"):
        ShardSource(str(tmp_path), language="zh", language_field="lang")


# ------- the index


def test_an_empty_shard_among_others_is_fine(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", bilingual_members(range(2)))
    write_tar(tmp_path / "1.tar", [])
    write_tar(tmp_path / "2.tar", bilingual_members(range(2, 5)))
    source = ShardSource(str(tmp_path), caption_fields=BOTH)
    assert [sample.captions for sample in read_all(source, "en")] == [(f"picture number {n}",) for n in range(5)]


def test_the_index_is_made_once_and_again_when_the_shard_changes(tmp_path: Path, monkeypatch) -> None:
    scans = []

    def counting(shard: Path, layout, scan=data.index.scan_shard):
        scans.append(shard.name)
        return scan(shard, layout)

    monkeypatch.setattr(data.index, "scan_shard", counting)
    shard = write_tar(tmp_path / "a.tar", bilingual_members(range(3)))
    make = partial(ShardSource, str(shard), caption_fields=BOTH, index_workers=1)
    expected = make().fingerprint()
    assert make().fingerprint() == expected and scans == ["a.tar"]
    write_tar(shard, bilingual_members(range(4)))
    assert make().num_samples("zh") == 4 and scans == ["a.tar"] * 2
    index_file = next(tmp_path.glob("*.npz"))
    index_file.write_bytes(index_file.read_bytes()[:100])
    assert make().num_samples("zh") == 4 and scans == ["a.tar"] * 3
    assert ShardSource(str(shard), caption_fields={"en": "en"}, index_workers=1).languages == ("en",)


def test_an_index_that_is_damaged_is_made_anew_or_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", bilingual_members(range(30)))
    expected = ShardSource(str(tmp_path), caption_fields=BOTH).fingerprint()
    (file,) = tmp_path.glob("*.npz")
    whole = file.read_bytes()
    for damaged in (b"", b"no archive", whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        assert ShardSource(str(tmp_path), caption_fields=BOTH).fingerprint() == expected
    middle = whole.index(b"samples.npy") + 200
    file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
    with pytest.raises(ValueError, match=rf"{file.name}: this index is damaged .*samples.npy.*remove it"):
        ShardSource(str(tmp_path), caption_fields=BOTH)


def test_indexing_several_shards_at_a_time_gives_the_same(tmp_path: Path) -> None:
    for folder in ("one", "many"):
        for n in range(6):
            write_tar(tmp_path / folder / f"{n}.tar", bilingual_members(range(n * 3, n * 3 + 3)))
    expected = ShardSource(str(tmp_path / "one"), caption_fields=BOTH, index_workers=1)
    source = ShardSource(str(tmp_path / "many"), caption_fields=BOTH, index_workers=3)
    assert source.fingerprint() == expected.fingerprint()
    assert [s.captions for s in read_all(source, "zh")] == [s.captions for s in read_all(expected, "zh")]


def test_a_large_source_is_mapped_and_reads_the_same(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("QUEQIAO_CACHE", str(tmp_path / "cache"))
    for shard in range(3):
        img2dataset_shard(tmp_path, f"{shard:05d}", range(shard * 7, shard * 7 + 7))
    expected = ShardSource(str(tmp_path), language_field="lang")
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(data.index, "SHARED_FROM", 21)
    for _ in range(2):
        source = ShardSource(str(tmp_path), language_field="lang")
        assert isinstance(source._index.samples, np.memmap)
        assert source.fingerprint() == expected.fingerprint()
        for language in ("en", "zh"):
            found, wanted = read_all(source, language), read_all(expected, language)
            assert [(s.key, s.captions, s.image) for s in found] == [(s.key, s.captions, s.image) for s in wanted]
        monkeypatch.setattr(data.index, "_join", None)  # the second time nothing is joined
    monkeypatch.undo()
    monkeypatch.setenv("QUEQIAO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data.index, "SHARED_FROM", 21)
    img2dataset_shard(tmp_path, "00001", range(7, 20))
    assert sum(map(ShardSource(str(tmp_path), language_field="lang").num_samples, ("en", "zh"))) == 27


def test_no_image_is_decoded_to_index(tmp_path: Path, monkeypatch) -> None:
    write_tar(tmp_path / "a.tar", replaced(bilingual_members(range(2)), "00000.jpg", b"no picture at all"))
    monkeypatch.setattr("PIL.Image.open", lambda *args, **kwargs: pytest.fail("an image was opened"))
    assert ShardSource(str(tmp_path), caption_fields=BOTH).num_samples("zh") == 2


def test_a_read_only_folder_keeps_its_index_elsewhere(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("QUEQIAO_CACHE", str(tmp_path / "cache"))
    shard = write_tar(tmp_path / "read_only" / "a.tar", bilingual_members(range(2)))
    monkeypatch.setattr(data.index.os, "access", lambda path, mode: "read_only" not in str(path))
    assert ShardSource(str(shard), caption_fields=BOTH).num_samples("en") == 2
    assert os.listdir(shard.parent) == ["a.tar"] and len(list((tmp_path / "cache" / "index").iterdir())) == 1


def test_the_fingerprint_knows_content_and_not_place(tmp_path: Path) -> None:
    def fingerprint(folder: str, numbers: range):
        write_tar(tmp_path / folder / "a.tar", bilingual_members(numbers))
        return ShardSource(str(tmp_path / folder), caption_fields=BOTH).fingerprint()

    expected = fingerprint("one", range(5))
    assert json.loads(json.dumps(expected)) == expected
    assert fingerprint("two", range(5)) == expected and fingerprint("three", range(1, 6)) != expected


# ------- lists of shards


def test_shard_lists(tmp_path: Path) -> None:
    for name in ("a/00.tar", "a/01.tar", "b/00.tar", "b/note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    expected = [str(tmp_path / name) for name in ("a/00.tar", "a/01.tar", "b/00.tar")]
    t = tmp_path
    assert expand_shards(f"{t}/a/{{00..01}}.tar::{t}/b/00.tar") == expected
    assert expand_shards([f"{t}/a", f"{t}/b/*.tar"]) == expected
    assert expand_shards(f"{t}/*/*.tar") == expected
    assert expand_shards("http://x/{00..01}.tar") == ["http://x/00.tar", "http://x/01.tar"]
    with pytest.raises(ValueError, match="no shard at.*c/00.tar"):
        expand_shards(f"{t}/a/00.tar::{t}/c/00.tar")
    with pytest.raises(ValueError, match="come twice.*a/00.tar"):
        expand_shards([f"{t}/a", f"{t}/a/00.tar"])
