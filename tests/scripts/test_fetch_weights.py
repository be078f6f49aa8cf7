"""scripts/fetch_weights.py against a stand-in for the hub on 127.0.0.1: listing, ranges, broken lines, wrong bytes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "c" * 40
WEIGHTS = bytes(range(256)) * 1200  # "large": kept as LFS, known by its sha256


@dataclass
class Hub:
    """A few repositories, and what to do wrong."""

    repositories: dict[str, dict[str, bytes]]
    url: str = ""
    cut_after: int | None = None  # bytes of a large file after which the line breaks, once
    lies: dict[str, bytes] = field(default_factory=dict)  # other bytes than were announced
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range


def serve(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            hub.requests.append((self.command, path, self.headers.get("Range", "")))
            if path.startswith("/api/models/"):
                self._list(path.removeprefix("/api/models/").partition("/revision/")[0])
                return
            for name, files in hub.repositories.items():
                prefix = f"/{name}/resolve/{COMMIT}/"
                if path.startswith(prefix) and path.removeprefix(prefix) in files:
                    self._file(path.removeprefix(prefix), files, body)
                    return
            self._send(404, b"", {})

        def _list(self, name: str) -> None:
            if name not in hub.repositories:
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                return
            siblings = []
            for file, data in hub.repositories[name].items():
                git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                entry: dict[str, Any] = {"rfilename": file, "size": len(data), "blobId": git}
                if len(data) > 1000:
                    entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 135}
                siblings.append(entry)
            answer = {"_id": "1", "id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "private": False}
            self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        def _file(self, name: str, files: dict[str, bytes], body: bool) -> None:
            data, status = hub.lies.get(name, files[name]), 200
            headers = {"ETag": '"x"', "X-Repo-Commit": COMMIT}
            asked = self.headers.get("Range", "")
            if asked.startswith("bytes="):
                start = int(asked.removeprefix("bytes=").partition("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                data, status = data[start:], 206
            if body and hub.cut_after is not None and len(data) > hub.cut_after:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: hub.cut_after])
                self.wfile.flush()
                self.close_connection = True
                return
            self._send(status, data if body else b"", headers, length=len(data))

        def _send(self, status: int, data: bytes, headers: dict[str, str], length: int | None = None) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data) if length is None else length)}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data)

    return Handler


@pytest.fixture
def hub() -> Iterator[Hub]:
    bert = {"config.json": b'{"model_type": "bert"}', "vocab.txt": b"[PAD]\n", "model.safetensors": WEIGHTS}
    bert |= {"pytorch_model.bin": b"pickle", "modeling.py": b"print('run me')", "onnx/model.onnx": b"x"}
    chat = {"config.json": b"{}", "pytorch_model-00001-of-00001.bin": WEIGHTS, "pytorch_model.bin.index.json": b"{}"}
    state = Hub({"google-bert/bert-base-chinese": bert, "THUDM/chatglm-6b": chat})
    server = ThreadingHTTPServer(("127.0.0.1", 0), serve(state))
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def fetch(hub: Hub | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    environment |= {"HF_HUB_OFFLINE": "1"} if hub is None else {"HF_ENDPOINT": hub.url}
    command = [sys.executable, str(ROOT / "scripts" / "fetch_weights.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, cwd=ROOT)


def test_only_safe_files_come_and_are_verified(hub: Hub, tmp_path: Path) -> None:
    result = fetch(hub, "bert-base-chinese", "--to", str(tmp_path))
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "bert-base-chinese"
    assert {p.name for p in folder.iterdir()} == {"config.json", "vocab.txt", "model.safetensors", "fetched.json"}
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    record = json.loads((folder / "fetched.json").read_text())
    assert record["commit"] == COMMIT and record["repository"] == "google-bert/bert-base-chinese"
    expected = hashlib.sha256(WEIGHTS).hexdigest()
    assert record["files"]["model.safetensors"] == {"size": len(WEIGHTS), "sha256": expected}
    assert "Apache-2.0" in result.stdout

    hub.requests.clear()
    again = fetch(hub, "bert-base-chinese", "--to", str(tmp_path))
    assert again.returncode == 0 and "kept" in again.stdout
    assert not any("resolve" in path for _, path, _ in hub.requests)

    assert fetch(None, "--check", str(folder)).returncode == 0
    (folder / "model.safetensors").write_bytes(WEIGHTS[:-1] + b"?")
    damaged = fetch(None, "--check", str(folder))
    assert damaged.returncode == 1 and "model.safetensors (differs)" in damaged.stderr


def test_a_killed_download_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "bert-base-chinese"
    folder.mkdir()
    version = hashlib.sha256(WEIGHTS).hexdigest()[:12]
    (folder / f"model.safetensors.{version}.part").write_bytes(WEIGHTS[:100_000])
    (folder / "model.safetensors.0123456789ab.part").write_bytes(b"of another version")
    result = fetch(hub, "bert-base-chinese", "--to", str(tmp_path))
    assert result.returncode == 0, result.stderr
    asked = [asked for method, path, asked in hub.requests if path.endswith("model.safetensors")]
    assert asked == ["bytes=100000-"]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_a_broken_line_is_taken_up_again(hub: Hub, tmp_path: Path) -> None:
    """In the same process, by huggingface_hub, from the last whole chunk of 10 MB that came."""
    large = WEIGHTS * 80
    hub.repositories["google-bert/bert-base-chinese"]["model.safetensors"] = large
    hub.cut_after = 22_000_000
    result = fetch(hub, "bert-base-chinese", "--to", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "bert-base-chinese" / "model.safetensors").read_bytes() == large
    asked = [asked for _, path, asked in hub.requests if path.endswith("model.safetensors")]
    assert asked == ["", f"bytes={2 * 10 * 2**20}-"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_bytes_that_are_not_the_announced_ones_are_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    data = hub.repositories["google-bert/bert-base-chinese"][name]
    hub.lies[name] = data[:-1] + b"?"
    result = fetch(hub, "bert-base-chinese", "--to", str(tmp_path))
    assert result.returncode == 1 and name in result.stderr and "another hash" in result.stderr
    folder = tmp_path / "bert-base-chinese"
    assert not (folder / name).exists() and not list(folder.glob(f"{name}*part"))


def test_pickles_only_when_asked_for_and_the_repositorys_old_owner(hub: Hub, tmp_path: Path) -> None:
    refused = fetch(hub, "chatglm-6b", "--to", str(tmp_path))
    assert refused.returncode == 1 and "--allow-pickle" in refused.stderr and "weights_only" in refused.stderr
    assert not list(tmp_path.rglob("*.bin"))
    result = fetch(hub, "chatglm-6b", "--to", str(tmp_path), "--allow-pickle")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "chatglm-6b" / "pytorch_model-00001-of-00001.bin").read_bytes() == WEIGHTS
    assert (tmp_path / "chatglm-6b" / "pytorch_model.bin.index.json").exists()
    assert "registration" in result.stdout


def test_what_is_not_there_is_said(hub: Hub, tmp_path: Path) -> None:
    absent = fetch(hub, "nobody/nothing", "--to", str(tmp_path))
    assert absent.returncode == 1 and "no repository nobody/nothing" in absent.stderr and hub.url in absent.stderr
    unknown = fetch(hub, "bert-base-klingon", "--to", str(tmp_path))
    assert unknown.returncode == 1 and "bert-base-chinese" in unknown.stderr
    offline = fetch(None, "bert-base-chinese", "--to", str(tmp_path))
    assert offline.returncode == 1 and "--from FOLDER" in offline.stderr
    assert "Traceback" not in absent.stderr + unknown.stderr + offline.stderr


def test_from_a_local_folder_without_a_network(hub: Hub, tmp_path: Path) -> None:
    assert fetch(hub, "bert-base-chinese", "--to", str(tmp_path / "usb")).returncode == 0
    result = fetch(None, "bert-base-chinese", "--from", str(tmp_path / "usb"), "--to", str(tmp_path / "here"))
    assert result.returncode == 0, result.stderr
    here = tmp_path / "here" / "bert-base-chinese"
    assert (here / "model.safetensors").read_bytes() == WEIGHTS
    assert fetch(None, "--check", str(here)).returncode == 0
    (tmp_path / "usb" / "own-bert").mkdir()
    (tmp_path / "usb" / "own-bert" / "vocab.txt").write_text("[PAD]")  # no record, and a name of one's own
    own = fetch(None, "own-bert", "--from", str(tmp_path / "usb"), "--to", str(tmp_path / "here"))
    assert own.returncode == 0, own.stderr
    assert (tmp_path / "here" / "own-bert" / "vocab.txt").read_text() == "[PAD]"
    (tmp_path / "usb" / "bert-base-chinese" / "vocab.txt").write_bytes(b"[BAD]\n")
    (here / "vocab.txt").unlink()
    damaged = fetch(None, "bert-base-chinese", "--from", str(tmp_path / "usb"), "--to", str(tmp_path / "here"))
    assert damaged.returncode == 1 and "vocab.txt" in damaged.stderr and "damaged" in damaged.stderr
    assert not (here / "vocab.txt").exists()


def test_a_file_at_a_plain_address(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LAVIS's files: no hub, no hash; size, ranges and a noted sha256."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import fetch_weights
    finally:
        sys.path.pop(0)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    url = f"{hub.url}/google-bert/bert-base-chinese/resolve/{COMMIT}/model.safetensors"
    (tmp_path / "model.safetensors.unknown.part").write_bytes(WEIGHTS[:1000])
    fetch_weights.fetch_url(url, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.requests[-1][2] == "bytes=1000-"
    expected = hashlib.sha256(WEIGHTS).hexdigest()
    assert json.loads((tmp_path / "fetched.json").read_text())["files"]["model.safetensors"]["sha256"] == expected
    refused = fetch(hub, "eva-vit-g", "--to", str(tmp_path))
    assert refused.returncode == 1 and "--allow-pickle" in refused.stderr
