"""
The page on this machine alone: at one path of 127.0.0.1, to a browser that asks for it by that name.

Reads no file and takes nothing in.
"""

from __future__ import annotations

import errno
import socketserver
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from sklformat.errors import InUseError
from sklformat.files.disk import make_place_of, write_atomically
from sklformat.settings.inspection import ViewConfig
from sklformat.views.page import policy

HOST = "127.0.0.1"
_SECONDS = 30  # that a browser may take for its request


@contextmanager
def opened(config: ViewConfig, page: bytes) -> Iterator[tuple[dict[str, Any], Callable[[], None]]]:
    """
    Write the page and open its port, each where the settings ask for it.

    Returns:
        Where it is, and what serves it until it is interrupted (does nothing where it is not to be served).

    Raises:
        InUseError: The port is taken.
        OSError: The page cannot be written, or the port not be had.
    """
    result: dict[str, Any] = {}
    out = config.out if config.out is not None or config.serve else Path("page.html")
    if not config.serve:
        assert out is not None
        make_place_of(out)
        write_atomically(out, page)
        yield {"page": str(out)}, lambda: None
        return
    with PageServer(page, config.port) as server:  # first, so that nothing is written where the port is taken
        if out is not None:
            make_place_of(out)
            write_atomically(out, page)
            result["page"] = str(out)
        yield {**result, "address": server.address}, server.serve


class PageServer(ThreadingHTTPServer):
    """
    A server of one page, on 127.0.0.1 and no other interface.

    Args:
        page: Its bytes.
        port: 0: one that is free.

    Raises:
        InUseError: The port is taken.
        OSError: The system does not give it.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, page: bytes, port: int) -> None:
        self.page = page
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise InUseError(
                    f"{HOST}:{port}: another program has this port; give another --port, or leave it out for a free one"
                ) from None
            raise OSError(error.errno, error.strerror, f"{HOST}:{port}") from None

    def server_bind(self) -> None:
        """Bind without the look-up of this machine's name that the library's class does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    @property
    def address(self) -> str:
        """What to give a browser."""
        return f"http://{HOST}:{self.server_port}/"

    def serve(self) -> None:
        """
        Answer until interrupted.

        Raises:
            KeyboardInterrupt: It was; says what ended.
        """
        try:
            self.serve_forever()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{self.address} is no longer served") from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hung up is no fault of the page; anything else is shown as the library does."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    server_version, sys_version = "sklformat", ""
    timeout = _SECONDS

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        port = self.server.server_port
        # A page of elsewhere whose name was made to point here still asks by that name.
        names = {f"{name}:{port}" for name in (HOST, "localhost")} | ({HOST, "localhost"} if port == 80 else set())
        status, kind, body = HTTPStatus.OK, "text/html", self.server.page
        if self.headers.get_all("Host", []) not in [[name] for name in names]:
            status, kind = HTTPStatus.MISDIRECTED_REQUEST, "text/plain"
            body = f"This page is at {self.server.address} and under no other name.\n".encode()
        elif self.path != "/":
            status, kind, body = HTTPStatus.NOT_FOUND, "text/plain", b"There is one page here, at /.\n"
        self.send_response(status)
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Content-Security-Policy": f"{policy()}; frame-ancestors 'none'",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the library's name
        """Nothing: what a browser asks for is no news."""
