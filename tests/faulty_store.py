"""An S3 with faults: a proxy on loopback in front of a real one, with switches that a test sets while it runs.

    with faulty_store("http://127.0.0.1:5000") as store:   # pytest: the fixture `faulty`
        store.slow_down_every = 3
        ...
        assert store.requests["GET"] == 7

Processes reach it through `AWS_ENDPOINT_URL`, which the context manager sets to `store.url`. A process that has used
another endpoint keeps its clients: workers of Ray must be started, or given that variable, inside the block.
"""

import contextlib
import http.client
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from s3fs import S3FileSystem

ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code} of the faulty store</Message></Error>"
NOT_PASSED_ON = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}


class FaultyStore:
    """Switches are off at 0. "Every n-th" counts the requests that the fault is about, from when it was switched on."""

    def __init__(self, upstream: str) -> None:
        self.upstream = urlsplit(upstream).netloc
        self.slow_down_every = 0
        """503 SlowDown instead of doing what is asked."""
        self.deny_every = 0
        """403 AccessDenied instead of doing what is asked."""
        self.deny_paths = ""
        """403 AccessDenied to a GET of a key that has this in it."""
        self.cut_every = 0
        """The answer breaks off in its middle."""
        self.lose_put_reply_every = 0
        """A PUT is done, and the connection closed instead of an answer."""
        self.refuse: tuple[int, str] | None = None
        """All requests are answered with this status and error code."""
        self.ignores_conditions = False
        """A store that does not know If-None-Match, and says nothing."""
        self.lacks_conditions: tuple[int, str] | None = None
        """What the store answers to If-None-Match, such as (501, "NotImplemented")."""
        self.requests: Counter[str] = Counter()
        """By method: GET, HEAD, LIST, PUT, POST, DELETE. All that arrived, also those that were not done."""
        self.faults: Counter[str] = Counter()
        self.bytes_in = self.bytes_out = 0
        self.url = ""
        self._down_until = 0.0
        self._seen: Counter[str] = Counter()
        self._lock, self.one_put = threading.Lock(), threading.Lock()

    def down_for(self, seconds: float) -> None:
        """Closes every connection, old and new, without an answer."""
        self._down_until = time.monotonic() + seconds

    def is_down(self) -> bool:
        return time.monotonic() < self._down_until

    def forget(self) -> None:
        """Counters to zero."""
        with self._lock:
            self.requests.clear()
            self.faults.clear()
            self.bytes_in = self.bytes_out = 0

    def count(self, method: str, bytes_in: int) -> None:
        with self._lock:
            self.requests[method] += 1
            self.bytes_in += bytes_in

    def sent(self, count: int) -> None:
        with self._lock:
            self.bytes_out += count

    def falls_on(self, fault: str) -> bool:
        """Whether the fault happens to this request."""
        every = getattr(self, fault)
        with self._lock:
            self._seen[fault] = self._seen[fault] + 1 if every else 0
            happens = bool(every) and self._seen[fault] % every == 0
            self.faults[fault] += happens
        return happens


class _Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128
    store: FaultyStore

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return not self.store.is_down()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    server: _Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        store, body = self.server.store, self._body()
        method = self._method()
        store.count(method, len(body))
        if store.is_down():
            return self._hang_up()
        if store.refuse:
            return self._error(*store.refuse)
        if store.falls_on("slow_down_every"):
            return self._error(503, "SlowDown")
        if store.falls_on("deny_every"):
            return self._error(403, "AccessDenied")
        if store.deny_paths and method == "GET" and store.deny_paths in self.path:
            return self._error(403, "AccessDenied")
        if store.lacks_conditions and self.headers["If-None-Match"]:
            return self._error(*store.lacks_conditions)
        status, headers, answer = self._forward(body)
        if method == "PUT" and store.falls_on("lose_put_reply_every"):
            return self._hang_up()
        self._answer(status, headers, answer, cut=store.falls_on("cut_every"))

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _method(self) -> str:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query, keep_blank_values=True)
        lists = self.command == "GET" and ("list-type" in query or "/" not in parts.path.strip("/"))
        return "LIST" if lists else self.command

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(chunks)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """One new connection for each request: the server behind is slow, but never in a strange state."""
        dropped = NOT_PASSED_ON | ({"if-none-match"} if self.server.store.ignores_conditions else set())
        upstream = http.client.HTTPConnection(self.server.store.upstream, timeout=60)
        # moto looks and writes in two steps; S3 and its likes do it in one.
        with contextlib.closing(upstream), self.server.store.one_put if self.command == "PUT" else open(os.devnull):
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in dropped:
                    upstream.putheader(name, value)
            upstream.putheader("Content-Length", str(len(body)))
            upstream.endheaders(body or None)
            response = upstream.getresponse()
            data = response.read()
        headers = [(name, value) for name, value in response.getheaders() if name.lower() not in NOT_PASSED_ON]
        length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        return response.status, [*headers, ("Content-Length", length or "0")], data

    def _error(self, status: int, code: str) -> None:
        body = b"" if self.command == "HEAD" else ERROR.format(code=code).encode()
        self._answer(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))], body)

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self._headers_buffer.append(b"\r\n")  # type: ignore[attr-defined]
        head = b"".join(self._headers_buffer)  # type: ignore[attr-defined]
        self._headers_buffer = []
        whole = head + body
        if cut:
            whole = head + body[: len(body) // 2] if body else head[: len(head) // 2]
        self.server.store.sent(len(whole) - len(head))  # before the client has it, who may ask for the count at once
        self.wfile.write(whole)
        if cut:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def faulty_store(upstream: str) -> Iterator[FaultyStore]:
    """A store without faults yet, in front of the S3 at `upstream`; AWS_ENDPOINT_URL names it inside the block."""
    store = FaultyStore(upstream)
    server = _Server(("127.0.0.1", 0), _Handler)
    server.store, store.url = store, f"http://127.0.0.1:{server.server_port}"
    serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    serving.start()
    before = os.environ.get("AWS_ENDPOINT_URL")
    os.environ["AWS_ENDPOINT_URL"] = store.url
    S3FileSystem.clear_instance_cache()  # clients remember their endpoint
    try:
        yield store
    finally:
        S3FileSystem.clear_instance_cache()
        if before is None:
            del os.environ["AWS_ENDPOINT_URL"]
        else:
            os.environ["AWS_ENDPOINT_URL"] = before
        server.shutdown()
        server.server_close()
        serving.join()
