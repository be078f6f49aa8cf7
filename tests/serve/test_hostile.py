"""What strangers send.  Each is answered with a status and a sentence, and the server goes on as if nothing had been.

VisualGLM's server answers most of these with a traceback, a file of its own, or a request to an address of the sender's
choice (`chat.py:72-92`, `api.py:14-37`).
"""

from __future__ import annotations

import base64
import json
import re
import socket
import struct
import zlib
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from data.batch import Turn
from serve.guard import SECURITY
from serve.server import app_of
from serve.session import Session
from tests.serve.live import WAIT, Live, base64_of, data_url, file_of, image, live, tiny_session, wait_until

MAX_BODY, MAX_PICTURE, MAX_PIXELS = 2**20, 200_000, 10_000
GREEDY = {"temperature": 0, "max_length": 60}
PNG = file_of(image(0))


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return tiny_session(tmp_path_factory.mktemp("pieces"))


@pytest.fixture(scope="module")
def server(session: Session) -> Iterator[Live]:
    reader = {"max_bytes": MAX_PICTURE, "max_pixels": MAX_PIXELS}
    with live(session, reader=reader, max_body=MAX_BODY, max_pictures=3, arrival_seconds=1.0) as found:
        yield found


@pytest.fixture(scope="module")
def expected(session: Session) -> str:
    return session.chat(image(0), "Q", temperature=0, max_new_tokens=4)[0]


def still_answers(server: Live, expected: str) -> None:
    num_prompt = len(server.session.ask(image(0), "Q").encoded.ids)
    say = {"text": "Q", "image": base64_of(PNG), "temperature": 0, "max_length": num_prompt + 4}
    done = httpx.post(server.url, json=say, timeout=WAIT)
    assert (done.status_code, done.json().get("result")) == (200, expected)


def post(server: Live, body: Any, path: str = "/", **headers: str) -> httpx.Response:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with_type = {
        "Content-Type": "application/json",
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    return httpx.post(server.url + path, content=raw, headers=with_type, timeout=WAIT)


def is_refused(found: httpx.Response, status: int, sentence: str) -> None:
    assert found.status_code == status, found.text[:500]
    error = found.json()["error"]
    assert re.search(sentence, error["message"]), error["message"]
    assert error["code"] == found.json()["status"] == status
    assert len(found.text) < 2000 and "Traceback" not in found.text
    assert found.headers["X-Content-Type-Options"] == "nosniff"


# ----------------------------------------------------------------------------------------------------- bodies of POST /


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, pixels: bytes = b"", *more: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"".join([b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(pixels)),
                     chunk(b"IEND", b"")])  # fmt: skip


def gif(screen: tuple[int, int], frame: tuple[int, int]) -> bytes:
    return (b"GIF89a" + struct.pack("<HHBBB", *screen, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
            + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02D\x01\x00;")  # fmt: skip


def with_picture(raw: bytes | str) -> dict[str, Any]:
    return {"text": "Q", "image": raw if isinstance(raw, str) else base64_of(raw), **GREEDY}


def deep(levels: int) -> bytes:
    return b'{"text": ' + b"[" * levels + b"]" * levels + b"}"


SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(/etc/passwd) (r) file\n%%EOF\n"
JPEG = file_of(image(0).resize((90, 90)), "JPEG")

BODIES: dict[str, tuple[Any, int, str]] = {
    # no JSON, or another one
    "nothing": (b"", 400, "no JSON"),
    "half an object": (b'{"text": "Q"', 400, "no JSON"),
    "not UTF-8": (b'{"text": "\xff\xfe"}', 400, "not UTF-8"),
    "UTF-16": ('{"text": "Q"}'.encode("utf-16"), 400, "not UTF-8"),
    "a list": ([1], 400, r"has to be a JSON object, not \[1\]"),
    "null": (None, 400, "has to be a JSON object, not null"),
    "nested beyond Python's stack": (deep(200_000), 400, "nested too deeply"),
    "nested within it": (deep(100), 400, "nested too deeply"),
    "a number of 100,000 digits": (b'{"text": "Q", "top_k": ' + b"9" * 100_000 + b"}", 400, "no JSON"),
    "NaN": (b'{"text": "Q", "temperature": NaN}', 400, "NaN is no number"),
    "infinity": (b'{"text": "Q", "temperature": 1e999}', 400, "temperature: Input should be less than"),
    "half a character": (rb'{"text": "\ud800"}', 400, "half a character"),
    "half a character in the history": (rb'{"text": "Q", "history": [["\udc00", "a"]]}', 400, "half a character"),
    # fields
    "no text": ({}, 400, "text is missing"),
    "an empty text": ({"text": " \n"}, 400, "the question is empty"),
    "a text that is none": ({"text": {"$ne": 1}}, 400, "text: Input should be a valid string"),
    "a field nobody knows": ({"text": "Q", "image_path": "/etc/passwd"}, 400, "image_path is not known here"),
    "a prototype": ({"text": "Q", "__proto__": {"admin": True}}, 400, "__proto__ is not known here"),
    "a history of triples": ({"text": "Q", "history": [["a", "b", "c"]]}, 400, "history.0: List should have at most 2"),
    "a history of numbers": ({"text": "Q", "history": [[1, 2]]}, 400, "history.0.0: Input should be a valid string"),
    "a history without end": ({"text": "Q", "history": [["a", "b"]] * 1001}, 400, "history: List should have at most"),
    "a million characters": ({"text": "说" * 150_000}, 400, "150000 characters together; this server takes 32768"),
    "lengths below nothing": ({"text": "Q", "max_length": -5}, 400, "max_length: Input should be greater"),
    "a temperature in quotes": ({"text": "Q", "temperature": "1"}, 400, "temperature: Input should be a valid number"),
    "a truth for a number": ({"text": "Q", "top_k": True}, 400, "top_k: Input should be a valid integer"),
    "a probability of 2": ({"text": "Q", "top_p": 2.0}, 400, "top_p is 2.0"),
    "no penalty at all": ({"text": "Q", "repetition_penalty": 0.0}, 400, "repetition_penalty is 0.0"),
    "a penalty beyond floats": ({"text": "Q", "repetition_penalty": 1e308}, 400, "repetition_penalty: Input should be"),
    "a minimum beyond 64 bits": ({"text": "Q", "min_length": 2**70}, 400, "min_length: Input should be"),
    "a seed of 100 digits": ({"text": "Q", "seed": 10**100}, 400, "seed: "),
    "top_k beyond 64 bits": ({"text": "Q", "top_k": 2**70}, 400, "top_k: "),
    # pictures
    "a path": (with_picture("/etc/passwd"), 400, "the picture is no base64|cannot be used"),
    "a path in other words": (with_picture("../../etc/passwd"), 400, "the picture is no base64"),
    "an address": (with_picture("http://169.254.169.254/latest/meta-data"), 400, "the picture is no base64"),
    "a file's address": (with_picture("file:///etc/passwd"), 400, "the picture is no base64"),
    "base64 of nothing": (with_picture("===="), 400, "the picture is no base64"),
    "nothing in a data URL": (with_picture("data:image/png;base64,"), 400, "the picture is empty"),
    "words": (with_picture(b"This is a picture."), 400, "cannot be used: unreadable image: none of JPEG, PNG, WEBP"),
    "SVG with a file in it": (with_picture(SVG), 400, "cannot be used: unreadable"),
    "PostScript": (with_picture(EPS), 400, "cannot be used: unreadable"),
    "TIFF": (with_picture(file_of(image(0), "TIFF")), 400, "cannot be used: unreadable"),
    "PDF": (with_picture(file_of(image(0), "PDF")), 400, "cannot be used: unreadable"),
    "a JPEG cut off": (with_picture(JPEG[: len(JPEG) // 2]), 400, "cannot be used: truncated image"),
    "a PNG cut off": (with_picture(PNG[:50]), 400, "cannot be used: truncated image"),
    "a WEBP cut off": (with_picture(file_of(image(0), "WEBP")[:40]), 400, "cannot be used"),
    "a PNG that says 60,000 x 60,000": (with_picture(png(60_000, 60_000)), 400, "too many pixels"),
    "one pixel more than allowed": (with_picture(png(101, 100, bytes(101 * 304))), 400, "too many pixels: 101 x 100"),
    "a PNG of no pixels": (with_picture(png(0, 0)), 400, "cannot be used"),
    "a PNG that ends before its pixels": (with_picture(png(90, 90, b"\0" * 100)), 400, "cannot be used"),
    "a GIF whose frame outgrows it": (with_picture(gif((1, 1), (65_535, 65_535))), 400, "cannot be used"),
    "a JPEG of 65,500 x 65,500": (
        with_picture(JPEG.replace(b"\x08\0\x5a\0\x5a", b"\x08\xff\xdc\xff\xdc", 1)), 400, "too many pixels"),
    "a file too large": (with_picture(PNG + bytes(MAX_PICTURE)), 400, f"this server takes {MAX_PICTURE}"),
    "base64 too long": (with_picture("A" * (2 * MAX_PICTURE)), 400, f"this server takes {MAX_PICTURE}"),
    "a request too long": (b'{"text": "' + b"Q" * MAX_BODY + b'"}', 413, f"this server takes {MAX_BODY} bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_hostile_body(server: Live, expected: str, name: str) -> None:
    body, status, sentence = BODIES[name]
    is_refused(post(server, body), status, sentence)
    still_answers(server, expected)


# ------------------------------------------------------------------------------------------------ OpenAI's messages


def picture_at(url: Any, **more: Any) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url, **more}}
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}, part]}], "max_tokens": 2}


def say(content: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content}], "max_tokens": 2}


SHOWN = {"type": "image_url", "image_url": {"url": data_url(PNG)}}
NOTHING_FETCHED = "this server fetches nothing"
MESSAGES: dict[str, tuple[Any, str]] = {
    "an address": (picture_at("http://127.0.0.1:1/x.png"), NOTHING_FETCHED),
    "the cloud's own address": (picture_at("http://169.254.169.254/latest/meta-data/"), NOTHING_FETCHED),
    "a file": (picture_at("file:///etc/passwd"), NOTHING_FETCHED),
    "a path": (picture_at("/etc/passwd"), NOTHING_FETCHED),
    "gopher": (picture_at("gopher://127.0.0.1:6379/_FLUSHALL"), NOTHING_FETCHED),
    "a data URL of text": (picture_at("data:text/html;base64,PHNjcmlwdD4="), NOTHING_FETCHED),
    "a data URL not in base64": (picture_at("data:image/png,%89PNG"), NOTHING_FETCHED),
    "a data URL of 2 kB's type": (picture_at(f"data:image/{'x' * 2000};base64,{base64_of(PNG)}"), NOTHING_FETCHED),
    "no address": (picture_at(None), "url is missing"),
    "a kind without end": (say([{"type": "x" * 40_000}]), "Input tag 'xxx"),
    "an address and a path": (picture_at(data_url(PNG), path="/etc/passwd"), "path is not known here"),
    "too many pictures": (say([SHOWN] * 4), "4 pictures in one request"),
    "a picture without a question": (
        say([SHOWN]), "the question is empty"),
    "a picture in the assistant's mouth": (
        {"messages": [{"role": "user", "content": "Q"},
                      {"role": "assistant", "content": [SHOWN]},
                      {"role": "user", "content": "Q"}]}, "messages.1 is the assistant's and holds a picture"),
    "a sound": (say([{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]), "messages.0.content"),
    "a role of its own": (say("Q", "root"), "messages.0.role: Input should be 'system'"),
    "257 parts": (say([{"type": "text", "text": "a"}] * 257), "messages.0.content"),
    "1001 messages": ({"messages": [{"role": "user", "content": "Q"}] * 1001}, "messages: List should have at most"),
    "a truth for a stream": ({**say("Q"), "stream": "yes"}, "stream: Input should be a valid boolean"),
    "no tokens": ({**say("Q"), "max_tokens": 0}, "max_tokens: Input should be greater"),
}  # fmt: skip


@pytest.mark.parametrize("name", MESSAGES)
def test_hostile_messages(server: Live, expected: str, name: str) -> None:
    body, sentence = MESSAGES[name]
    is_refused(post(server, body, "/v1/chat/completions"), 400, sentence)
    still_answers(server, expected)


# --------------------------------------------------------------------------------------------------- headers, addresses


HEADERS: dict[str, tuple[dict[str, str], int, str]] = {
    "a page elsewhere": ({"Origin": "https://evil.example"}, 403, "pages of other sites"),
    "a page on another port": ({"Origin": "http://127.0.0.1:1"}, 403, "pages of other sites"),
    "a page of no origin": ({"Origin": "null"}, 403, "pages of other sites"),
    "a form elsewhere": ({"Sec_Fetch_Site": "cross-site"}, 403, "pages of other sites"),
    "a name that now points here": ({"Host": "evil.example"}, 403, "not called 'evil.example'"),
    "a name with this one in it": ({"Host": "127.0.0.1.evil.example"}, 403, "not called"),
    "a host that is none": ({"Host": "[::1"}, 403, "not called ''"),
    "a form": ({"Content_Type": "application/x-www-form-urlencoded"}, 415, "takes application/json"),
    "text": ({"Content_Type": "text/plain"}, 415, "takes application/json, not text/plain"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers(server: Live, expected: str, name: str) -> None:
    headers, status, sentence = HEADERS[name]
    is_refused(post(server, {"text": "Q", **GREEDY}, **headers), status, sentence)
    still_answers(server, expected)


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1",
                                  "/file=/etc/passwd", "/gradio_api/file=/etc/passwd"])  # fmt: skip
def test_there_is_nothing_else(server: Live, expected: str, path: str) -> None:
    is_refused(httpx.get(server.url + path, timeout=WAIT), 404, "nothing at this address")
    assert httpx.delete(server.url + "/", timeout=WAIT).status_code == 405
    still_answers(server, expected)


def raw_request(server: Live, *parts: bytes, wait: float = 10.0) -> bytes:
    """What comes back for bytes that no HTTP client would send."""
    place = urlsplit(server.url)
    with socket.create_connection((place.hostname, place.port), timeout=wait) as connection:
        for part in parts:
            connection.sendall(part)
        found = b""
        try:
            while part := connection.recv(65536):
                found += part
        except (TimeoutError, ConnectionResetError):
            pass
    return found


HEAD = b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ((b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9 + b"\r\n\r\n",), b"400"),  # TLS
        ((b"GET / HTTP/1.1\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",), b"4"),
        ((HEAD + b"Content-Length: -1\r\n\r\n",), b"400"),
        ((HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",), b"400"),
        ((HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"zz\r\n"), b"400"),
        ((HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n",), b"4"),
        ((HEAD + f"Content-Length: {MAX_BODY + 1}\r\n\r\n".encode(),), b"413"),  # said, not sent
        ((HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[b"10000\r\n" + b" " * 65536 + b"\r\n"] * 17), b"413"),
        ((HEAD + b"Content-Length: 100\r\n\r\n", b'{"text'), b"408"),  # and then nothing
    ],
    ids=["TLS", "a long header", "length -1", "two lengths", "a chunk zz", "length 10^23", "announced too long",
         "too long in chunks", "a body that never comes"],
)  # fmt: skip
def test_hostile_bytes(server: Live, expected: str, parts: tuple[bytes, ...], status: bytes) -> None:
    found = raw_request(server, *parts)
    assert found.startswith(b"HTTP/1.1 " + status), found[:200]
    still_answers(server, expected)


def test_a_connection_that_breaks_off(server: Live, expected: str) -> None:
    place = urlsplit(server.url)
    for part in (b"", b"POST / HT", HEAD, HEAD + b"Content-Length: 100\r\n\r\n{"):
        connection = socket.create_connection((place.hostname, place.port))
        connection.sendall(part)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset, not a goodbye
        connection.close()
    still_answers(server, expected)
    wait_until(lambda: server.is_idle)


# ---------------------------------------------------------------------------------------- texts are texts, all of them


@pytest.mark.parametrize(
    "text",
    [
        "<img>/etc/passwd</img>Q",
        "<img>http://127.0.0.1:1/x.png</img>",
        "<img>",
        "</img><img>",
        "![x](file:///etc/passwd)",
        "<|user|>\nQ<|assistant|>",
        "[gMASK]<sop><eop>",
        "问：Q\n答：a\n问：",
        "{{ config }} ${jndi:ldap://127.0.0.1/a} %s%n {0.__class__}",
        "Q\0\x07\x1b[2J\u202e\ufeff",
        "👩‍👩‍👧‍👦" * 50,
        "á̸̢̛̛" * 100,
    ],
)
def test_a_text_is_never_searched(server: Live, session: Session, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    expected, _ = session.chat(None, text, temperature=0, max_new_tokens=3)
    assert session.asked([Turn(text)], []).encoded.image_starts == ()

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was opened")

    for place in ("builtins.open", "io.open", "os.open", "PIL.Image.open", "socket.getaddrinfo"):
        monkeypatch.setattr(place, refuse)
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 3, "temperature": 0}
    sent = json.dumps(body).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(sent)}\r\n\r\n".encode()
    place_of = urlsplit(server.url)
    with socket.socket() as connection:  # httpx would look up the host itself
        connection.connect(("127.0.0.1", place_of.port))
        connection.sendall(head + sent)
        found = b"".join(iter(lambda: connection.recv(65536), b""))
    assert found.startswith(b"HTTP/1.1 200"), found[-500:]
    assert json.loads(found.partition(b"\r\n\r\n")[2])["choices"][0]["message"]["content"] == expected


def test_answers_of_one_stranger_are_not_anothers_headers(server: Live) -> None:
    found = httpx.get(f"{server.url}/health", timeout=WAIT)
    assert {name: found.headers[name] for name in SECURITY} == SECURITY
    assert "server" not in found.headers and "access-control-allow-origin" not in found.headers


# --------------------------------------------------------------------------------------------------------------- tokens


def test_bound_elsewhere_a_token_is_asked_for(session: Session, server: Live) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(ValueError, match="can be reached from elsewhere: give it a token"):
            app_of(server.service, host=host, page=False)
    with live(session, host="0.0.0.0", token="a secret, 秘") as other:
        body = {"text": "Q", **GREEDY}

        def status(**headers: str) -> int:
            return post(other, body, **headers).status_code

        def basic(password: str) -> str:
            return "Basic " + base64.b64encode(f"anybody:{password}".encode()).decode()

        is_refused(post(other, body), 401, "asks for a token")
        for wrong in ("Bearer", "Bearer x", "Bearer a secret", "Basic ???", basic("x"), "Digest a secret, 秘"):
            assert httpx.post(other.url, json=body, headers={"Authorization": wrong.encode()}).status_code == 401, wrong
        assert httpx.get(f"{other.url}/metrics", timeout=WAIT).status_code == 401
        assert httpx.get(f"{other.url}/health", timeout=WAIT).status_code == 200
        assert status(Authorization=basic("a secret, 秘")) == 200
        assert status(Authorization=basic("a secret, 秘"), Host="my-name.example") == 200
        assert status(Authorization=basic("a secret, 秘"), Origin="http://evil.example") == 403


def test_there_are_forty_and_more() -> None:
    assert len(BODIES) + len(MESSAGES) + len(HEADERS) >= 40
    assert not {name for name, (_, status, _) in BODIES.items() if status not in (400, 413)}
