"""How files are read: mapped where that is safe, read elsewhere; whatever befalls a file that is read is an error."""

import errno
import multiprocessing
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import strategies
from strategies import make_cache, small_sequence, small_shard
from system import HANGS, open_descriptors

import sklformat as skl
from sklformat.cache import reader
from sklformat.cache.contents import scan_directory
from sklformat.cache.manifest import write_manifest
from sklformat.cache.shard import Shard
from sklformat.cache.tokens import Tokens
from sklformat.files import storage
from sklformat.files.copies import LocalCopies

MOUNTS = r"""
22 27 0:21 / /proc rw,nosuid shared:12 - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
40 27 0:40 / /home rw shared:2 master:3 - nfs4 server:/home rw,vers=4.2
41 40 0:41 / /home/me/local rw - xfs /dev/nvme0n1 rw
42 27 0:42 / /mnt/with\040space rw - fuse.s3fs s3fs rw
43 27 0:43 / /data rw - autofs systemd-1 rw
44 43 0:44 / /data rw - lustre 10.0.0.1@tcp:/fs rw
no mount at all
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/tmp/cache", "ext4"),
        ("/home/me/cache", "nfs4"),
        ("/home", "nfs4"),
        ("/homes/me", "ext4"),
        ("/home/me/local/cache", "xfs"),
        ("/mnt/with space/cache", "fuse.s3fs"),
        ("/data/cache", "lustre"),
    ],
)
def test_the_innermost_mount_counts(path, kind):
    """A path's file system is that of the innermost mount, and of several at one place the last."""
    assert kind == storage.file_system(Path(path), MOUNTS)
    assert "unknown" == storage.file_system(Path(path), "")


@pytest.mark.parametrize(
    ("kind", "mapped"),
    [
        *[(kind, True) for kind in ("ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs")],
        *[(kind, False) for kind in ("nfs", "nfs4", "lustre", "cifs", "ceph", "9p", "fuse.s3fs", "virtiofs", "newfs")],
    ],
)
def test_local_files_are_mapped_others_are_read(tmp_path, monkeypatch, kind, mapped):
    """auto maps on local file systems; on network ones, in user space and on unknown ones it reads; io= has its way."""
    (tmp_path / "mounts").write_text(f"27 1 254:0 / / rw - {kind} /dev/vda rw\n")
    monkeypatch.setattr(storage, "_MOUNTS", tmp_path / "mounts")
    storage._io_of.cache_clear()
    (tmp_path / "a.skl").write_bytes(small_shard())
    try:
        for io, expected in (("auto", mapped), ("mmap", True), ("pread", False)):
            shard = Shard(tmp_path / "a.skl", io)
            assert expected == (shard._file.address is not None)
            shard.close()
    finally:
        storage._io_of.cache_clear()
    with pytest.raises(ValueError, match="io must be auto, mmap or pread, got 'fast'"):
        skl.open(tmp_path / "a.skl", "fast")


EXPECTED = [small_sequence(i).tokens for i in range(9)]


@pytest.fixture(params=["mmap", "pread"])
def io(request):
    return request.param


@pytest.fixture
def directory(tmp_path):
    make_cache(tmp_path / "cache")
    return tmp_path / "cache"


def test_both_ways_read_the_same(directory, io):
    """Sequences and payloads of several shards are the same, mapped or read, one by one or many."""
    with skl.open(directory, io) as cache:
        assert [tuple(e) for e in EXPECTED] == [tuple(s.tokens.tolist()) for s in cache]
        assert [small_sequence(i).positions for i in range(9)] == [strategies.pairs_of(s.targets) for s in cache]
        for numbers in ([3, 0, 8, 7, 6, 0, -1], [4, 3], [2, 1, 0], [-1, 5]):
            arrays = cache.payloads(np.array(numbers)).decode(cache.header)
            expected = [EXPECTED[n][:-1] if n >= 0 else [0] * 3 for n in numbers]
            assert expected == arrays.input_ids.tolist()
        again = pickle.loads(pickle.dumps(cache))
        assert (io, cache.fingerprint) == (again.io, again.fingerprint)
        again.close()


def test_nothing_is_read_after_closing(directory, io):
    """A closed shard says so, its file is closed, and closing twice is allowed."""
    before = open_descriptors()
    shard = Shard(directory / "shard-00000.skl", io)
    assert shard[0].tokens.tolist() == EXPECTED[0]
    shard.close()
    shard.close()
    assert open_descriptors() <= before
    for read in (lambda: shard[0], lambda: shard.payloads(np.array([0]))):
        with pytest.raises(ValueError, match=r"shard-00000\.skl: the shard is closed; open it again"):
            read()


def test_what_is_in_use_stays_after_closing(directory, io):
    """Payloads on their way to a batch stay readable when their cache is closed; then the file is let go of."""
    cache = skl.open(directory, io)
    payloads = cache.payloads(np.array([0, 3]))
    cache.close()
    assert [EXPECTED[0][:-1], EXPECTED[3][:-1]] == payloads.decode(cache.header).input_ids.tolist()
    del payloads
    assert str(directory) not in Path("/proc/self/maps").read_text()
    assert not [fd for fd in os.listdir("/proc/self/fd") if str(directory) in os.path.realpath(f"/proc/self/fd/{fd}")]


def test_files_let_go_of_are_closed(directory, io):
    """A shard that nobody refers to closes its file, also after an error of its opening."""
    before = open_descriptors()
    Shard(directory / "shard-00000.skl", io)
    (directory / "bad.skl").write_bytes(small_shard()[:-1])
    (directory / "empty.skl").touch()
    for name in ("bad.skl", "empty.skl"):
        with pytest.raises(skl.TruncatedError, match=name):
            Shard(directory / name, io)
    assert open_descriptors() <= before


def test_damage_is_named_in_both_ways(directory, io):
    """A flipped bit of any part of a block is the same error with file, byte and sequence, mapped or read."""
    path = directory / "shard-00001.skl"
    sound = path.read_bytes()
    offset = int(Shard(path).index.offset[1])
    messages = {5: "checksum", 9: "checksum", 40: "checksum", 63: "checksum", 70: "payload checksum"}
    for place, message in messages.items():
        changed = bytearray(sound)
        changed[offset + place] ^= 0x10
        path.write_bytes(changed)
        with skl.open(directory, io) as cache:
            for read in (lambda cache=cache: cache[4], lambda cache=cache: cache.payloads(np.array([0, 4]))):
                with pytest.raises(skl.CorruptError, match=rf"shard-00001\.skl: block 1: byte {offset}: .*{message}"):
                    read()
            assert EXPECTED[3] == cache[3].tokens.tolist()


def test_many_shards_in_a_batch_are_copied(directory, monkeypatch):
    """A batch of more shards than may be open holds no mapping of them."""
    monkeypatch.setattr(reader, "MAX_OPEN_SHARDS", 2)
    with skl.open(directory, "mmap") as cache:
        payloads = cache.payloads(np.array([0, 3, 5, 8]))
        maps = Path("/proc/self/maps").read_text().splitlines()
        mapped = {line.split("/")[-1] for line in maps if str(directory) in line}
        assert len(mapped) <= 2
        arrays = payloads.decode(cache.header)
        assert [EXPECTED[n][:-1] for n in (0, 3, 5, 8)] == arrays.input_ids.tolist()


# What happens to a file while it is read: pread mode.


def test_a_file_cut_short_is_an_error(directory):
    """A file that another process truncates raises TruncatedError with file and byte; the process goes on."""
    path = directory / "shard-00002.skl"
    with skl.open(directory, "pread") as cache:
        assert EXPECTED[5] == cache[5].tokens.tolist()
        size = path.stat().st_size
        os.truncate(path, 4096 + 100)
        for read in (lambda: cache[8], lambda: cache.payloads(np.array([8]))):
            with pytest.raises(
                skl.TruncatedError, match=rf"shard-00002\.skl: .*ends at byte \d+, had {size} bytes when it was opened"
            ):
                read()
        assert EXPECTED[0] == cache[0].tokens.tolist()


def test_a_file_written_over_is_an_error(directory):
    """Every read is checked: bytes that change under the reader are found, and are good again when put back."""
    path = directory / "shard-00000.skl"
    sound, offset = path.read_bytes(), int(Shard(path).index.offset[1])
    with skl.open(directory, "pread") as cache:
        for _ in range(2):
            assert EXPECTED[1] == cache[1].tokens.tolist()
            with path.open("r+b") as file:
                file.seek(offset + 66)
                file.write(b"\xff")
            for read in (lambda: cache[1], lambda: cache.payloads(np.array([1]))):
                with pytest.raises(skl.CorruptError, match=rf"block 1: byte {offset}: payload checksum"):
                    read()
            with path.open("r+b") as file:
                file.write(sound)


def test_a_replaced_file_is_refused_when_it_is_opened_again(directory, monkeypatch):
    """A file renamed over an open one leaves the reader with the old, whole content; opened again it is refused."""
    write_manifest(directory, scan_directory(directory))
    monkeypatch.setattr(reader, "MAX_OPEN_SHARDS", 2)
    with skl.open(directory, "pread") as cache:
        assert EXPECTED[3] == cache[3].tokens.tolist()
        (directory / "new").write_bytes(small_shard(2, shard_number=1, first_sequence=5))
        (directory / "new").rename(directory / "shard-00001.skl")
        assert EXPECTED[3] == cache[3].tokens.tolist()
        cache[0]
        with pytest.raises(skl.CorruptError, match=r"shard-00001\.skl: .*the file was replaced"):
            cache[3]


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_failing_read_names_the_file(directory, monkeypatch, code):
    """An error of the system names file, sequence and byte and what to do, and reading works again when it is over."""
    with skl.open(directory, "pread") as cache:
        assert EXPECTED[1] == cache[1].tokens.tolist()
        with monkeypatch.context() as patch:

            def fail(*_):
                raise OSError(code, os.strerror(code))

            patch.setattr(os, "preadv", fail)
            with pytest.raises(skl.UnreadableError, match=r"shard-00000\.skl: block 1: byte \d+: .*; ") as caught:
                cache[1]
            assert code == caught.value.errno
        assert EXPECTED[1] == cache[1].tokens.tolist()


def test_short_reads_go_on(directory, monkeypatch):
    """A read that gives fewer bytes than asked for goes on where it ended."""
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: whole(fd, [views[0][:7]], offset))
    with skl.open(directory, "pread") as cache:
        assert [EXPECTED[n] for n in range(9)] == [s.tokens.tolist() for s in cache]


def test_threads_and_a_forked_child_read_on(directory):
    """Readers of one open file do not disturb each other, in threads or after a fork."""
    with skl.open(directory, "pread") as cache:
        wrong = []

        def read():
            wrong.extend(i for i in range(200) if cache[i % 9].tokens.tolist() != EXPECTED[i % 9])

        process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(bool(read() or wrong)))
        process.start()
        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        process.join(HANGS)
        assert (0, []) == (process.exitcode, wrong)


def test_a_link_is_read_as_the_file_it_names(tmp_path, monkeypatch):
    """A shard that a local directory links to is read as where it lies: on a network file system, not mapped."""
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a.skl").write_bytes(small_shard())
    (tmp_path / "b.skl").symlink_to(tmp_path / "far" / "a.skl")
    far = f"28 27 0:50 / {tmp_path}/far rw - nfs4 server:/x rw"
    (tmp_path / "mounts").write_text(f"27 1 254:0 / / rw - ext4 /dev/vda rw\n{far}\n")
    monkeypatch.setattr(storage, "_MOUNTS", tmp_path / "mounts")
    storage._io_of.cache_clear()
    try:
        shard = Shard(tmp_path / "b.skl")
        assert shard._file.address is None
        shard.close()
    finally:
        storage._io_of.cache_clear()


@pytest.mark.parametrize("kind", [LocalCopies, Tokens])
def test_a_forked_process_shows_its_locks_last(tmp_path, kind):
    """Threads of a forked process that see its number find its own locks, never one that a lost thread holds."""
    names = []

    class Watched(kind):
        def __setattr__(self, name, value):
            names.append(name)
            super().__setattr__(name, value)

    Watched(tmp_path if kind is LocalCopies else [[1, 2]])._forget()
    assert "_pid" == names[-1]
