"""A system call that fails at any point of a shard's life leaves a typed error, a .partial that goes on, and no lie."""

import errno

import pytest
import reference
from strategies import FastDisk, header_of, small_sequence, small_settings, small_shard, targets_of

import sklformat as skl

HEADER = header_of(small_settings())
LENGTH = 3


class FaultyDisk(FastDisk):
    """Counts its calls and fails at one of them; a short write leaves half of its bytes behind."""

    def __init__(self, fail_at, code, *, short=False):
        self.calls = []
        self.fail_at = fail_at
        self.code = code
        self.short = short

    def _count(self, name):
        self.calls.append(name)
        if len(self.calls) - 1 == self.fail_at:
            raise OSError(self.code, errno.errorcode[self.code])

    def create(self, path):
        self._count("create")
        return super().create(path)

    def reopen(self, path):
        self._count("reopen")
        return super().reopen(path)

    def write(self, fd, data, offset):
        if self.short and len(self.calls) == self.fail_at:
            super().write(fd, memoryview(data).cast("B")[: len(data) // 2], offset)
        self._count("write")
        super().write(fd, data, offset)

    def truncate(self, fd, size):
        self._count("truncate")
        super().truncate(fd, size)

    def sync(self, fd):
        self._count("sync")

    def rename(self, source, target):
        self._count("rename")
        super().rename(source, target)

    def sync_directory(self, path):
        self._count("sync_directory")


def live(path, disk, acknowledged, *, resume=False):
    """The whole life of a shard, a flush after every sequence; says in a list what was acknowledged."""
    with skl.ShardWriter(path, header=HEADER, resume=resume, disk=disk) as writer:
        for number in range(len(writer), LENGTH):
            sequence = small_sequence(number)
            writer.append(sequence.tokens, targets_of(reference.COUNTS, sequence.positions))
            writer.flush()
            acknowledged.append(number)
    acknowledged.append("sealed")


def calls_of_a_life(directory):
    disk = FaultyDisk(-1, errno.EIO)
    live(directory / "counted.skl", disk, [])
    return disk.calls


def test_order_of_writes(tmp_path):
    """The calls are those of SPEC section 10.1, in its order."""
    expected = ["create", "write", "sync", "sync_directory"]
    expected += ["write", "sync"] * LENGTH
    expected += ["write", "write", "truncate", "sync", "rename", "sync_directory"]
    assert expected == calls_of_a_life(tmp_path)


@pytest.mark.parametrize(("code", "short"), [(errno.ENOSPC, False), (errno.EIO, False), (errno.ENOSPC, True)])
def test_any_call_may_fail(tmp_path, code, short):
    """Whichever call fails: OSError, no second sync, nothing sealed but whole, and the shard can be finished."""
    for fail_at, name in enumerate(calls_of_a_life(tmp_path)):
        directory = tmp_path / f"{fail_at}"
        directory.mkdir()
        path, disk, acknowledged = directory / "shard.skl", FaultyDisk(fail_at, code, short=short), []
        with pytest.raises(OSError, match=errno.errorcode[code]) as caught:
            live(path, disk, acknowledged)
        kept = path if path.exists() else path.with_name("shard.skl.partial")
        assert (code, str(kept)) == (caught.value.errno, caught.value.filename)
        if kept.exists():
            words = f"{errno.errorcode[code]}; what was flushed is kept there; fix the cause, then open it again with"
            assert f"{kept}: {words} resume=True" == str(caught.value)
        assert "sealed" not in acknowledged
        assert disk.calls[fail_at] == name
        assert "sync" not in disk.calls[fail_at + 1 :], f"synced again after a failed {name}"
        if path.exists():  # only the directory's sync came after
            assert fail_at == len(calls_of_a_life(directory)) - 1
            assert small_shard(LENGTH) == path.read_bytes()
            continue
        again = []
        live(path, FaultyDisk(-1, code), again, resume=True)
        assert not set(acknowledged) & set(again), "a sequence that was acknowledged had to be written again"
        assert small_shard(LENGTH) == path.read_bytes()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_any_call_of_a_resume_may_fail(tmp_path, code):
    """Failing while a torn .partial is resumed loses nothing either."""
    sealed = small_shard(LENGTH)
    torn = sealed[: 4096 + 2 * 192] + b"torn" * 10
    for fail_at in range(40):
        directory = tmp_path / f"{fail_at}"
        directory.mkdir()
        path, disk = directory / "shard.skl", FaultyDisk(fail_at, code)
        path.with_name("shard.skl.partial").write_bytes(torn)
        acknowledged = []
        try:
            live(path, disk, acknowledged, resume=True)
        except OSError:
            assert "sealed" not in acknowledged
            if not path.exists():
                live(path, FaultyDisk(-1, code), [], resume=True)
        else:
            assert fail_at >= len(disk.calls)
            assert sealed == path.read_bytes()
            break
        assert sealed == path.read_bytes()
    else:
        raise AssertionError("no life without a failure was reached")


def test_nothing_is_taken_after_a_failed_write(tmp_path):
    """A writer whose write or flush failed takes nothing more, and says how to go on."""
    for fail_at in (4, 5):
        disk = FaultyDisk(fail_at, errno.ENOSPC)
        writer = skl.ShardWriter(tmp_path / f"{fail_at}.skl", header=HEADER, disk=disk)
        sequence = small_sequence(0)
        targets = targets_of(reference.COUNTS, sequence.positions)

        def write_and_flush(writer=writer, sequence=sequence, targets=targets):
            writer.append(sequence.tokens, targets)
            writer.flush()

        with pytest.raises(OSError, match="ENOSPC"):
            write_and_flush()
        for call in (write_and_flush, writer.flush, writer.seal):
            with pytest.raises(ValueError, match="a write failed earlier; open it again with resume=True"):
                call()
        writer.close()
        assert len(disk.calls) == fail_at + 1


def test_a_failed_sync_while_closing(tmp_path):
    """close reports a sync that fails, once, and lets go."""
    disk = FaultyDisk(4, errno.EIO)
    writer = skl.ShardWriter(tmp_path / "a.skl", header=HEADER, disk=disk)
    with pytest.raises(OSError, match="EIO"):
        writer.close()
    writer.close()
    assert disk.calls[4:] == ["sync"]
    skl.recover(tmp_path / "a.skl")
