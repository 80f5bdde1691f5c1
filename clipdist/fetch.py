"""A URL -> bytes, safely: public addresses only, and caps on bytes, time and redirects.

A catalog is often written by others, so a URL in it may point at this machine or its network (server-side
request forgery). A name is resolved once, every answer must be a public address, and the checked address is
the one dialled: odd spellings (0x7f.1, [::ffff:127.0.0.1]) and names that change their answer gain nothing.
"""

from __future__ import annotations

import functools
import http.client
import io
import ipaddress
import queue
import re
import socket
import ssl
import threading
import time
from typing import Any, NamedTuple, cast
from urllib.parse import quote, urljoin, urlsplit

from clipdist import __version__

REASONS = (
    "bad_url",
    "private_address",
    "not_found",
    "http_status",
    "content_encoding",
    "timeout",
    "too_many_bytes",
    "too_many_redirects",
    "connection",
    "tls",
)

_PORTS = {"http": 80, "https": 443}
_MAX_URL = 8192
_SAFE = "%/:@!$&'()*+,;=~"  # what quote() leaves, besides letters, digits and "_.-"
_HOST = r"(?!.{254})([a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}|[0-9a-f:.]+"
_REDIRECTS = (301, 302, 303, 307, 308)
_TRANSIENT_STATUS = (408, 425, 429)  # and all from 500
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_UNICAST = ipaddress.IPv6Network("2000::/3")  # the only part of IPv6 that is given out to the public
# Not public, whatever is_global of this Python version says. The last one is the host of an Azure machine.
_NOT_PUBLIC = ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20", "168.63.129.16/32")
_DENIED = [ipaddress.ip_network(network) for network in _NOT_PUBLIC]


class FetchError(Exception):
    """A URL that gave no bytes. `reason` is one of REASONS; `transient`: trying again later may help."""

    def __init__(self, reason: str, message: str, transient: bool = False) -> None:
        super().__init__(reason, message, transient)  # all in args, so that it survives pickling
        self.reason = reason
        self.transient = transient

    def __str__(self) -> str:
        return str(self.args[1])


class _TooManyBytes(Exception):
    pass


class _Target(NamedTuple):
    scheme: str
    host: str  # ASCII, an IPv6 address without brackets
    port: int
    authority: str  # as in the Host header
    path: str  # percent-encoded
    query: str  # percent-encoded, with its "?"

    @property
    def shown(self) -> str:
        """For messages: without the query, which may hold a secret."""
        return f"{self.scheme}://{self.authority}{self.path}"[:200]


def fetch(
    url: str,
    *,
    max_bytes: int = 20 << 20,
    timeout_seconds: float = 20.0,
    max_redirects: int = 5,
    allow_private_hosts: bool = False,
) -> bytes:
    """The body behind an http or https URL; every redirect is checked like the URL itself.

    `timeout_seconds` bounds the whole call, name lookup and redirects included. Spaces and non-ASCII letters
    are encoded. Certificates are verified, proxies of the environment ignored, compressed answers refused.
    Raises FetchError.
    """
    deadline = time.monotonic() + timeout_seconds
    target = _parse(url)
    for _ in range(max_redirects + 1):
        try:
            body, location = _get(target, deadline, max_bytes, allow_private_hosts)
        except FetchError:
            raise
        except Exception as error:
            raise _failure(error, target, timeout_seconds, max_bytes) from error
        if location is None:
            return body
        target = _parse(location, base=f"{target.scheme}://{target.authority}{target.path}{target.query}")
    raise FetchError("too_many_redirects", f"more than {max_redirects} redirects; the next: {target.shown}")


def is_public(text: str) -> bool:
    """Whether an IP address is of the public internet, and so is an IPv4 address inside an IPv6 one."""
    address = ipaddress.ip_address(text.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        nat64 = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else None
        translated = address.ipv4_mapped or nat64
        if translated is not None:
            return is_public(str(translated))
        inside = [address.sixtofour, *(address.teredo or ())]
        if address not in _UNICAST or not all(is_public(str(part)) for part in inside if part):
            return False
    return address.is_global and not address.is_multicast and not any(address in net for net in _DENIED)


def _parse(url: str, base: str = "") -> _Target:
    if re.search(r"[\x00-\x1f\x7f]", url) or len(url) > _MAX_URL:
        raise FetchError("bad_url", f"the URL has control characters or is longer than {_MAX_URL} characters")
    try:
        parts = urlsplit(urljoin(base, url))
        host, port = (parts.hostname or "").rstrip("."), parts.port
        host = host if host.isascii() else host.encode("idna").decode("ascii")
        path, query = quote(parts.path or "/", _SAFE), quote(parts.query, _SAFE + "?")
        if ":" in host:
            ipaddress.IPv6Address(host)
    except ValueError:  # its text may hold credentials
        raise FetchError("bad_url", "not a valid URL; expected http(s)://host/path") from None
    if parts.scheme not in _PORTS:
        raise FetchError("bad_url", f"only http and https URLs are fetched, not {parts.scheme[:20]!r}")
    if "@" in parts.netloc:
        raise FetchError("bad_url", "a user name or password in a URL is not accepted")
    if not re.fullmatch(_HOST, host) or port == 0:
        raise FetchError("bad_url", "the URL has no valid host and port; expected http(s)://host/path")
    authority = f"[{host}]" if ":" in host else host
    authority += "" if port in (None, _PORTS[parts.scheme]) else f":{port}"
    query = f"?{query}" if query else ""
    return _Target(parts.scheme, host, port or _PORTS[parts.scheme], authority, path, query)


def _get(target: _Target, deadline: float, max_bytes: int, allow_private: bool) -> tuple[bytes, str | None]:
    """One request: its body and None, or nothing and where it redirects to."""
    addresses = _resolve(target.host, target.port, deadline)
    if not allow_private and not all(is_public(address) for address in addresses):
        what = "the host has an address that is not public; allow_private_hosts would permit it"
        raise FetchError("private_address", f"{target.shown}: {what}")
    sock = _dial(addresses, target.port, deadline)
    if target.scheme == "https":
        sock.settimeout(_left(deadline))
        sock = _tls().wrap_socket(sock, server_hostname=target.host)
    request = (
        f"GET {target.path}{target.query} HTTP/1.1\r\nHost: {target.authority}\r\n"
        f"User-Agent: clipdist/{__version__}\r\nAccept: */*\r\nAccept-Encoding: identity\r\n"
        "Connection: close\r\n\r\n"
    )
    stream = cast(socket.socket, _Stream(sock, deadline, max_bytes))
    with sock, http.client.HTTPResponse(stream, method="GET") as response:
        sock.settimeout(_left(deadline))
        sock.sendall(request.encode("ascii"))
        response.begin()
        location = response.headers.get("Location")
        if response.status in _REDIRECTS and location:  # http.client reads headers as latin-1
            return b"", location.encode("latin-1").decode("utf-8", "surrogateescape")
        _check_head(response, target)
        return _body(response, max_bytes), None


def _check_head(response: http.client.HTTPResponse, target: _Target) -> None:
    status = response.status
    if status in (404, 410):
        raise FetchError("not_found", f"{target.shown}: HTTP status {status}")
    if status != 200:
        transient = status >= 500 or status in _TRANSIENT_STATUS
        raise FetchError("http_status", f"{target.shown}: HTTP status {status}", transient)
    encoding = response.headers.get("Content-Encoding") or "identity"
    if encoding.strip().lower() != "identity":
        raise FetchError("content_encoding", f"{target.shown}: the answer is compressed ({encoding[:20]!r})")


def _body(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
    length = response.length  # None for a chunked or open-ended body
    if length is not None and length > max_bytes:
        raise _TooManyBytes
    body = bytearray()
    while chunk := response.read(1 << 16):
        body += chunk
        if len(body) > max_bytes:
            raise _TooManyBytes
    if length is not None and len(body) < length:
        raise http.client.IncompleteRead(b"", length - len(body))
    return bytes(body)


class _Stream(io.RawIOBase):
    """The socket as HTTPResponse reads it, with time and bytes counted in every read.

    This bounds a server that drips, and all that http.client reads in one go (headers, a chunk of size -1).
    """

    def __init__(self, sock: socket.socket, deadline: float, max_bytes: int) -> None:
        self._sock = sock
        self._deadline = deadline
        self._bytes_left = 2 * max_bytes + (1 << 20)  # room for headers and chunk sizes

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._sock.settimeout(_left(self._deadline))
        count = self._sock.recv_into(buffer)
        self._bytes_left -= count
        if self._bytes_left < 0:
            raise _TooManyBytes
        return count


def _resolve(host: str, port: int, deadline: float) -> list[str]:
    """All addresses of a name. In a thread, because the system's resolver knows no deadline."""
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask() -> None:
        try:
            results.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:
            results.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        result = results.get(timeout=_left(deadline))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(result, Exception):
        raise result
    return [str(address[0]) for *_, address in result]


def _dial(addresses: list[str], port: int, deadline: float) -> socket.socket:
    """Connect to the first address that answers; each gets its share of the time that is left."""
    problem = OSError("the name has no address")
    for tried, address in enumerate(addresses):
        try:  # with an address instead of a name, this asks no resolver
            return socket.create_connection((address, port), _left(deadline) / (len(addresses) - tried))
        except OSError as error:
            problem = error
    raise problem


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _left(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds


def _failure(error: Exception, target: _Target, timeout_seconds: float, max_bytes: int) -> FetchError:
    match error:
        case _TooManyBytes():
            return FetchError("too_many_bytes", f"{target.shown}: more than {max_bytes} bytes")
        case TimeoutError():
            return FetchError("timeout", f"{target.shown}: not done within {timeout_seconds} seconds", True)
        case socket.gaierror():
            again = error.errno == socket.EAI_AGAIN
            return FetchError("connection", f"{target.shown}: the name cannot be resolved", again)
        case ssl.SSLEOFError() | ssl.SSLZeroReturnError():
            return FetchError("connection", f"{target.shown}: the connection broke off", True)
        case ssl.SSLError():
            return FetchError("tls", f"{target.shown}: no trusted connection: {error}")
        case _:
            transient = isinstance(error, OSError | http.client.IncompleteRead)
            what = f"{type(error).__name__}: {error}"[:200]
            return FetchError("connection", f"{target.shown}: {what}", transient)
