"""A reverse proxy on loopback before a real S3 server: it counts what goes through, and breaks what it is told to break."""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

Fault = Literal["expired", "skewed", "busy", "lost", "refuse", "hang"]
"""`expired`: the credentials are. `skewed`: the client's clock is. `busy`: 503. `lost`: the server does as it is told, and its answer does not arrive.
`refuse`: the connection is cut. `hang`: nothing comes for as long as the proxy lives."""

Headers = list[tuple[str, str]]

_CODES = {"expired": (403, "ExpiredToken"), "skewed": (403, "RequestTimeTooSkewed"), "busy": (503, "SlowDown")}
_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "content-length"}


@dataclass(frozen=True)
class Request:
    """What somebody asked for.

    Attributes:
        verb: of HTTP.
        key: bucket and key.
        listing: whether it asks for names and not for an object.
        start: first byte of the range that is wanted; -1 without a range.
        conditional: whether it may only create.
    """

    verb: str
    key: str
    listing: bool
    start: int
    conditional: bool


@dataclass
class Proxy:
    """What has gone through, since it was started or cleared.

    Attributes:
        endpoint: URL for clients.
        tensor_bytes: bucket and key of a shard → bytes of its tensors that were sent; of objects outside `_parts` alone.
        header_bytes: the same for ranges that begin in the header: looks at the object, and reads of headers.
        listings: how many.
        creations: key → how often a create-only put of it was accepted, and how often refused.
        fault: what to do to a request; None for nothing.
        delay: seconds that a request is held up.
        passed_on: (verb, path, headers, body) of a request → the headers that the server gets.
        passed_back: the same for the headers of an answer.
    """

    endpoint: str = ""
    tensor_bytes: Counter[str] = field(default_factory=Counter)
    header_bytes: Counter[str] = field(default_factory=Counter)
    listings: int = 0
    creations: Counter[tuple[str, bool]] = field(default_factory=Counter)
    fault: Callable[[Request], Fault | None] = lambda _: None
    delay: Callable[[Request], float] = lambda _: 0.0
    passed_on: Callable[[str, str, Headers, bytes], Headers] = lambda _verb, _path, headers, _body: headers
    passed_back: Callable[[Headers], Headers] = lambda headers: headers
    requests: list[Request] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)
    _ends: dict[str, int] = field(default_factory=dict)  # shard → where its header ends
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def clear(self) -> None:
        """Count from here on."""
        with self._lock:
            for counter in (self.tensor_bytes, self.header_bytes, self.creations):
                counter.clear()
            self.requests.clear()
            self.listings = 0

    def created(self, pattern: str = "") -> dict[str, int]:
        """Keys that contain a regular expression → how often they were created."""
        with self._lock:
            return {key: n for (key, made), n in self.creations.items() if made and re.search(pattern, key)}

    def refused(self, pattern: str = "") -> dict[str, int]:
        """Keys that contain a regular expression → how often somebody wanted to create them, and found them there."""
        with self._lock:
            return {key: n for (key, made), n in self.creations.items() if not made and re.search(pattern, key)}

    def came(self, request: Request) -> Fault | None:
        """Note a request, and tell what is to happen to it."""
        with self._lock:
            self.requests.append(request)
            self.listings += request.listing
            return self.fault(request)

    def answered(self, request: Request, status: int, body: bytes) -> None:
        """Note an answer."""
        with self._lock:
            if request.conditional:
                self.creations[request.key, status < 300] += 1
            shard = request.key.endswith(".safetensors") and "/_parts/" not in request.key
            if request.verb != "GET" or status >= 300 or not shard:
                return
            if request.start <= 0 and len(body) > 8:
                self._ends[request.key] = 8 + int.from_bytes(body[:8], "little")
            behind = request.start >= self._ends.get(request.key, 1)
            (self.tensor_bytes if behind else self.header_bytes)[request.key] += len(body)


@contextlib.contextmanager
def running_proxy(upstream: str) -> Iterator[Proxy]:
    """A proxy before the server at this URL, on a free port of loopback."""
    proxy = Proxy()
    host = urlsplit(upstream).netloc
    handler = type("Handler", (_Handler,), {"proxy": proxy, "upstream": host})
    with _Server(("127.0.0.1", 0), handler) as server:
        proxy.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.closing.set()
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are not this test's business."""


class _Handler(BaseHTTPRequestHandler):
    """One client's connection, with a connection of its own to the server."""

    protocol_version = "HTTP/1.1"
    proxy: Proxy
    upstream: str

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._behind = http.client.HTTPConnection(self.upstream, timeout=60)

    def finish(self) -> None:
        self._behind.close()
        super().finish()

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = self._described()
        fault = self.proxy.came(request)
        self.proxy.closing.wait(self.proxy.delay(request))
        if fault in {"refuse", "hang"}:
            if fault == "hang":
                self.proxy.closing.wait()
            self._cut()
            return
        if fault in _CODES:
            self._refuse(*_CODES[fault])
            return
        status, headers, answer = self._forwarded(body)
        self.proxy.answered(request, status, answer)
        if fault == "lost":
            self._cut()
            return
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if "content-length" not in {name.lower() for name, _ in headers}:
            self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass  # noqa: N815 (the base class calls them so)

    def _described(self) -> Request:
        parts = urlsplit(self.path)
        found = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return Request(
            self.command,
            unquote(parts.path).strip("/"),
            "list-type" in parts.query or "uploads" in parts.query,
            int(found[1]) if found else -1,
            self.headers.get("If-None-Match") == "*",
        )

    def _forwarded(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        self._behind.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.proxy.passed_on(self.command, self.path, list(self.headers.items()), body):
            if name.lower() not in _HOP:  # the host stays: it is signed
                self._behind.putheader(name, value)
        self._behind.putheader("Content-Length", str(len(body)))
        self._behind.endheaders(body)
        answer = self._behind.getresponse()
        # A HEAD's length is that of the body that it does not have.
        kept = _HOP - {"content-length"} if self.command == "HEAD" else _HOP
        headers = self.proxy.passed_back(answer.getheaders())
        return answer.status, [item for item in headers if item[0].lower() not in kept], answer.read()

    def _refuse(self, status: int, code: str) -> None:
        told = (
            f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>as the test wants it</Message></Error>".encode()
        )
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(told)

    def _cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
