"""verify of a URL finds what it finds in a directory, reads each byte once, and keeps little of it in memory."""

import dataclasses

import pytest
from strategies import make_listed_cache

import sklformat as skl
from sklformat.cache.manifest import MANIFEST_NAME
from sklformat.files import remote, storage

fsspec = pytest.importorskip("fsspec")

URL = "memory://verify-test/cache"
ROOT = "/verify-test/cache"


@pytest.fixture
def local(tmp_path):
    return make_listed_cache(tmp_path / "cache")


@pytest.fixture
def store():
    fs = fsspec.filesystem("memory")
    yield fs
    if fs.exists("/verify-test"):
        fs.rm("/verify-test", recursive=True)


def upload(store, local):
    if store.exists(ROOT):
        store.rm(ROOT, recursive=True)
    for path in local.iterdir():
        store.pipe_file(f"{ROOT}/{path.name}", path.read_bytes())


def test_each_byte_is_read_once(store, local, monkeypatch):
    """A sound cache, its shards in many pieces: no problem, no byte of a shard asked for twice, three pieces kept."""
    monkeypatch.setattr(storage, "PIECE", 512)
    upload(store, local)
    asked, kept, told, plain = [], [], [], remote.read_range

    def read_range(url, offset, length):
        asked.append((url.rpartition("/")[2], offset, length))
        return plain(url, offset, length)

    class Watched(storage.StreamedFile):
        def read_into(self, offset, out):
            super().read_into(offset, out)
            kept.append(len(self._pieces))

    monkeypatch.setattr(remote, "read_range", read_range)
    monkeypatch.setattr("sklformat.cache.report.StreamedFile", Watched)
    assert [] == skl.verify(URL + "/", lambda done, total: told.append((done, total)))
    total = sum(path.stat().st_size for path in local.glob("*.skl"))
    assert (total, total) == told[-1]
    shards = [piece for piece in asked if piece[0] != MANIFEST_NAME]
    assert len(set(shards)) == len(shards) > 20
    assert total == sum(length for *_, length in shards)
    assert 3 == max(kept)
    assert [] == skl.verify(f"{URL}/shard-00001.skl")


def test_the_manifest_is_asked_for_once(store, local, monkeypatch):
    """Its size and its bytes, whatever is made of them; sound, damaged or missing."""
    asked = []

    def asking(name, plain):
        def ask(self, path, *rest, **named):
            asked.append((name, path))
            return plain(self, path, *rest, **named)

        return ask

    for name in ("info", "cat_file"):
        monkeypatch.setattr(type(store), name, asking(name, getattr(type(store), name)))
    path = f"{ROOT}/{MANIFEST_NAME}"
    upload(store, local)
    assert [] == skl.verify(URL)
    assert (1, 1) == (asked.count(("info", path)), asked.count(("cat_file", path)))
    store.pipe_file(path, b"{")
    asked.clear()
    assert ["CorruptError"] == [problem.error for problem in skl.verify(URL)]
    assert (1, 1) == (asked.count(("info", path)), asked.count(("cat_file", path)))
    store.rm(path)
    asked.clear()
    assert ["UnfinishedError"] == [problem.error for problem in skl.verify(URL)]
    assert 1 == asked.count(("info", path))


DAMAGES = {
    "block": lambda data: data[: 4096 + 70] + bytes([data[4096 + 70] ^ 1]) + data[4096 + 71 :],
    "header": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "end": lambda data: data[:-1],
    "most": lambda data: data[:100],
    "all": lambda data: b"",
    "gone": None,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["shard-00000.skl", "shard-00002.skl", MANIFEST_NAME])
def test_the_same_problems(store, local, name, damage):
    """Damage of a shard or of the manifest is named as in a directory, but for where it is."""
    path = local / name
    if damage == "gone":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(DAMAGES[damage](data) if len(data) > 4200 else DAMAGES[damage](data + bytes(4200)))
    upload(store, local)
    here = [dataclasses.replace(p, path=str(p.path).replace(str(local), URL)) for p in skl.verify(local)]
    there = [dataclasses.replace(p, message=p.message.replace(URL, str(local))) for p in skl.verify(URL)]
    if (name, damage) == (MANIFEST_NAME, "gone"):
        (problem,) = there  # a directory here needs none
        assert ("UnfinishedError", URL) == (problem.error, problem.path)
        assert "shards without manifest.json, which comes last: the capture or conversion has not" in problem.message
    else:
        assert here == there != []


def test_a_listing_that_lags(store, local, monkeypatch):
    """Shards that the store does not list yet are found by the manifest."""
    upload(store, local)
    monkeypatch.setattr(remote, "list_names", lambda url: [])
    assert [] == skl.verify(URL)


def test_a_listing_that_shows_what_is_gone(store, local, monkeypatch):
    """A shard that is listed and not there is missing if the manifest lists it, and else nothing."""
    upload(store, local)
    names = [path.name for path in local.iterdir()]
    monkeypatch.setattr(remote, "list_names", lambda url: sorted([*names, "shard-00009.skl"]))
    assert [] == skl.verify(URL)
    store.rm(f"{ROOT}/shard-00002.skl")
    problems = skl.verify(URL)
    assert ("MissingShardError", f"{URL}/shard-00002.skl") in [(p.error, p.path) for p in problems]
    assert not any("shard-00009" in str(problem) for problem in problems)
    for name in names:
        if name != "shard-00002.skl":
            store.rm(f"{ROOT}/{name}")
    with pytest.raises(skl.MissingShardError, match=r"no \.skl shards here"):
        skl.verify(URL)


def test_a_store_that_fails(store, local, monkeypatch):
    """A store that gives out or cuts an answer short is no damage of the cache: the error names URL and cause."""
    upload(store, local)
    monkeypatch.setattr(remote, "_WAITS", ())
    memory, cat_file = type(store), type(store).cat_file

    def refuse(self, path, start=None, end=None, **kwargs):
        raise TimeoutError("503 Slow Down")

    def cut(self, path, start=None, end=None, **kwargs):
        return cat_file(self, path, start, end, **kwargs)[:-1]

    for fault, message in ((refuse, r"cannot be read \(503 Slow Down\)"), (cut, r"asked 1 times for \d+ bytes fro")):
        with monkeypatch.context() as patch:
            patch.setattr(memory, "cat_file", fault)
            with pytest.raises(skl.RemoteError, match=message):
                skl.verify(f"{URL}/shard-00001.skl")


def test_nothing_in_the_store(store):
    """A URL without shards, and one of no shard."""
    with pytest.raises(skl.MissingShardError, match=r"no \.skl shards here"):
        skl.verify(URL)
    with pytest.raises(FileNotFoundError, match=f"{URL}/none.skl"):
        skl.verify(f"{URL}/none.skl")
