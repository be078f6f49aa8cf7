"""Remote shards come whole into the cache, once, and what a server answers instead of one is told."""

from __future__ import annotations

import gzip
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data.source.shards import ShardSource
from tests.data.shard_files import BOTH, bilingual_members, img2dataset_shard, read_all, write_tar


class Handler(SimpleHTTPRequestHandler):
    """A web server that can also break off."""

    cut_short = 0
    served: list[str] = []

    def log_message(self, *args) -> None:
        self.served.append(self.path)

    def copyfile(self, source, outputfile) -> None:
        if self.cut_short:
            type(self).cut_short -= 1
            outputfile.write(source.read()[:1000])
        else:
            super().copyfile(source, outputfile)


@pytest.fixture
def web(tmp_path: Path):
    folder = tmp_path / "web"
    folder.mkdir()
    Handler.cut_short, Handler.served = 0, []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_remote_shards_come_whole_once_and_read_the_same(web, tmp_path: Path, monkeypatch) -> None:
    folder, address = web
    for shard in range(2):
        img2dataset_shard(folder, f"{shard:05d}", range(shard * 6, shard * 6 + 6))
    local = ShardSource(str(folder), language_field="lang")
    monkeypatch.setattr("data.shard_list.RETRY_PAUSE_S", 0)
    Handler.cut_short = 1  # the first answer ends early and is asked for again
    make = partial(
        ShardSource, address + "/{00000..00001}.tar", language_field="lang", cache_dir=str(tmp_path / "cache")
    )
    source = make()
    assert source.fingerprint() == local.fingerprint()
    assert [s.image for s in read_all(source, "zh")] == [s.image for s in read_all(local, "zh")]
    served = len(Handler.served)
    assert make().num_samples("en") == local.num_samples("en") and len(Handler.served) == served


def test_a_remote_shard_that_is_not_there(web, tmp_path: Path) -> None:
    _, address = web
    with pytest.raises(ValueError, match="no shard at.*00007.tar: the server answered 404"):
        ShardSource(address + "/00007.tar", language="zh", cache_dir=str(tmp_path / "cache"))


def test_an_answer_in_chunks_that_ends_early_is_asked_for_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("data.shard_list.RETRY_PAUSE_S", 0)
    tar = write_tar(tmp_path / "a.tar", bilingual_members(range(3))).read_bytes()
    ends_early = [True, False, True, True, True]

    class Chunks(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            early = ends_early.pop(0)
            self.wfile.write(b"%x\r\n" % len(tar) + tar[: 1000 if early else None] + b"\r\n0\r\n\r\n")
            self.close_connection = True

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Chunks) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address, options = (
            f"http://127.0.0.1:{server.server_port}",
            {"caption_fields": BOTH, "cache_dir": str(tmp_path)},
        )
        assert ShardSource(f"{address}/a.tar", **options).num_samples("zh") == 3
        with pytest.raises(ValueError, match="b.tar: could not be fetched in 3 attempts .*IncompleteRead"):
            ShardSource(f"{address}/b.tar", **options)
        server.shutdown()


PAGE = b"<!DOCTYPE html><title>Log in</title>" + b"<p>to go on</p>" * 99


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (PAGE, r"not an uncompressed tar .*begins with b'<!DOCTYPE html><title>Log in.*login"),
        (PAGE[:90], r"not an uncompressed tar .*begins with b'<!DOCTYPE html>"),
        (gzip.compress(PAGE), r"not an uncompressed tar .*begins with b'\\x1f\\x8b.*unpacked to \.tar"),
        (b"", "is empty"),
    ],
    ids=["page", "short page", "tar.gz", "nothing"],
)
@pytest.mark.parametrize("in_cache", [False, True])
def test_what_is_answered_instead_of_a_shard_is_not_kept(
    web, tmp_path: Path, answer: bytes, told: str, in_cache: bool
) -> None:
    """A login page comes with status 200 and its right length."""
    folder, address = web
    cache = tmp_path / "cache"
    make = partial(ShardSource, f"{address}/a.tar", caption_fields=BOTH, cache_dir=str(cache))
    if in_cache:  # from before such answers were refused
        write_tar(folder / "a.tar", bilingual_members(range(3)))
        make()
        (kept,) = cache.rglob("a.tar")
        kept.write_bytes(answer)
    (folder / "a.tar").write_bytes(answer)
    with pytest.raises(ValueError, match=f"(?s){address}/a.tar: .*{told}"):
        make()
    assert not [file for file in cache.rglob("a.tar*")]
    write_tar(folder / "a.tar", bilingual_members(range(3)))
    assert make().num_samples("zh") == 3


def test_a_bad_answer_in_the_cache_is_fetched_again(web, tmp_path: Path) -> None:
    folder, address = web
    write_tar(folder / "a.tar", bilingual_members(range(3)))
    make = partial(ShardSource, f"{address}/a.tar", caption_fields=BOTH, cache_dir=str(tmp_path / "cache"))
    make()
    (kept,) = (tmp_path / "cache").rglob("a.tar")
    kept.write_bytes(PAGE)
    assert make().num_samples("zh") == 3 and kept.read_bytes() == (folder / "a.tar").read_bytes()


def test_a_page_instead_of_the_table_of_a_shard_is_not_kept(web, tmp_path: Path) -> None:
    folder, address = web
    img2dataset_shard(folder, "00000", range(6))
    table = (folder / "00000.parquet").read_bytes()
    (folder / "00000.parquet").write_bytes(PAGE)
    make = partial(ShardSource, f"{address}/00000.tar", language_field="lang", cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=f"{address}/00000.parquet: not a parquet file, it begins with b'<!DOCTYPE"):
        make()
    (folder / "00000.parquet").write_bytes(table)
    assert make().num_samples("zh") == 2


def test_shards_in_any_file_system_that_fsspec_knows(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for shard in range(2):
        file = img2dataset_shard(tmp_path, f"{shard:05d}", range(shard * 6, shard * 6 + 6))
        for suffix in (".tar", ".parquet"):
            memory.pipe(f"/bucket/{file.stem}{suffix}", file.with_suffix(suffix).read_bytes())
    expected = ShardSource(str(tmp_path), language_field="lang").fingerprint()
    cache = {"cache_dir": str(tmp_path / "cache"), "language_field": "lang"}
    assert ShardSource("memory://bucket/*.tar", **cache).fingerprint() == expected
    with pytest.raises(ValueError, match="no shard at memory://bucket/00009.tar"):
        ShardSource("memory://bucket/00009.tar", **cache)
    with pytest.raises(ValueError, match="abc://x/0.tar.*Protocol not known"):
        ShardSource("abc://x/0.tar", **cache)
