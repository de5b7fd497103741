"""``sklformat view --serve``: to whom the page is given, under what name, and how it ends."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
from operation_data import write
from system import HANGS

from sklformat.cli import main
from sklformat.errors import InUseError
from sklformat.settings.inspection import ViewConfig
from sklformat.views import serving


@contextmanager
def served(page=b"<p>page"):
    with serving.PageServer(page, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def ask(port, path="/", verb="GET", host=None):
    """Status, headers and body of an answer; ``host``: by that name, or by several."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANGS)
    connection.putrequest(verb, path, skip_host=True)
    for name in (host,) if isinstance(host, str) else host if host is not None else (f"127.0.0.1:{port}",):
        connection.putheader("Host", name)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), body


def test_the_page_and_nothing_else():
    """It answers at its one path, allows a browser nothing from elsewhere, and takes nothing in."""
    with served() as port:
        status, headers, body = ask(port)
        assert (200, b"<p>page", "7") == (status, body, headers["Content-Length"])
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'sha256-")
        assert headers["Content-Security-Policy"].endswith("; frame-ancestors 'none'")
        assert ("nosniff", "no-store") == (headers["X-Content-Type-Options"], headers["Cache-Control"])
        assert "sklformat" == headers["Server"].strip()
        assert (200, b"") == ask(port, verb="HEAD")[::2]
        for path in ("/page.html", "/../etc/passwd", "/?", "/favicon.ico"):
            assert (404, b"There is one page here, at /.\n") == ask(port, path)[::2]
        assert 501 == ask(port, verb="POST")[0]


def test_other_names_are_turned_away():
    """A name that was made to point to this machine gets nothing of the page; nor does a request without one."""
    with served() as port:
        assert 200 == ask(port, host=f"localhost:{port}")[0]
        others = [
            "evil.example",
            f"evil.example:{port}",
            "127.0.0.1",
            f"127.0.0.1:{port + 1}",
            "",
            f"127.0.0.1.:{port}",
        ]
        for host in (*others, (), (f"127.0.0.1:{port}", "evil.example")):
            status, _, body = ask(port, host=host)
            assert (421, f"This page is at http://127.0.0.1:{port}/ and under no other name.\n") == (
                status,
                body.decode(),
            )


def test_a_browser_that_hangs_up_is_not_told_of(capfd):
    """What is cut off in the middle leaves no trace, and the next one is served."""
    with served(bytes(1 << 24)) as port:
        for sent in (b"", b"GET / HT", f"GET / HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()):
            with socket.create_connection(("127.0.0.1", port)) as one:
                one.sendall(sent)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # ends by a reset
        assert 200 == ask(port)[0]
    assert ("", "") == capfd.readouterr()


def test_no_other_interface():
    """Its socket is bound to 127.0.0.1, and an address of this machine's other interfaces is not answered."""
    with served() as port, socket.socket() as other:
        assert "127.0.0.1" == serving.HOST
        assert 0 != other.connect_ex(("127.0.0.2", port))


def test_a_port_in_use(tmp_path, capsys):
    """It is one line that names the port and what to do, and no page is written; so is a port that is not given."""
    path = str(write(tmp_path / "a", 1))
    with served() as port:
        assert 1 == main(["view", path, "--serve", "--port", str(port), "-o", str(tmp_path / "page.html")])
        said = f"127.0.0.1:{port}: another program has this port; give another --port, or leave it out for a free one"
        assert f"sklformat view: {said}\n" == capsys.readouterr().err
        assert not (tmp_path / "page.html").exists()
        with pytest.raises(InUseError, match="another program has this port"):
            serving.PageServer(b"", port)


def test_a_port_that_the_system_refuses(monkeypatch):
    """The error names the address."""

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("socketserver.TCPServer.server_bind", refuse)
    with pytest.raises(PermissionError, match=r"Permission denied: '127\.0\.0\.1:80'"):
        serving.PageServer(b"", 80)


def test_until_ctrl_c(tmp_path):
    """The verb says where the page is, serves what it wrote, and ends on Ctrl-C in one line with status 130."""
    out = tmp_path / "new" / "page.html"
    command = [sys.executable, "-m", "sklformat", "view", write(tmp_path / "a", 2), "--serve", "-o", out, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        result = json.loads("".join(iter(process.stdout.readline, "}\n")) + "}")
        assert (str(out), 2, out.stat().st_size) == (result["page"], result["sequences"], result["bytes"])
        port = int(result["address"].removeprefix("http://127.0.0.1:").removesuffix("/"))
        assert out.read_bytes() == ask(port)[2]
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=HANGS)[1]
    assert (130, f"sklformat view: http://127.0.0.1:{port}/ is no longer served\n") == (process.returncode, err)


def test_nothing_is_written_where_no_file_is_named(tmp_path, monkeypatch):
    """Served alone, the page leaves no file."""
    monkeypatch.chdir(tmp_path)
    with serving.opened(ViewConfig(caches=("a",), serve=True), b"page") as (result, _):
        assert ["address"] == list(result)
    assert [] == list(tmp_path.iterdir())
