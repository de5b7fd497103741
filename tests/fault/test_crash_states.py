"""
Every state that a crash can leave of a shard's life, replayed on images of its file.

A recording disk notes the writer's calls.  A power cut after any of them keeps what was synced, and of what was not any
subset, the last write torn at sectors, the file as long as the kept writes make it or as long as all of them would, and
names as they were or as they became.  A writer that is killed first leaves its unsynced calls to the one that resumes.
"""

import itertools
import os
import tempfile
from pathlib import Path

import pytest
import reference
import strategies
from strategies import FastDisk

import sklformat as skl
from sklformat.cache import recovery
from sklformat.files.disk import Disk

SECTOR = 512
SETTINGS = strategies.small_settings(seq_len=0)
HEADER = strategies.header_of(SETTINGS)
LENGTHS = (3, 300, 1, 140, 3)
SEQUENCES = [
    reference.Sequence(
        [(length + t * t) % 20 for t in range(length + 1)],
        [[(t % 9, 2), (10 + t % 7, 3)] if t % 5 else [] for t in range(length)],
    )
    for length in LENGTHS
]
WHOLE = reference.encode_shard(SETTINGS, SEQUENCES)
FLUSH_AFTER = (2, 3)
"""A life is: open, append two, flush, append one, flush, append two, seal."""


class Killed(BaseException):
    """The writer's process is gone."""


class RecordingDisk(Disk):
    """Does what it is asked, notes it, and dies after ``lives`` calls; ``torn``: the last of them writes only half."""

    def __init__(self, log, lives=None, torn=False):
        self.log, self.left, self.torn = log, lives, torn

    def note(self, *call):
        self.log.append(call)
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise Killed

    def create(self, path):
        fd = super().create(path)
        try:
            self.note("create")
        except Killed:
            os.close(fd)
            raise
        return fd

    def write(self, fd, data, offset):
        data = bytes(data)
        if self.left == 1 and self.torn:
            data = data[: len(data) // 2]
        super().write(fd, data, offset)
        self.note("write", offset, data)

    def truncate(self, fd, size):
        super().truncate(fd, size)
        self.note("truncate", size)

    def sync(self, fd):
        self.note("sync")

    def rename(self, source, target):
        source.rename(target)
        self.note("rename")
        self.sync_directory(target.parent)

    def sync_directory(self, path):
        self.note("sync_directory")


def append(writer, number):
    sequence = SEQUENCES[number]
    writer.append(sequence.tokens, strategies.targets_of(SETTINGS.kind, sequence.positions))


def live(path, disk, *, resume=False):
    """One life of a writer; notes ("ack", n) in the disk's log when n sequences count as saved."""
    writer = None
    try:
        writer = skl.ShardWriter(path, header=HEADER, resume=resume, disk=disk)
        disk.log.append(("ack", len(writer)))
        for number in range(len(writer), len(SEQUENCES)):
            append(writer, number)
            if number + 1 in FLUSH_AFTER:
                writer.flush()
                disk.log.append(("ack", number + 1))
        writer.seal()
        disk.log.append(("ack", len(SEQUENCES)))
    except Killed:
        if writer is not None:
            writer._close()


def recorded_lives(directory: Path, *, thorough: bool, disk):
    """
    Logs of lives, each with the number of calls before which nothing new can happen.

    The undisturbed one; and for each of its calls, half or whole, a killed writer followed by one that resumes, with
    and without a ``recover`` first.
    """
    path = directory / "shard.skl"

    def clean():
        for file in directory.iterdir():
            file.unlink()

    log = []
    live(path, disk(log))
    calls = sum(call[0] != "ack" for call in log)
    yield log, 0
    for lives, torn in itertools.product(range(1, calls), (False, True) if thorough else (False,)):
        for recovered in (False, True):
            clean()
            log = []
            live(path, disk(log, lives, torn))
            if path.exists():
                continue
            begin = len(log)
            if recovered:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(recovery, "Disk", lambda log=log: disk(log))
                    log.append(("ack", skl.recover(path).sequences))
            live(path, disk(log), resume=True)
            assert WHOLE == path.read_bytes()
            yield log, begin


def patched(base: bytes, calls, fill: bytes = b"\0") -> bytes:
    """A file's content after writes and truncations; what lies in between and never arrived is ``fill``."""
    data = bytearray(base)
    for kind, at, *rest in calls:
        if len(data) < at:
            data += fill * (at - len(data))
        if kind == "truncate":
            del data[at:]
        else:
            data[at : at + len(rest[0])] = rest[0]
    return bytes(data)


def torn(call, *, thorough: bool):
    """The parts of a write that a torn one may leave: subsets of its sectors, each as a list of calls."""
    if call[0] != "write":
        return [[call]]
    _, offset, data = call
    ends = [*range((offset // SECTOR + 1) * SECTOR, offset + len(data), SECTOR), offset + len(data)]
    begins = [offset, *ends[:-1]]
    pieces = [("write", a, data[a - offset : b - offset]) for a, b in zip(begins, ends, strict=True)]
    n = len(pieces)
    if thorough and n <= 8:
        masks = list(subsets(n))
    else:
        masks = [[i < k for i in range(n)] for k in range(n + 1)]  # prefixes, suffixes, all but one, one alone
        masks += [[i >= k for i in range(n)] for k in range(1, n)]
        masks += [[i != k for i in range(n)] for k in range(n)] + [[i == k for i in range(n)] for k in range(n)]
    return [[piece for piece, kept in zip(pieces, mask, strict=True) if kept] for mask in masks]


def crash_states(log, begin, *, thorough: bool):
    """
    The states that a power cut can leave after any call of a log from ``begin`` on.

    Yields (number of sequences acknowledged, content of the file or None, whether it has its final name).
    """
    durable, name, acknowledged = b"", None, 0
    pending, pending_name = [], None
    for place, call in enumerate(log):
        kind = call[0]
        if kind == "ack":
            acknowledged = call[1]
        elif kind == "sync":
            durable, pending = patched(durable, pending), []
        elif kind == "sync_directory":
            name, pending_name = pending_name or name, None
        elif kind in ("create", "rename"):
            pending_name = "partial" if kind == "create" else "sealed"
        else:
            pending.append(call)
        if place < begin:
            continue
        names = [name] if pending_name is None else [name, pending_name]
        for where in names:
            if where is None:
                yield acknowledged, None, False
                continue
            longest = len(patched(durable, pending))
            # Stale bytes of the medium instead of zeros; a header that began so would be a foreign file.
            fills = (b"\0", b"\xa5") if thorough and len(durable) >= reference.HEADER_SIZE else (b"\0",)
            for kept, fill in itertools.product(subsets(len(pending)), fills):
                calls = [call for call, keep in zip(pending, kept, strict=True) if keep]
                whole, tearing = calls[: -2 if thorough else -1], calls[-2 if thorough else -1 :]
                for parts in itertools.product(*(torn(call, thorough=thorough) for call in tearing)):
                    content = patched(durable, [*whole, *itertools.chain(*parts)], fill)
                    yield acknowledged, content, where == "sealed"
                    if len(content) < longest:  # the size arrived, the bytes did not
                        yield acknowledged, content + fill * (longest - len(content)), where == "sealed"


def subsets(n: int):
    """Every choice of n things."""
    return itertools.product((False, True), repeat=n)


class Judge:
    """Holds the laws of SPEC section 10 against states; each image is judged once, with the most that it must hold."""

    def __init__(self, directory: Path):
        self.path = directory / "shard.skl"
        self.partial = directory / "shard.skl.partial"
        self.states, self.kept = 0, {}
        self.ends = [int(offset) for offset in self.offsets(directory)]

    def offsets(self, directory):
        self.path.write_bytes(WHOLE)
        with skl.open(self.path) as cache:
            (shard,) = cache.shards()
            offsets = [*shard.index.offset.tolist(), shard.trailer.index_offset]
        self.path.unlink()
        return offsets

    def check(self, acknowledged, content, sealed):
        self.states += 1
        if sealed:
            assert WHOLE == content, "an invalid sealed shard"
            return
        if content not in self.kept:
            self.kept[content] = self.recovered(content)
            self.resumed(content)
        assert acknowledged <= self.kept[content], "an acknowledged sequence is gone"

    def recovered(self, content):
        """recover keeps a prefix of the undisturbed shard, and says how long it is."""
        if content is None:
            return 0
        self.partial.write_bytes(content)
        result = skl.recover(self.path)
        left = self.partial.read_bytes()
        assert len(content) - len(left) == result.bytes_cut
        assert left in (WHOLE[: self.ends[result.sequences]], b"")
        assert left or result.sequences == 0
        self.partial.unlink()
        if left not in self.kept:
            self.kept[left] = result.sequences
            self.resumed(left)
        return result.sequences

    def resumed(self, content):
        """A resumed shard becomes the undisturbed one."""
        if content is not None:
            self.partial.write_bytes(content)
        with skl.ShardWriter(self.path, header=HEADER, resume=True, disk=FastDisk()) as writer:
            for number in range(len(writer), len(SEQUENCES)):
                append(writer, number)
        assert WHOLE == self.path.read_bytes()
        self.path.unlink()


def judged(directory: Path, *, thorough: bool, disk=RecordingDisk) -> Judge:
    lives, images = directory / "lives", directory / "images"
    lives.mkdir()
    images.mkdir()
    judge = Judge(images)
    with pytest.MonkeyPatch.context() as patch:
        for log, begin in list(recorded_lives(lives, thorough=thorough, disk=disk)):
            patch.setattr(recovery, "Disk", FastDisk)
            for state in crash_states(log, begin, thorough=thorough):
                judge.check(*state)
    return judge


@pytest.fixture
def memory():
    """A directory that needs no disk where the system has one: nothing here waits for the medium."""
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as name:
        yield Path(name)


def test_the_recorded_life():
    """The writer's calls come in the order of SPEC section 10.1."""
    log = []
    with tempfile.TemporaryDirectory() as name:
        live(Path(name) / "shard.skl", RecordingDisk(log))
    assert [
        *("create", "write", "sync", "sync_directory", "ack"),
        *("write", "write", "sync", "ack", "write", "sync", "ack", "write", "write"),
        *("write", "write", "truncate", "sync", "rename", "sync_directory", "ack"),
    ] == [call[0] for call in log]


def test_crash_states(memory):
    """
    No crash makes an invalid sealed shard, costs an acknowledged sequence, or changes what a resumed shard becomes.

    104,410 states of 771 different files.
    """
    judge = judged(memory, thorough=True)
    assert judge.states > 100_000
    assert len(judge.kept) > 700


class NoSync(RecordingDisk):
    """Syncs no file."""

    def sync(self, fd):
        pass


class NoDirectorySync(RecordingDisk):
    """Syncs no directory."""

    def sync_directory(self, path):
        pass


@pytest.mark.parametrize("disk", [NoSync, NoDirectorySync])
def test_a_missing_sync_is_noticed(memory, disk):
    """The laws break where the writer does not sync."""
    with pytest.raises((AssertionError, skl.FormatError)):
        judged(memory, thorough=False, disk=disk)


@pytest.mark.parametrize("content", [b"hello", b"\x7fELF" + bytes(4092), WHOLE[:8] + b"\2\0" + WHOLE[10:4096]])
def test_a_foreign_file_is_not_begun_anew(memory, content):
    """What neither began as a header of ours nor is zero there is an error, and stays as it is."""
    partial = memory / "shard.skl.partial"
    partial.write_bytes(content)
    for call in (
        lambda: skl.recover(partial),
        lambda: skl.ShardWriter(memory / "shard.skl", header=HEADER, resume=True),
    ):
        with pytest.raises(skl.FormatError):
            call()
        assert content == partial.read_bytes()
