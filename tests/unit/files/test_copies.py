"""Caches behind URLs: the same sequences, through local copies that are checked, shared and bounded."""

import concurrent.futures
import errno
import multiprocessing
import os
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from loader_data import SEQUENCES, rows, write_cache
from system import HANGS
from torch.utils.data import DataLoader

import sklformat as skl
from sklformat.cache.contents import scan_directory
from sklformat.cache.manifest import write_manifest
from sklformat.distill import SparseLogitDataset
from sklformat.files import copies as copies_module
from sklformat.files import disk, remote
from sklformat.files.copies import PIECE, LocalCopies

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    directory = tmp_path_factory.mktemp("remote") / "cache"
    write_cache(directory)
    write_manifest(directory, scan_directory(directory))
    return directory


@pytest.fixture
def url(local):
    """The cache in a store in memory."""
    fs = fsspec.filesystem("memory")
    for path in local.iterdir():
        fs.pipe_file(f"/copies-test/cache/{path.name}", path.read_bytes())
    yield "memory://copies-test/cache"
    fs.rm("/copies-test", recursive=True)


@pytest.fixture
def requests(monkeypatch):
    """The ranges that were asked for."""
    asked, plain = [], remote.read_range

    def read_range(url, offset, length):
        asked.append((url.rpartition("/")[2], offset, length))
        os.sched_yield()  # to another thread, as a store that takes its time does
        return plain(url, offset, length)

    monkeypatch.setattr(remote, "read_range", read_range)
    return asked


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of 4 KiB, so that a small cache has many."""
    monkeypatch.setattr(copies_module, "PIECE", 4096)


def test_the_stream_is_that_of_the_local_cache(local, url, tmp_path):
    """Fingerprint, sequences and batches behind a URL are those of the files, also by a single shard."""
    copies = LocalCopies(tmp_path / "copies")
    with skl.open(local) as here, skl.open(url + "/", copies=copies) as there:
        assert (here.fingerprint, len(here)) == (there.fingerprint, len(there))
        for i in range(SEQUENCES):
            assert here[i].tokens.tolist() == there[i].tokens.tolist()
            assert here[i].targets == there[i].targets
        expected = rows(SparseLogitDataset(here, batch_size=4))
        assert expected == rows(SparseLogitDataset(there, batch_size=4))
        assert expected == rows(DataLoader(SparseLogitDataset(there, batch_size=4), batch_size=None, num_workers=2))
    with skl.open(f"{url}/shard-00001.skl", copies=copies) as shard:
        assert (15, 8) == (shard.first_sequence, len(shard))


def test_what_was_read_is_not_fetched_again(url, tmp_path, requests, small_pieces):
    """Ranges are pieces, each fetched once; another reader, or the same one later, asks for the manifest only."""
    with skl.open(url, copies=LocalCopies(tmp_path / "copies")) as cache:
        for _ in range(2):
            list(cache)
    pieces = [(name, offset) for name, offset, _ in requests if name != "manifest.json"]
    assert all(offset % 4096 == 0 for _, offset in pieces)
    assert len(set(pieces)) == len(pieces) > 4
    requests.clear()
    with pickle.loads(pickle.dumps(skl.open(url, copies=LocalCopies(tmp_path / "copies")))) as cache:
        list(cache)
    assert {"manifest.json"} == {name for name, *_ in requests}


def test_threads_fetch_a_piece_once(url, tmp_path, requests):
    """Threads that want the same piece at the same time ask the store once, as the next ones ask for none."""
    copies, size = LocalCopies(tmp_path / "copies"), remote.size(f"{url}/shard-00000.skl")
    expected = remote.read_range(f"{url}/shard-00000.skl", 100, 500)
    requests.clear()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        reads = [pool.submit(copies.read, f"{url}/shard-00000.skl", "x", size, 100, 500) for _ in range(64)]
        assert {expected} == {read.result() for read in reads}
    assert 1 == len(requests)


def test_damaged_copies_are_fetched_again(url, tmp_path, small_pieces):
    """A local copy that is torn, flipped, empty or another piece's is never believed, and is put right."""
    folder = tmp_path / "copies"
    with skl.open(url, copies=LocalCopies(folder)) as cache:
        expected = [s.tokens.tolist() for s in cache]
    files = sorted(folder.glob("??/*/*"))
    sound = {path: path.read_bytes() for path in files}
    damages = (
        lambda data, _: data[: len(data) // 2],
        lambda data, _: bytes([data[0] ^ 1]) + data[1:],
        lambda data, _: b"",
        lambda _, number: sound[files[number - 1]],
    )
    for damage in damages:
        for number, path in enumerate(files):
            path.write_bytes(damage(sound[path], number))
        with skl.open(url, copies=LocalCopies(folder)) as cache:
            assert expected == [s.tokens.tolist() for s in cache]
        assert sound == {path: path.read_bytes() for path in files}


def test_damage_in_the_store_is_named(url, tmp_path):
    """Bytes that the store gives are checked like a file's: the error names URL, block and byte."""
    fs, path = fsspec.filesystem("memory"), "/copies-test/cache/shard-00000.skl"
    data = bytearray(fs.cat_file(path))
    data[4096 + 70] ^= 1
    fs.pipe_file(path, bytes(data))
    with (
        skl.open(url, copies=LocalCopies(tmp_path)) as cache,
        pytest.raises(skl.CorruptError, match=rf"^{url}/shard-00000\.skl: block 0: byte 4096: payload checksum"),
    ):
        cache[0]


@pytest.mark.parametrize("part", ["header", "index", "block"])
def test_damage_on_the_way_is_no_damage(local, url, tmp_path, monkeypatch, part):
    """Bytes that come wrong once are asked for again, before an error says that they are wrong, and are not kept."""
    plain, place = remote.read_range, {"header": 8, "index": -90, "block": 4096 + 70}[part]
    left = []

    def read_range(where, offset, length):
        data = bytearray(plain(where, offset, length))
        if where.endswith("shard-00000.skl") and left:
            data[place % remote.size(where) - offset] ^= left.pop()
        return bytes(data)

    monkeypatch.setattr(remote, "read_range", read_range)
    with skl.open(local) as here:
        expected = [s.targets for s in here]
        payload = here.payloads(np.array([0])).decode(here.header).input_ids.tolist()
    for read in (
        lambda cache: [s.targets for s in cache] == expected,
        lambda cache: cache.payloads(np.array([0])).decode(cache.header).input_ids.tolist() == payload,
    ):
        left[:] = [4]
        with skl.open(url, copies=LocalCopies(tmp_path / "copies")) as cache:
            assert read(cache)
        assert [] == left
        shutil.rmtree(tmp_path / "copies")
    left[:] = [4]
    assert [] == skl.verify(url)
    assert [] == left


def test_a_shard_replaced_in_the_store_is_not_taken_for_the_old_one(url, tmp_path):
    """Behind the same URL, another shard has local copies of its own; behind a manifest it is refused."""
    copies, shard = LocalCopies(tmp_path / "copies"), f"{url}/shard-00000.skl"
    with skl.open(shard, copies=copies) as cache:
        old = cache[0].tokens.tolist()
    write_cache(tmp_path / "other", seed=8)
    fsspec.filesystem("memory").pipe_file(
        "/copies-test/cache/shard-00000.skl", (tmp_path / "other" / "shard-00000.skl").read_bytes()
    )
    with skl.open(shard, copies=copies) as cache:
        assert old != cache[0].tokens.tolist()
    with pytest.raises(skl.FormatError, match=r"shard-00000\.skl: "):
        skl.open(url, copies=LocalCopies(tmp_path / "more"))[0]


def test_what_is_not_there(url, tmp_path):
    """No manifest, no shard, a file cut short, and an io that URLs do not have are said."""
    copies = LocalCopies(tmp_path)
    with pytest.raises(skl.MissingShardError, match=r"^memory://copies-test/none: no manifest\.json here"):
        skl.open("memory://copies-test/none", copies=copies)
    with pytest.raises(FileNotFoundError, match=r"copies-test/none\.skl"):
        skl.open("memory://copies-test/none.skl", copies=copies)
    with pytest.raises(ValueError, match="a URL is read by ranges, io must be auto, got 'mmap'"):
        skl.open(url, "mmap", copies)
    fs, path = fsspec.filesystem("memory"), "/copies-test/cache/shard-00001.skl"
    data = fs.cat_file(path)
    for short in (data[:-100], data[:100], b""):
        fs.pipe_file(path, short)
        with pytest.raises((skl.FormatError, skl.RemoteError), match=r"shard-00001\.skl"):
            skl.open(url + "/shard-00001.skl", copies=copies)
        with pytest.raises((skl.FormatError, skl.RemoteError), match=r"shard-00001\.skl"):
            skl.open(url, copies=LocalCopies(tmp_path / str(len(short))))[20]
    fs.rm(path)
    message = (
        r"copies-test/cache/shard-00001\.skl: sequences 15\.\.22 are missing; put the shard back or capture it again"
    )
    with pytest.raises(skl.MissingShardError, match=message):
        skl.open(url, copies=LocalCopies(tmp_path / "gone"))[20]


def test_copies_are_bounded(url, tmp_path, monkeypatch):
    """However much is read, the directory stays below its bound, and what was used last is kept."""
    fs = fsspec.filesystem("memory")
    data = np.random.default_rng(0).bytes(12 * PIECE - 5)
    fs.pipe_file("/copies-test/big", data)
    monkeypatch.setattr(copies_module, "_IN_MEMORY", 1)
    bound = 4 * (PIECE + 8) + 100
    copies = LocalCopies(tmp_path / "copies", bound)
    for number in (*range(12), 3, 11):
        start = number * PIECE + 7
        assert data[start : start + PIECE // 2] == copies.read(
            "memory://copies-test/big", "x", len(data), start, PIECE // 2
        )
        assert sum(path.stat().st_size for path in copies.directory.rglob("*") if path.is_file()) <= bound
    kept = {int(path.name) for path in copies.directory.glob("??/*/*")}
    assert {3, 11} <= kept
    assert data[5 : 3 * PIECE] == copies.read("memory://copies-test/big", "x", len(data), 5, 3 * PIECE - 5)
    with pytest.raises(ValueError, match=r"local copies need at least \d+ bytes, got 7"):
        LocalCopies(tmp_path, 7)


def test_directories_that_vanish_meanwhile(tmp_path, url, small_pieces, monkeypatch):
    """Room is made although another process removes directories at the very moment in which they are looked at."""
    data = np.random.default_rng(1).bytes(50_000)
    fsspec.filesystem("memory").pipe_file("/copies-test/vanish", data)
    copies = LocalCopies(tmp_path / "copies", 3 * (4096 + 8))
    scandir = os.scandir
    vanished = []

    def vanishing(path="."):
        if len(Path(path).parts) == len(copies.directory.parts) + 2:
            for file in Path(path).iterdir():
                file.unlink()
            Path(path).rmdir()
            vanished.append(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert data == copies.read("memory://copies-test/vanish", "x", len(data), 0, len(data))
    assert vanished


def test_other_files_stay(tmp_path, url, small_pieces):
    """Whatever else lies in the directory is no piece, and is not removed to make room."""
    data = np.random.default_rng(1).bytes(50_000)
    fsspec.filesystem("memory").pipe_file("/copies-test/others", data)
    others = [tmp_path / name for name in ("a.txt", "ab/b.txt", "abc/d/e.txt", "ab/c/d/e.txt")]
    for path in others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(9000))
        os.utime(path, (0, 0))
    assert data == LocalCopies(tmp_path, 3 * (4096 + 8)).read(
        "memory://copies-test/others", "x", len(data), 0, len(data)
    )
    assert all(path.exists() for path in others)


def _read_all(url, folder, bound, seed, data, failures):
    copies = LocalCopies(folder, bound)
    rng = np.random.default_rng(seed)
    for _ in range(150):
        start = int(rng.integers(0, len(data) - 1))
        length = int(rng.integers(1, min(3 * 4096, len(data) - start) + 1))
        if copies.read(url, "x", len(data), start, length) != data[start : start + length]:
            failures.put((start, length))
        copies._memory.clear()


def test_processes_share_a_directory(url, tmp_path, small_pieces):
    """Processes that read, write and evict in one directory at a time never see a piece that is not whole."""
    data = np.random.default_rng(1).bytes(50_000)
    fsspec.filesystem("memory").pipe_file("/copies-test/shared", data)
    context = multiprocessing.get_context("fork")
    failures = context.SimpleQueue()
    shared = ("memory://copies-test/shared", tmp_path / "copies", 6 * (4096 + 8))
    processes = [context.Process(target=_read_all, args=(*shared, seed, data, failures)) for seed in range(4)]
    for process in processes:
        process.start()
    for _ in range(20):
        shutil.rmtree(tmp_path / "copies", ignore_errors=True)  # a user who makes room by hand
    for process in processes:
        process.join(HANGS)
    assert [0] * 4 == [process.exitcode for process in processes]
    assert failures.empty()
    assert [] == [path.name for path in (tmp_path / "copies").rglob(".*")]


def _read_together(url, folder, size, together, requests):
    plain = remote.read_range

    def read_range(url, offset, length):
        with requests.get_lock():
            requests.value += 1
        os.sched_yield()
        return plain(url, offset, length)

    remote.read_range = read_range
    copies = LocalCopies(folder)
    for offset in range(0, size, 4096):
        together.wait(HANGS)
        copies.read(url, "x", size, offset, min(4096, size - offset))


def test_processes_fetch_a_piece_once(url, tmp_path, small_pieces):
    """Processes that want the same piece at the same time, as workers in a window do, ask the store once."""
    data = np.random.default_rng(2).bytes(200_000)
    fsspec.filesystem("memory").pipe_file("/copies-test/once", data)
    context = multiprocessing.get_context("fork")
    together, requests = context.Barrier(3), context.Value("i", 0)
    given = "memory://copies-test/once", tmp_path / "copies", len(data), together, requests
    processes = [context.Process(target=_read_together, args=given) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(HANGS)
    assert [0] * 3 == [process.exitcode for process in processes]
    assert -(-len(data) // 4096) == requests.value


def test_threads_that_seem_to_wait_for_each_other(tmp_path, monkeypatch):
    """A process that the system believes to be in a deadlock, since it knows no threads, waits for its turn as well."""
    fcntl = pytest.importorskip("fcntl")
    refusals = [errno.EDEADLK, errno.EDEADLK]
    plain = fcntl.lockf

    def mistaken(fd, operation):
        if refusals:
            raise OSError(refusals.pop(), "Resource deadlock avoided")
        plain(fd, operation)

    monkeypatch.setattr(fcntl, "lockf", mistaken)
    with disk.turn(tmp_path / "turns" / "1"):
        assert [] == refusals


def test_without_locks_everybody_fetches(url, tmp_path, monkeypatch):
    """A directory whose file system has no locks serves as well."""
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    size = remote.size(f"{url}/shard-00000.skl")
    expected = remote.read_range(f"{url}/shard-00000.skl", 100, 500)
    assert expected == LocalCopies(tmp_path).read(f"{url}/shard-00000.skl", "x", size, 100, 500)


def test_pieces_are_fetched_side_by_side(url, tmp_path, small_pieces, monkeypatch):
    """What a batch needs of a shard is asked for by several requests at the same time, each piece once."""
    data = np.random.default_rng(3).bytes(40 * 4096)
    fsspec.filesystem("memory").pipe_file("/copies-test/wide", data)
    together, asked, plain = threading.Barrier(4), [], remote.read_range

    def read_range(where, offset, length):
        asked.append(offset // 4096)
        if len(asked) <= 4:
            together.wait(HANGS)  # four are under way at once
        return plain(where, offset, length)

    monkeypatch.setattr(remote, "read_range", read_range)
    copies, place = LocalCopies(tmp_path / "copies"), ("memory://copies-test/wide", "x", len(data))
    spans = [(4096 * number + 4000, 200) for number in (3, 9, 20)]
    copies.prepare(*place, [*spans, (4096 * 30, 1)])
    assert [3, 4, 9, 10, 20, 21, 30] == sorted(asked)
    assert [data[start : start + 200] for start, _ in spans] == [copies.read(*place, *span) for span in spans]
    assert 7 == len(asked)
    copies.prepare(*place, [*spans, (0, 1)])  # one is missing, which the read will fetch
    assert 7 == len(asked)
    copies.prepare(*place, [(0, len(data))])
    assert 7 + 16 == len(asked)
