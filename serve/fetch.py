"""A picture from an address: only from named hosts, over HTTPS, and never from within one's own network.

Off unless the server is told hosts.  A host is looked up once, every address it has must be a public one, and the
connection goes to an address that was looked at: what the name means a moment later (DNS rebinding) does not matter.
Redirects are not followed at all.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import urllib3

_PART = 65536


def is_public(address: str) -> bool:
    """Neither loopback, private, link-local, multicast nor reserved, also not inside IPv6 (::ffff:10.0.0.1).

    Of IPv6 only 2000::/3, the global unicast addresses there are (RFC 4291), and IPv4 within it or mapped to it.
    """
    found: Any = ipaddress.ip_address(address.split("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        last: Any = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        inner: Any = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if found in ipaddress.ip_network("64:ff9b::/96") or int(found) >> 32 & 0xFDFFFFFF == 0x5EFE:  # NAT64, ISATAP
            inner = last
        elif inner is None and found not in ipaddress.ip_network("2000::/3"):
            return False
        if inner is not None and not inner.is_global:
            return False
    return bool(found.is_global and not found.is_multicast)


@dataclass(frozen=True)
class Fetcher:
    """
    Args:
        hosts: exactly these names; a subdomain is another host.
        seconds: from the connection to the last byte.
        is_allowed: of an address.
        schemes: with the port of each, which nobody may choose.
        look_up: as `socket.getaddrinfo`.
    """

    hosts: Sequence[str]
    seconds: float = 10.0
    is_allowed: Callable[[str], bool] = is_public
    schemes: dict[str, int] = field(default_factory=lambda: {"https": 443})
    look_up: Callable[..., Any] = socket.getaddrinfo

    def get(self, url: str, *, max_bytes: int) -> bytes:
        """Raises ValueError."""
        scheme, host, port, target = self._parts(url)
        address = self._address(host, port)
        pool = self._pool(scheme, host, address, port)
        until = time.monotonic() + self.seconds
        cut = _cut_at(pool, until)
        try:
            answer = pool.urlopen(
                "GET",
                target,
                headers={"Host": host, "User-Agent": "queqiao", "Accept": "image/*", "Accept-Encoding": "identity"},
                redirect=False,
                retries=False,
                timeout=urllib3.Timeout(total=self.seconds),
                preload_content=False,
            )
            if answer.status != 200:
                raise ValueError(
                    f"{host} answered with {answer.status}, not with a picture (redirects are not followed)"
                )
            return _body(answer, host, max_bytes, until)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            why = "in time" if time.monotonic() >= until else f"({type(error).__name__})"
            raise ValueError(f"the picture could not be fetched from {host} {why}") from error
        finally:
            cut.cancel()
            pool.close()

    def _parts(self, url: str) -> tuple[str, str, int, str]:
        """-> scheme, host, port, and what is asked for there"""
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError:
            raise ValueError("the picture's address is not one") from None
        if any(ord(character) <= 32 or ord(character) > 126 for character in url):
            raise ValueError("the picture's address holds white space or characters that are not ASCII")
        if parts.scheme not in self.schemes:
            raise ValueError(f"pictures are fetched over {' or '.join(self.schemes)} only")
        if parts.username is not None or parts.password is not None or port not in (None, self.schemes[parts.scheme]):
            raise ValueError("the picture's address may have neither a user nor a port of its own")
        if host not in self.hosts:
            raise ValueError("this server does not fetch pictures from that host")
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return parts.scheme, host, self.schemes[parts.scheme], target

    def _address(self, host: str, port: int) -> str:
        try:
            found = [str(info[4][0]) for info in self.look_up(host, port, type=socket.SOCK_STREAM)]
        except OSError as error:
            raise ValueError(f"{host} has no address ({error.strerror})") from None
        if not found or not all(self.is_allowed(address) for address in found):
            raise ValueError(f"{host} is an address within a private network, where nothing is fetched from")
        return found[0]

    def _pool(self, scheme: str, host: str, address: str, port: int) -> urllib3.HTTPConnectionPool:
        """To this address, whatever the name says now; the certificate has to be the name's."""
        if scheme == "http":
            return urllib3.HTTPConnectionPool(address, port)
        return urllib3.HTTPSConnectionPool(
            address, port, server_hostname=host, assert_hostname=host, cert_reqs="CERT_REQUIRED"
        )


def _body(answer: urllib3.BaseHTTPResponse, host: str, max_bytes: int, until: float) -> bytes:
    """Raises ValueError where it is too long or takes too long."""
    raw = bytearray()
    while part := answer.read1(_PART, decode_content=False):  # what is there, however little: a drip meets the clock
        raw += part
        if len(raw) > max_bytes:
            raise ValueError(f"the picture at {host} has more than {max_bytes} bytes")
        if time.monotonic() >= until:
            break
    if time.monotonic() >= until:
        raise ValueError(f"the picture could not be fetched from {host} in time")
    return bytes(raw)


def _cut_at(pool: urllib3.HTTPConnectionPool, until: float) -> threading.Timer:
    """Ends the pool's one connection then: a time-out counts from byte to byte, and a head may come in drops."""
    sockets: list[socket.socket] = []

    class Noted(pool.ConnectionCls):  # type: ignore[name-defined]
        def connect(self) -> None:
            super().connect()
            sockets.append(self.sock)

    def cut() -> None:
        for one in sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    pool.ConnectionCls = Noted
    timer = threading.Timer(max(0.0, until - time.monotonic()), cut)
    timer.daemon = True
    timer.start()
    return timer
