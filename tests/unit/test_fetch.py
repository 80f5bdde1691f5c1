"""Fetching URLs: what arrives, what is refused, and that time, bytes and addresses are really bounded."""

import datetime
import ipaddress
import pickle
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pytest

from clipdist import fetch as fetching
from clipdist.fetch import FetchError, fetch, is_public

BODY = bytes(range(256)) * 100
PUBLIC = "93.184.216.34"


class Handler(BaseHTTPRequestHandler):
    """/redirect?<where> redirects; /status/<n> answers so; the rest by name below."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.close_connection = True
        self.server.seen.append((self.path, dict(self.headers)))  # type: ignore[attr-defined]
        parts = urlsplit(self.path)
        try:
            if parts.path == "/redirect":
                where = unquote(parts.query).encode().decode("latin-1")  # so raw UTF-8 goes over the wire
                self.answer(302, b"", Location=where)
            elif parts.path.startswith("/status/"):
                self.answer(int(parts.path.rpartition("/")[2]), b"body of an error")
            else:
                getattr(self, parts.path.strip("/").partition("/")[0].replace("-", "_"), self.body)()
        except OSError:
            pass  # the client has gone

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def loop(self) -> None:
        self.answer(301, b"", Location="/loop")

    def body(self) -> None:
        self.answer(200, BODY)

    def raw(self, *parts: bytes, pause: float = 0.0, repeat: int = 1) -> None:
        for part in parts * repeat:
            self.wfile.write(part)
            time.sleep(pause)

    def chunked(self) -> None:
        chunk = b"%x\r\n%s\r\n" % (len(BODY), BODY)
        self.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", chunk, chunk, b"0\r\n\r\n")

    def until_close(self) -> None:
        self.raw(b"HTTP/1.0 200 OK\r\n\r\n", BODY)

    def endless(self) -> None:
        self.raw(b"HTTP/1.1 200 OK\r\n\r\n")
        self.raw(b"x" * 65536, repeat=10_000)

    def endless_chunk(self) -> None:  # http.client reads a chunk of size -1 up to the end of the stream
        self.raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n")
        self.raw(b"x" * 65536, repeat=10_000)

    def declared(self) -> None:
        self.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n")
        time.sleep(2)

    def short(self) -> None:
        self.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nabc")

    def compressed(self) -> None:
        self.answer(200, b"\x1f\x8b", Content_Encoding="gzip")

    def drip(self) -> None:
        self.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        self.raw(b"x", pause=0.05, repeat=100)

    def drip_head(self) -> None:
        self.raw(b"H", pause=0.05, repeat=100)

    def continues(self) -> None:
        self.raw(b"HTTP/1.1 100 Continue\r\n\r\n", pause=0.01, repeat=500)

    def garbage(self) -> None:
        self.raw(b"SSH-2.0-OpenSSH_9.6\r\n")

    def nothing(self) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    seen: list[tuple[str, dict[str, str]]]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def started(tls: ssl.SSLContext | None = None) -> Server:
    server = Server(("127.0.0.1", 0), Handler)
    server.seen = []
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return server


@pytest.fixture
def server() -> Iterator[Server]:
    running = started()
    yield running
    running.shutdown()
    running.server_close()


Names = dict[str, list[str]]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    """Names and their addresses; every other name resolves as the system says."""
    table: Names = {"public.test": [PUBLIC]}
    real = socket.getaddrinfo

    def lookup(host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        if host not in table:
            return real(host, port, *args, **kwargs)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in table[host]]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    return table


@pytest.fixture
def dialled(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[str]:
    """The addresses that were dialled; the public one leads to the server of the test."""
    addresses: list[str] = []
    real = socket.create_connection

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        addresses.append(address[0])
        if address[0] == PUBLIC:
            server: Server = request.getfixturevalue("server")
            return real(("127.0.0.1", server.server_port), timeout)
        return real(address, timeout)

    monkeypatch.setattr(socket, "create_connection", connect)
    return addresses


def failure(url: str, **options: Any) -> FetchError:
    with pytest.raises(FetchError) as caught:
        fetch(url, **options)
    assert caught.value.reason in fetching.REASONS
    return caught.value


def local(url: str, **options: Any) -> FetchError:
    return failure(url, allow_private_hosts=True, **options)


# --- what arrives ---------------------------------------------------------------------------------


def test_bodies(server: Server) -> None:
    assert fetch(f"{server.url}/body", allow_private_hosts=True) == BODY
    assert fetch(f"{server.url}/chunked", allow_private_hosts=True) == BODY + BODY
    assert fetch(f"{server.url}/until-close", allow_private_hosts=True) == BODY
    assert fetch(f"{server.url}/redirect?/redirect%3F/body", allow_private_hosts=True) == BODY
    assert fetch(f"{server.url}/body", allow_private_hosts=True, max_bytes=len(BODY)) == BODY


def test_request(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:1")
    fetch(f"{server.url}/body?a=1&b=%2F#part", allow_private_hosts=True)
    path, headers = server.seen[0]
    assert path == "/body?a=1&b=%2F"
    assert headers["Host"] == f"127.0.0.1:{server.server_port}"
    assert headers["Accept-Encoding"] == "identity"
    assert headers["User-Agent"].startswith("clipdist/")


def test_spaces_and_korean_are_encoded(server: Server, names: Names) -> None:
    names["xn--3e0by8uoqv.test"] = ["127.0.0.1"]
    url = f"http://한국말.test:{server.server_port}/사진 1.jpg?이름=a b"
    assert fetch(url, allow_private_hosts=True) == BODY
    path, headers = server.seen[0]
    assert path == "/%EC%82%AC%EC%A7%84%201.jpg?%EC%9D%B4%EB%A6%84=a%20b"
    assert headers["Host"] == f"xn--3e0by8uoqv.test:{server.server_port}"


def test_redirect_with_raw_utf8(server: Server) -> None:
    assert fetch(f"{server.url}/redirect?/사진", allow_private_hosts=True) == BODY
    assert server.seen[-1][0] == "/%EC%82%AC%EC%A7%84"


def test_next_address_when_one_does_not_answer(server: Server, names: Names) -> None:
    names["two.test"] = ["127.0.0.2", "127.0.0.1"]  # nothing listens at the first
    assert fetch(f"http://two.test:{server.server_port}/body", allow_private_hosts=True) == BODY


# --- addresses ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "0x7f.1",
        "0177.0.0.1",
        "0",
        "localhost",
        "LOCALHOST.",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "①②⑦.⓪.⓪.①",
        "10.0.0.1",
        "169.254.169.254",
        "100.100.100.200",
        "[fd00:ec2::254]",
        "224.0.0.1",
    ],
)
def test_private_hosts_are_never_dialled(host: str, dialled: list[str], server: Server) -> None:
    error = failure(f"http://{host}:{server.server_port}/body")
    assert error.reason in ("private_address", "connection"), "connection: a spelling this system cannot resolve"
    assert not error.transient
    assert dialled == []
    assert server.seen == []


def test_private_control(server: Server, dialled: list[str]) -> None:
    """The same spellings do reach the server when private hosts are allowed."""
    for host in ("127.0.0.1", "127.1", "2130706433", "0x7f000001", "localhost"):
        assert fetch(f"http://{host}:{server.server_port}/body", allow_private_hosts=True) == BODY
    assert len(dialled) == 5


@pytest.mark.parametrize(
    "inside", ["127.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1", "fe80::1%eth0", "0.0.0.0"]
)
def test_public_names_of_private_addresses_are_never_dialled(inside: str, names: Names, dialled: list[str]) -> None:
    """As 7f000001.nip.io and localtest.me are; what a name looks like says nothing."""
    names["7f000001.nip.test"] = [inside]
    assert failure("http://7f000001.nip.test/body").reason == "private_address"
    assert dialled == []


def test_every_answer_must_be_public(names: Names, dialled: list[str]) -> None:
    names["mixed.test"] = [PUBLIC, "10.0.0.1"]
    assert failure("http://mixed.test/body").reason == "private_address"
    assert dialled == []


def test_name_that_changes_its_answer(monkeypatch: pytest.MonkeyPatch, dialled: list[str], server: Server) -> None:
    answers = iter([PUBLIC, "127.0.0.1"])
    real = socket.getaddrinfo

    def lookup(host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        host = next(answers) if host == "rebinding.test" else host
        return real(host, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    assert fetch(f"http://rebinding.test:{server.server_port}/body") == BODY
    assert dialled == [PUBLIC], "the checked address, not what the name says now"
    assert next(answers) == "127.0.0.1", "the name was asked for once"


def test_name_that_changes_its_answer_between_redirects(
    monkeypatch: pytest.MonkeyPatch, dialled: list[str], server: Server
) -> None:
    answers = iter([PUBLIC, "127.0.0.1"])
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *args, **kwargs: real(next(answers) if host == "twice.test" else host, *args, **kwargs),
    )
    url = f"http://twice.test:{server.server_port}"
    assert failure(f"{url}/redirect?{url}/body").reason == "private_address"
    assert dialled == [PUBLIC]


def test_encoded_line_ends_stay_encoded(server: Server) -> None:
    """In a path, a query, and where a redirect leads: no header is added, no second request sent."""
    wanted = "/a%0d%0aX-Injected:%201%0d%0a%0d%0aGET%20/b?c=%0D%0AHost:%20d"
    for url in (wanted, f"/redirect?{quote(wanted)}"):
        assert fetch(server.url + url, allow_private_hosts=True) == BODY
        path, headers = server.seen[-1]
        assert path == wanted
        assert "X-Injected" not in headers
    assert len(server.seen) == 3


def test_redirects_are_checked_like_urls(names: Names, dialled: list[str], server: Server) -> None:
    assert fetch("http://public.test/redirect?/body") == BODY, "control: a redirect to a public host"
    for where, reason in (
        ("file:///etc/passwd", "bad_url"),
        ("gopher://public.test/", "bad_url"),
        (f"{server.url}/body", "private_address"),
        (f"//127.0.0.1:{server.server_port}/body", "private_address"),
        (f"http://[::ffff:127.0.0.1]:{server.server_port}/body", "private_address"),
        ("http://user:secret@public.test/", "bad_url"),
        ("http://[::1/", "bad_url"),
        ("http://10.0.0.1/", "private_address"),
    ):
        error = failure(f"http://public.test/redirect?{where}")
        assert error.reason == reason, where
        assert "secret" not in str(error)
    assert set(dialled) == {PUBLIC}
    assert all(path != "/body" for path, _ in server.seen[2:])


def test_is_public() -> None:
    for text in (PUBLIC, "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"):
        assert is_public(text), text
    private = "0.0.0.0 10.1.2.3 127.0.0.1 100.64.0.1 169.254.1.1 172.16.0.1 192.0.0.192 192.168.0.1 192.88.99.1"
    private += " 198.18.0.1 203.0.113.5 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255 168.63.129.16"
    private += " :: ::1 ::7f00:1 ::ffff:10.0.0.1 64:ff9b::a00:1 64:ff9b:1::808:808 100::1 2001::1 2001:db8::1"
    private += " 2002:a00:1:: 2002:7f00:1:: 3fff::1 5f00::1 fc00::1 fe80::1 fe80::1%eth0 fec0::1 ff0e::1"
    for text in private.split():
        assert not is_public(text), text


# --- URLs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "",
        "picture.jpg",
        "/etc/passwd",
        "file:///etc/passwd",
        "ftp://public.test/a",
        "data:image/png;base64,AAAA",
        "http://",
        "http:///path",
        "http://public.test:0/",
        "http://public.test:99999/",
        "http://public.test:80:80/",
        "http://public@127.0.0.1/",
        "http://user:secret@public.test/",
        "http://@public.test/",
        "http://public.test\\@127.0.0.1/",
        "http://127.0.0.1\\.public.test/",
        "http://public.test/a\r\nX-Injected: 1",
        "http://public.test\r\n/",
        "http://public.test/a\tb",
        "http://public.test/\x00",
        "http://%31%32%37.0.0.1/",
        "http://public test/",
        "http://public..test/",
        "http://" + "a" * 64 + ".test/",
        "http://[fe80::1%25eth0]/",
        "http://[::1/",
        "http://public.test/" + "a" * 10_000,
        "http://public.test/\ud800",
    ],
)
def test_bad_urls(url: str, names: Names, dialled: list[str]) -> None:
    error = failure(url, allow_private_hosts=True)
    assert error.reason == "bad_url"
    assert not error.transient
    assert dialled == []
    assert "secret" not in str(error)


# --- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "reason", "transient"),
    [
        ("/status/404", "not_found", False),
        ("/status/410", "not_found", False),
        ("/status/403", "http_status", False),
        ("/status/204", "http_status", False),
        ("/status/302", "http_status", False),  # without a place to go to
        ("/status/429", "http_status", True),
        ("/status/500", "http_status", True),
        ("/status/503", "http_status", True),
        ("/compressed", "content_encoding", False),
        ("/short", "connection", True),
        ("/nothing", "connection", True),
        ("/garbage", "connection", False),
    ],
)
def test_refused_answers(path: str, reason: str, transient: bool, server: Server) -> None:
    error = local(f"{server.url}{path}?token=SECRET")
    assert (error.reason, error.transient) == (reason, transient)
    assert "SECRET" not in str(error)
    assert f"{server.url}{path}" in str(error)


def test_redirect_limit(server: Server) -> None:
    chain = "/body"
    for _ in range(3):
        chain = "/redirect?" + chain.replace("%", "%25").replace("?", "%3F")
    assert fetch(server.url + chain, allow_private_hosts=True, max_redirects=3) == BODY
    assert local(server.url + chain, max_redirects=2).reason == "too_many_redirects"
    server.seen.clear()
    assert local(f"{server.url}/loop").reason == "too_many_redirects"
    assert len(server.seen) == 6, "the first request and five redirects"


@pytest.mark.parametrize("path", ["/endless", "/endless-chunk", "/declared", "/body", "/chunked"])
def test_bytes_are_bounded(path: str, server: Server) -> None:
    start = time.monotonic()
    error = local(server.url + path, max_bytes=len(BODY) - 1)
    assert (error.reason, error.transient) == ("too_many_bytes", False)
    assert time.monotonic() - start < 1.5


@pytest.mark.parametrize("path", ["/drip", "/drip-head", "/continues"])
def test_total_time_is_bounded(path: str, server: Server) -> None:
    """Every single read is quick here, so a timeout per read would never fire."""
    start = time.monotonic()
    error = local(server.url + path, timeout_seconds=0.4)
    assert (error.reason, error.transient) == ("timeout", True)
    assert time.monotonic() - start < 1.5


def test_slow_name_lookup_and_silent_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        error = local(f"http://127.0.0.1:{silent.getsockname()[1]}/", timeout_seconds=0.3)
        assert (error.reason, error.transient) == ("timeout", True)
        port = silent.getsockname()[1]
        assert local(f"https://127.0.0.1:{port}/", timeout_seconds=0.3).reason == "timeout", "in the handshake"
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(3))
    assert local("http://slow.test/", timeout_seconds=0.3).reason == "timeout"


def test_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    error = local(f"http://127.0.0.1:{port}/")
    assert (error.reason, error.transient) == ("connection", True)
    for code, transient in ((socket.EAI_NONAME, False), (socket.EAI_AGAIN, True)):

        def lookup(*_: Any, code: int = code, **__: Any) -> None:
            raise socket.gaierror(code, "no such name")

        monkeypatch.setattr(socket, "getaddrinfo", lookup)
        error = local("http://nowhere.test/")
        assert (error.reason, error.transient) == ("connection", transient)


def test_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(FetchError("timeout", "too slow", True)))
    assert (type(error), error.reason, error.transient, str(error)) == (
        FetchError,
        "timeout",
        True,
        "too slow",
    )


# --- TLS ------------------------------------------------------------------------------------------


@pytest.fixture
def certificate(tmp_path: Path) -> Callable[[str], Path]:
    """Writes key and self-signed certificate of a name into one file."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def write(name: str) -> Path:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        day = datetime.timedelta(days=1)
        builder = x509.CertificateBuilder(subject, subject, key.public_key(), 1, now - day, now + day)
        names = x509.SubjectAlternativeName([x509.DNSName(name)])
        built = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
        file = tmp_path / f"{name}.pem"
        file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + built.public_bytes(serialization.Encoding.PEM)
        )
        return file

    return write


def test_tls(certificate: Callable[[str], Path], names: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    file = certificate("pictures.test")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    asked: list[str | None] = []
    context.sni_callback = lambda _, name, __: asked.append(name)
    running = started(tls=context)
    names["pictures.test"] = names["other.test"] = ["127.0.0.1"]
    try:
        url = f"https://pictures.test:{running.server_port}/body"
        assert local(url).reason == "tls", "nobody vouches for it"
        trusting = ssl.create_default_context(cafile=str(file))
        monkeypatch.setattr(fetching, "_tls", lambda: trusting)
        assert fetch(url, allow_private_hosts=True) == BODY
        assert asked[-1] == "pictures.test", "the name is sent although an address is dialled"
        error = local(url.replace("pictures", "other"))
        assert (error.reason, error.transient) == ("tls", False), "the certificate is of another name"
        assert local(f"http://pictures.test:{running.server_port}/").reason == "connection"
    finally:
        running.shutdown()
        running.server_close()


def test_plain_server_behind_https(server: Server) -> None:
    assert local(server.url.replace("http:", "https:") + "/body").reason == "tls"


def test_default_context_verifies() -> None:
    context = fetching._tls()
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname
    assert ipaddress.ip_address(PUBLIC).is_global
