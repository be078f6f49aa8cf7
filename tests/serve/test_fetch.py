"""Pictures from addresses: off, then only from named hosts, and to no address within one's own network."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from serve.fetch import Fetcher, is_public

HOST = "pictures.example"
asked: list[tuple[str, str]] = []


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        asked.append((self.headers["Host"], self.path))
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "http://169.254.169.254/")
            self.end_headers()
            return
        self.send_response(200)
        if self.path == "/slow-head":
            self.flush_headers()
            for letter in b"X-Slow: " + b"x" * 400:
                try:
                    self.wfile.write(bytes([letter]))
                except OSError:
                    return
                time.sleep(0.02)
        self.end_headers()
        for _ in range(400 if self.path == "/drip" else 1):
            try:
                self.wfile.write(b"x" * (5000 if self.path == "/long" else 10))
                self.wfile.flush()
            except OSError:
                return
            time.sleep(0.02 if self.path == "/drip" else 0)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def to(*addresses: str) -> Any:
    """A look-up with these answers."""
    return lambda host, port, **_: [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses
    ]


def local(port: int, **more: Any) -> Fetcher:
    """Where this machine counts as public."""
    fields = {
        "look_up": to("127.0.0.1"),
        "is_allowed": lambda _: True,
        "schemes": {"http": port},
        "seconds": 2.0,
        **more,
    }
    return Fetcher([HOST], **fields)


def test_a_picture_comes_from_the_address_that_was_looked_at(port: int) -> None:
    """The name is looked up once: what it would mean a moment later (DNS rebinding) does not matter."""
    looked_up: list[str] = []

    def once(host: str, at: int, **_: Any) -> Any:
        looked_up.append(host)
        return to("127.0.0.1" if len(looked_up) == 1 else "192.0.2.1")(host, at)

    asked.clear()
    assert local(port, look_up=once).get(f"http://{HOST}/a.png?b=c", max_bytes=100) == b"x" * 10
    assert asked == [(HOST, "/a.png?b=c")] and looked_up == [HOST]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/redirect", "answered with 302, not with a picture"),
        ("/long", "has more than 1000 bytes"),
        ("/drip", "could not be fetched from pictures.example in time"),
        ("/slow-head", "could not be fetched from pictures.example in time"),
    ],
)
def test_no_redirect_no_flood_no_drip(port: int, path: str, expected: str) -> None:
    begin = time.monotonic()
    with pytest.raises(ValueError, match=expected):
        local(port, seconds=0.5).get(f"http://{HOST}{path}", max_bytes=1000)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://pictures.example/a", "over https only"),
        ("file:///etc/passwd", "over https only"),
        ("https://evil.example/", "does not fetch pictures from that host"),
        ("https://pictures.example.evil.example/", "does not fetch pictures from that host"),
        ("https://sub.pictures.example/", "does not fetch pictures from that host"),
        ("https://127.0.0.1/", "does not fetch pictures from that host"),
        ("https://pictures.example@evil.example/", "neither a user nor a port"),
        ("https://user:word@pictures.example/", "neither a user nor a port"),
        ("https://pictures.example:22/", "neither a user nor a port"),
        ("https://pictures.example:99999/", "is not one"),
        ("https://[::1/", "is not one"),
        ("https://pictures.example/\r\nX: y", "white space"),
        ("https://pictures.example\\@evil.example/", "neither a user nor a port"),
        ("", "over https only"),
    ],
)
def test_addresses_that_are_not_fetched(url: str, expected: str) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("looked up")

    with pytest.raises(ValueError, match=expected):
        Fetcher([HOST], look_up=refuse).get(url, max_bytes=100)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
     "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "::ffff:10.0.0.1", "::ffff:127.0.0.1",
     "2002:0a00:0001::", "64:ff9b::7f00:1", "ff02::1", "fec0::1", "64:ff9b:1::7f00:1", "::10.0.0.1", "::127.0.0.1",
     "::ffff:0:127.0.0.1", "2606:4700::5efe:10.0.0.1", "2606:4700::200:5efe:10.0.0.1", "2001:db8::1"],
)  # fmt: skip
def test_private_addresses(address: str) -> None:
    assert not is_public(address)
    with pytest.raises(ValueError, match="within a private network"):
        Fetcher([HOST], look_up=to("93.184.216.34", address)).get(f"https://{HOST}/", max_bytes=100)


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "64:ff9b::5db8:d822"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)
