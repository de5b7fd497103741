"""remote: URLs are told from paths, ranges are exact, an upload is believed only when it comes back."""

import errno
import subprocess
import sys
import types
from pathlib import Path

import pytest

import sklformat as skl
from sklformat.files import remote
from sklformat.files.places import is_url, url_of

fsspec = pytest.importorskip("fsspec")

DATA = bytes(range(256)) * 400


@pytest.fixture
def store():
    """A directory in memory that no other test sees."""
    fs = fsspec.filesystem("memory")
    yield "memory://remote-test/cache"
    if fs.exists("/remote-test"):
        fs.rm("/remote-test", recursive=True)


@pytest.fixture
def local(tmp_path):
    path = tmp_path / "shard-00000.skl"
    path.write_bytes(DATA)
    return path


def test_urls_are_told_from_paths():
    """What has a scheme and two slashes is a URL; a Path made from one is refused, since it lost a slash."""
    for url in ("s3://b/c", "memory://x", "hf://datasets/a/b", "simplecache::s3://b/c", "file:///tmp/x"):
        assert is_url(url)
    for path in ("cache", "/tmp/a", "./s3/b", "C:/cache", "a:b", Path("cache"), Path("/tmp/a:b"), Path("C:/cache")):
        assert not is_url(path)
    with pytest.raises(ValueError, match="s3:/b/c: a URL must be given as a string"):
        is_url(Path("s3://b/c"))


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_what_is_uploaded_is_there(store, local, tmp_path, kind):
    """Size, digest, ranges and listing show the local file; directories are made where a store has them."""
    where = store if kind == "memory" else f"file://{tmp_path}/new/cache"
    url = url_of(where + "/", local.name)
    assert not remote.exists(url)
    assert [] == remote.list_names(where)
    remote.upload(local, url)
    assert remote.exists(url)
    assert len(DATA) == remote.size(url)
    assert DATA[1000:1300] == remote.read_range(url, 1000, 300)
    assert b"" == remote.read_range(url, 5, 0)
    assert DATA == remote.read(url)
    assert [local.name] == remote.list_names(where)
    local.write_bytes(b"other")
    remote.upload(local, url)
    assert b"other" == remote.read(url)
    assert b"other" == local.read_bytes()


def test_no_bucket_is_made(local):
    """An upload makes directories, but not the first of a path: a bucket whose name is mistyped is no new one."""
    with pytest.raises(skl.RemoteError, match="there is no /no-such-bucket in the store; make it, or correct the URL"):
        remote.upload(local, "file:///no-such-bucket/cache/x")
    assert not Path("/no-such-bucket").exists()


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_whether_a_directory_can_be_written_to(store, tmp_path, kind, monkeypatch):
    """A file is written and removed; where it may not be removed it stays; where nothing may be written is named."""
    where = store if kind == "memory" else f"file://{tmp_path}/new/cache"
    url = url_of(where, "mark")
    remote.check_writable(url)
    assert [] == remote.list_names(where)
    fs = type(fsspec.core.url_to_fs(url)[0])

    def refuse(*_args, **_settings):
        raise PermissionError("Access Denied")

    with monkeypatch.context() as patch:
        patch.setattr(fs, "rm_file", refuse)
        remote.check_writable(url)
    assert ["mark"] == remote.list_names(where)
    monkeypatch.setattr(fs, "pipe_file", refuse)
    with pytest.raises(skl.RemoteError, match=r"mark: cannot be written \(Access Denied\); fix the cause"):
        remote.check_writable(url)


def test_what_is_not_there_is_named(store):
    """A missing file is FileNotFoundError with its URL, whatever is asked of it."""
    url = url_of(store, "none")
    for ask in (remote.size, remote.read, lambda url: remote.digest(url, 4), lambda url: remote.read_range(url, 0, 4)):
        with pytest.raises(FileNotFoundError, match=url):
            ask(url)


def test_a_range_beyond_the_end_is_refused(store, local):
    """Fewer bytes than asked for are never given for all of them."""
    url = url_of(store, "x")
    remote.upload(local, url)
    message = rf"{url}: asked for 10 bytes from byte {len(DATA) - 4} on, got 4; the file has {len(DATA)} bytes there, "
    with pytest.raises(skl.RemoteError, match=message + f"which should be {len(DATA) + 6} or more: upload it again"):
        remote.read_range(url, len(DATA) - 4, 10)


@pytest.fixture
def answers(monkeypatch):
    """How many bytes of its next answers the store keeps back; and the waits, which are none."""
    kept_back, memory = [], type(fsspec.filesystem("memory"))
    cat_file = memory.cat_file

    def cut_short(self, path, start=None, end=None, **kwargs):
        data = cat_file(self, path, start, end, **kwargs)
        return data[: len(data) - kept_back.pop(0)] if kept_back else data

    monkeypatch.setattr(memory, "cat_file", cut_short)
    monkeypatch.setattr(remote, "_WAITS", (0.0, 0.0))
    return kept_back


def test_answers_that_are_cut_short_are_asked_for_again(store, local, answers):
    """A range, and what comes back of an upload, are right after an answer or two of fewer bytes."""
    url = url_of(store, "x")
    answers += [1, 7]
    remote.upload(local, url)
    assert [] == answers
    answers += [1, 300]
    assert DATA[1000:1300] == remote.read_range(url, 1000, 300)
    assert [] == answers


def test_a_store_that_always_cuts_short(store, local, answers):
    """It is asked a stated number of times, and then named."""
    url = url_of(store, "x")
    remote.upload(local, url)
    answers += [1, 2, 3, 4]
    with pytest.raises(skl.RemoteError, match=rf"{url}: asked 3 times for 300 bytes from byte 1000 on, got 297; the"):
        remote.read_range(url, 1000, 300)
    assert [4] == answers


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (lambda data: data[:-1], rf"bytes {len(DATA) - 1} there, {len(DATA)} here"),
        (lambda data: b"\1" + data[1:], "XXH3-128 .* there, .* here"),
        (lambda data: None, "bytes nothing there"),
    ],
)
def test_an_upload_that_does_not_come_back_is_an_error(store, local, monkeypatch, kept, message):
    """A store that keeps less, other bytes or nothing without a word is found out, and the local file stays."""
    memory = type(fsspec.filesystem("memory"))

    def put_file(self, source, path, **kwargs):
        data = kept(Path(source).read_bytes())
        if data is not None:
            self.pipe_file(path, data)

    monkeypatch.setattr(memory, "put_file", put_file)
    with pytest.raises(skl.RemoteError, match=message) as raised:
        remote.upload(local, url_of(store, "x"))
    assert f"{local} is kept" in str(raised.value)
    assert DATA == local.read_bytes()


def test_a_store_that_fails_is_one_error(store, local, monkeypatch):
    """Whatever a store's library raises becomes a RemoteError that names URL, cause and next action."""

    class OddError(Exception):
        pass

    def fail(self, *args, **kwargs):
        raise OddError("403\nForbidden")

    monkeypatch.setattr(remote, "_WAITS", ())

    for name, ask in (
        ("put_file", lambda url: remote.upload(local, url)),
        ("info", remote.exists),
        ("ls", remote.list_names),
        ("cat_file", lambda url: remote.read_range(url, 0, 1)),
        ("cat_file", lambda url: remote.digest(url, 1)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(type(fsspec.filesystem("memory")), name, fail)
            with pytest.raises(skl.RemoteError, match=rf"^{store}/x: cannot be .* \(403 Forbidden\); .*fix the cause"):
                ask(f"{store}/x")


def test_unknown_and_uninstalled_stores_are_named():
    """A scheme that fsspec does not know, and one whose package is not installed, say so."""
    with pytest.raises(skl.RemoteError, match=r"nostore://x: cannot be looked at \(Protocol not known: nostore"):
        remote.exists("nostore://x")
    code = """
import sys
sys.modules["s3fs"] = None
from sklformat.files import remote
from sklformat.files.places import is_url, url_of
remote.exists("s3://bucket/x")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "RemoteError: s3://bucket/x: cannot be looked at (Install s3fs" in done.stderr


def test_without_fsspec():
    """Without the extra, a URL is answered with the missing module's name, which the command line turns into advice."""
    code = """
import sys
sys.modules["fsspec"] = None
from sklformat.files import remote
from sklformat.files.places import is_url, url_of
assert not is_url("cache")
remote.exists("s3://bucket/x")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError" in done.stderr
    assert "fsspec" in done.stderr


@pytest.fixture
def failures(store, monkeypatch):
    """What the store's next calls raise, of whatever kind; and the waits, which are none."""
    coming, memory = [], type(fsspec.filesystem("memory"))

    def failing(plain):
        def method(self, *args, **kwargs):
            if coming:
                raise coming.pop(0)
            return plain(self, *args, **kwargs)

        return method

    for name in ("info", "ls", "cat_file", "put_file"):
        monkeypatch.setattr(memory, name, failing(getattr(memory, name)))
    monkeypatch.setattr(remote, "_WAITS", (0.0, 0.0))
    return coming


ASKED = {
    "size": lambda local, url: remote.size(url),
    "list_names": lambda local, url: remote.list_names(url.rpartition("/")[0]),
    "read_range": lambda local, url: remote.read_range(url, 0, 4),
    "upload": remote.upload,
}


@pytest.mark.parametrize("what", ASKED)
def test_what_may_pass_is_asked_again(store, local, failures, what):
    """Two failures that may pass, of any call, are not seen; a third is, and so is at once one that will not pass."""
    url = url_of(store, "x")
    remote.upload(local, url)
    expected = ASKED[what](local, url)
    for passing in (OSError(errno.EBUSY, "Service Unavailable"), TimeoutError(), Exception("a wrong checksum")):
        failures += [passing] * 2
        assert expected == ASKED[what](local, url)
        assert [] == failures
    failures += [OSError(errno.EBUSY, "Service Unavailable")] * 4
    with pytest.raises(skl.RemoteError, match="Service Unavailable"):
        ASKED[what](local, url)
    assert 1 == len(failures)
    for final in (PermissionError("No room"), ValueError("No room"), OSError(errno.ENOSPC, "No room")):
        failures[:] = [final] * 2
        with pytest.raises(skl.RemoteError, match="No room"):
            ASKED[what](local, url)
        assert 1 == len(failures)


def test_patience_ends(store, local, failures, monkeypatch):
    """After a minute of failing nothing is asked again."""
    url = url_of(store, "x")
    remote.upload(local, url)
    clock = iter([0.0, 61.0])
    monkeypatch.setattr(remote, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    failures += [TimeoutError("slow")] * 2
    with pytest.raises(skl.RemoteError, match="slow"):
        remote.size(url)
    assert 1 == len(failures)
