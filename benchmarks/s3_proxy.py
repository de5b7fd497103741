"""
An S3 store on localhost whose traffic is counted, delayed and disturbed: moto's server in a process of its own, and a
proxy between it and the clients.

What the proxy does to a request is said by a plan, a function of the request; without one it only counts.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

BUCKET = "caches"
REFUSALS = {
    "slow down": (503, b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"),
    "forbidden": (403, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"),
}

Kind = Literal["GET", "HEAD", "PUT", "PART", "BEGIN", "COMPLETE", "LIST", "DELETE", "OTHER"]
Fault = Literal["slow down", "forbidden", "stall", "cut", "short", "lost"]
"""
slow down, forbidden: 503 and 403, the server is not asked.  stall: no answer until the client gives up.  cut: a body
that ends before the length that its header says.  short: a body of fewer bytes, whose header says so.  lost: the server
does what it is asked, and the connection ends without its answer.
"""


@dataclass(frozen=True)
class Request:
    """
    A request of a client.

    Attributes:
        number: Of its arrival.
        kind: What it asks for.
        key: Of the object, or prefix of the listing.
        span: Its Range header, or "".
        sent: Bytes of its body.
    """

    number: int
    kind: Kind
    key: str
    span: str
    sent: int


Plan = Callable[[Request], Fault | None]


def seeded(seed: int, share: float, faults: tuple[Fault, ...], *, in_a_row: int = 1) -> Plan:
    """Disturb this share of requests, but what asks for the same at most so many times in a row."""
    rng, lock, row = random.Random(seed), threading.Lock(), Counter[tuple[str, str, str]]()

    def plan(request: Request) -> Fault | None:
        what = request.kind, request.key, request.span
        with lock:
            strikes, fault = rng.random() < share, rng.choice(faults)
            if not strikes or row[what] == in_a_row:
                row[what] = 0
                return None
            row[what] += 1
            return fault

    return plan


class Proxy(ThreadingHTTPServer):
    """
    Between clients and the server on a port of this machine.

    Attributes:
        plan: What befalls each request; None: nothing.
        delay: Seconds that each answer waits.
        answered: Of each kind, requests that reached the proxy.
        received: Of each kind, bytes of bodies that went to the client.
        sent: Of each kind, bytes of bodies that came from the client.
        struck: Of each fault, how many.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.backend = port
        self.plan: Plan | None = None
        self.delay = 0.0
        self._numbers, self._lock = itertools.count(), threading.Lock()
        self._frozen: dict[str, str] | None = None
        self.clear()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def clear(self) -> None:
        """Count from zero."""
        self.answered, self.received, self.sent = Counter[str](), Counter[str](), Counter[str]()
        self.struck = Counter[str]()

    def freeze_listing(self) -> None:
        """From now on listings show what is there now: neither what comes nor what goes."""
        status, _, body = self.ask("GET", f"/{BUCKET}?list-type=2", {}, b"")
        assert status == http.client.OK, body
        self._frozen = {_key_of(entry): entry for entry in _ENTRY.findall(body.decode())}

    def thaw_listing(self) -> None:
        """Listings show what is there."""
        self._frozen = None

    def ask(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        """What the server answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.backend)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def note(self, kind: Kind, key: str, span: str, sent: int) -> tuple[Request, Fault | None]:
        with self._lock:
            self.answered[kind] += 1
            self.sent[kind] += sent
            request = Request(next(self._numbers), kind, key, span, sent)
        fault = None if self.plan is None else self.plan(request)
        if fault is not None:
            with self._lock:
                self.struck[fault] += 1
        return request, fault

    def gave(self, kind: Kind, count: int) -> None:
        with self._lock:
            self.received[kind] += count

    def listed(self, body: bytes, prefix: str) -> bytes:
        """A listing as it was when it was frozen, if it was."""
        if self._frozen is None:
            return body
        shown = [entry for key, entry in self._frozen.items() if key.startswith(prefix)]
        text = re.sub(r"<KeyCount>\d+</KeyCount>", f"<KeyCount>{len(shown)}</KeyCount>", _ENTRY.sub("", body.decode()))
        return text.replace("</ListBucketResult>", "".join(shown) + "</ListBucketResult>").encode()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone is nothing to tell of."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


_ENTRY = re.compile(r"<Contents>.*?</Contents>", re.DOTALL)


def _key_of(entry: str) -> str:
    found = re.search(r"<Key>(.*?)</Key>", entry)
    assert found is not None
    return found[1]


class _Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        body = self._body()
        path = urllib.parse.urlsplit(self.path)
        words = dict(urllib.parse.parse_qsl(path.query, keep_blank_values=True))
        key = urllib.parse.unquote(path.path.lstrip("/").partition("/")[2])
        kind = self._kind(key, words)
        request, fault = self.server.note(kind, words.get("prefix", key), self.headers.get("Range", ""), len(body))
        if self.server.delay:
            time.sleep(self.server.delay)
        if fault in REFUSALS:
            status, refusal = REFUSALS[fault]
            self._send(status, {"Content-Type": "application/xml"}, refusal)
            return
        if fault == "stall":
            with contextlib.suppress(ConnectionError):
                self.connection.recv(1)  # returns when the client has closed
            self.close_connection = True
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _BETWEEN}
        status, found, data = self.server.ask(self.command, self.path, headers, body)
        if fault == "lost":
            self.close_connection = True
            return
        if kind == "LIST":
            data = self.server.listed(data, words.get("prefix", ""))
        if fault == "short":
            data = data[: len(data) // 2]
        kept = {name: value for name, value in found.items() if name.lower() not in _BETWEEN}
        if kind == "HEAD":
            kept["Content-Length"] = found.get("Content-Length", "0")
        self.server.gave(request.kind, len(data) // 2 if fault == "cut" else len(data))
        self._send(status, kept, data, cut=fault == "cut")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer  # noqa: N815  the names that the parent calls

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _kind(self, key: str, words: dict[str, str]) -> Kind:
        if self.command == "GET" and not key:
            return "LIST"
        if "partNumber" in words:
            return "PART"
        if self.command == "POST" and ("uploads" in words or "uploadId" in words):
            return "BEGIN" if "uploads" in words else "COMPLETE"
        return self.command if self.command in ("GET", "HEAD", "PUT", "DELETE") else "OTHER"  # type: ignore[return-value]

    def _send(self, status: int, headers: dict[str, str], body: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.wfile.flush()
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the parent's name
        """Say nothing."""


_BETWEEN = {"connection", "content-length", "date", "expect", "server", "transfer-encoding"}


@contextlib.contextmanager
def serving() -> Iterator[Proxy]:
    """A store with an empty bucket, behind a proxy; ``environment`` leads to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["-c", "import sys; from moto.server import main; main(sys.argv[1:])", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    proxy = Proxy(port)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    try:
        _wait_for(port, server)
        thread.start()
        status, _, body = proxy.ask("PUT", f"/{BUCKET}", {}, b"")
        assert status == http.client.OK, body
        yield proxy
    finally:
        if thread.is_alive():
            proxy.shutdown()
        proxy.server_close()
        server.kill()
        server.wait()


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    while True:
        assert server.poll() is None, "moto's server has ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)


def environment(proxy: Proxy) -> dict[str, str]:
    """What a process needs to find the store."""
    return {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": proxy.url,
        "NO_PROXY": "127.0.0.1",
    }


def enter(proxy: Proxy) -> None:
    """Let this process find the store."""
    os.environ.update(environment(proxy))
