"""What files and stores refuse, each refusal once by its own words."""

import pytest

import sklformat as skl
from sklformat.files import remote
from sklformat.files.directories import published
from sklformat.files.regular import check_exists

fsspec = pytest.importorskip("fsspec")

URL = "memory://refusals/x"


class Store(type(fsspec.filesystem("memory"))):
    """A store in memory that tells of a file what it is told to tell."""

    told = None

    def info(self, path, **kwargs):
        return super().info(path, **kwargs) | (self.told or {})


@pytest.fixture
def store(monkeypatch):
    """Through the real door; the file is 4 bytes long."""
    fs = Store()
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (fs, "/refusals/x"))
    fs.pipe_file("/refusals/x", b"1234")
    yield fs
    fs.rm("/refusals", recursive=True)


@pytest.mark.parametrize(
    ("told", "error", "message"),
    [
        ({"type": "directory"}, FileNotFoundError, f"{URL}: is a directory, not a file"),
        ({"size": None}, skl.RemoteError, f"{URL}: the store does not report the file's size; use another kind of"),
    ],
)
def test_what_a_store_tells(store, monkeypatch, told, error, message):
    """A store that tells of no file, or of no size, is not believed."""
    monkeypatch.setattr(Store, "told", told)
    with pytest.raises(error, match=message):
        remote.read(URL)


def test_nothing_in_the_store(store):
    """What is not there is named by its URL."""
    store.rm("/refusals/x")
    with pytest.raises(FileNotFoundError, match=f"{URL}: no such file in the store"):
        remote.size(URL)
    store.pipe_file("/refusals/x", b"")


def test_an_upload_that_is_not_kept(store, monkeypatch, tmp_path):
    """An upload of which the store tells another size is no upload."""
    (tmp_path / "x").write_bytes(b"1234")
    monkeypatch.setattr(Store, "told", {"size": 3})
    message = r"x: the upload of .*x was not kept: bytes 3 there, 4 here; .*x is kept, run the same command again"
    with pytest.raises(skl.RemoteError, match=message):
        remote.upload(tmp_path / "x", URL)


def test_paths(tmp_path):
    """A path that must be there, and one that must not."""
    with pytest.raises(FileNotFoundError, match=r"none: no such file or directory$"):
        check_exists(tmp_path / "none")
    with (
        pytest.raises(FileExistsError, match=f"{tmp_path} exists already; remove it or choose another path"),
        published(tmp_path),
    ):
        pass
