"""System calls of a writer: locks, short writes, atomic replacement."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from strategies import small_shard

from sklformat.errors import InUseError
from sklformat.files import disk


def test_create_refuses_what_exists(tmp_path):
    """create never opens a file that is there."""
    os.close(disk.Disk().create(tmp_path / "a"))
    with pytest.raises(FileExistsError):
        disk.Disk().create(tmp_path / "a")


def test_short_writes_go_on(tmp_path, monkeypatch):
    """A write that the system cuts short goes on where it ended."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, memoryview(data)[:3], offset))
    fd = disk.Disk().create(tmp_path / "a")
    disk.Disk().write(fd, b"0123456789", 2)
    os.close(fd)
    assert (tmp_path / "a").read_bytes() == b"\0\x000123456789"


def test_lock_is_exclusive(tmp_path):
    """A second descriptor of a locked file is refused until the first is closed, and the message names the file."""
    first = disk.Disk().create(tmp_path / "a")
    disk.lock_named(first, tmp_path / "a")
    second = disk.Disk().reopen(tmp_path / "a")
    with pytest.raises(InUseError, match="a: another process is writing here; wait for it, or choose another place"):
        disk.lock_named(second, tmp_path / "a")
    os.close(first)
    disk.lock_named(second, tmp_path / "a")
    os.close(second)


@pytest.mark.parametrize("successor", [False, True])
def test_lock_of_a_file_that_was_renamed(tmp_path, successor):
    """A file that lost its name between opening and locking is not taken, whether the name is free or used again."""
    fd = disk.Disk().create(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    if successor:
        (tmp_path / "a").touch()
    with pytest.raises(InUseError, match="finished it just now; look again"):
        disk.lock_named(fd, tmp_path / "a")
    os.close(fd)


def test_locked_directory(tmp_path):
    """A directory is made, held against a second holder, and free again afterwards."""
    path = tmp_path / "new" / "cache"
    with (
        disk.locked_directory(path),
        pytest.raises(InUseError, match="cache: another process"),
        disk.locked_directory(path),
    ):
        pass
    with disk.locked_directory(path):
        assert path.is_dir()
    assert [] == list(path.iterdir())


def test_shared_directory(tmp_path):
    """The processes of one run share a directory; another run, or one process that wants it alone, is refused."""
    with disk.shared_directory(tmp_path / "c", "a"):
        with disk.shared_directory(tmp_path / "c", "a"):
            for other in (disk.shared_directory(tmp_path / "c", "b"), disk.locked_directory(tmp_path / "c")):
                with pytest.raises(InUseError, match="c: another process is writing here"), other:
                    pass
        with pytest.raises(InUseError), disk.shared_directory(tmp_path / "c", "a longer name"):
            pass
    with (
        disk.shared_directory(tmp_path / "c", "b"),
        pytest.raises(InUseError),
        disk.shared_directory(tmp_path / "c", "a"),
    ):
        pass


def test_a_run_waits_for_the_one_before(tmp_path):
    """With patience, another run's end is waited for; what inherits the descriptor holds the directory on."""
    with disk.shared_directory(tmp_path, "a", inherited=True) as held:
        inherited = os.dup(held)
    thread = threading.Timer(0.1, os.close, [inherited])
    with pytest.raises(InUseError), disk.shared_directory(tmp_path, "b"):
        pass
    thread.start()
    with disk.shared_directory(tmp_path, "b", patience=30):
        thread.join()
    assert [] == list(tmp_path.iterdir())


def test_a_refused_run_leaves_what_it_found(tmp_path):
    """Whoever is refused removes nothing that another holds, and whoever fails removes what it made."""
    with disk.shared_directory(tmp_path, "a"):
        with pytest.raises(InUseError), disk.shared_directory(tmp_path, "b"):
            pass
        with pytest.raises(InUseError, match="another process is writing here"):
            disk.refuse_held(tmp_path)
        with pytest.raises(ZeroDivisionError), disk.shared_directory(tmp_path, "a"):
            raise ZeroDivisionError
        assert [tmp_path / ".lock"] == list(tmp_path.iterdir())
    for hold in (disk.shared_directory(tmp_path, "b"), disk.locked_directory(tmp_path)):
        with pytest.raises(ZeroDivisionError), hold:
            raise ZeroDivisionError
        assert [] == list(tmp_path.iterdir())
    disk.refuse_held(tmp_path)
    disk.refuse_held(tmp_path / "nowhere")
    assert [] == list(tmp_path.iterdir())


def test_a_lock_file_that_went_between_opening_and_locking(tmp_path, monkeypatch):
    """A lock on a file that its holder has removed holds nothing: the directory is locked by its new file."""
    real, removed = disk._flock, []

    def flock(fd, path, operation):
        if not removed:
            removed.append((tmp_path / ".lock").unlink())
        return real(fd, path, operation)

    for hold in (lambda: disk.locked_directory(tmp_path), lambda: disk.shared_directory(tmp_path, "a")):
        removed.clear()
        monkeypatch.setattr(disk, "_flock", flock)
        with hold():
            assert removed
            monkeypatch.setattr(disk, "_flock", real)
            with pytest.raises(InUseError), disk.locked_directory(tmp_path):
                pass


def test_one_holder_at_a_time(tmp_path):
    """Processes that take and leave a directory as fast as they can, removing its lock file, never hold it together."""
    code = """
import os, sys
from pathlib import Path
from sklformat.errors import InUseError
from sklformat.files.disk import locked_directory, shared_directory
directory, kind = Path(sys.argv[1]), sys.argv[2]
sys.stdin.read()
held = 0
while held < 40:
    try:
        with locked_directory(directory) if kind == "alone" else shared_directory(directory, kind + str(held)):
            os.close(os.open(directory / "taken", os.O_CREAT | os.O_EXCL))
            (directory / "taken").unlink()
            held += 1
    except InUseError:
        pass
"""
    start, hold = os.pipe()
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), kind], stdin=start, stderr=subprocess.PIPE)
        for kind in ("alone", "alone", "a", "b")
    ]
    os.close(start)
    os.close(hold)
    assert [(b"", 0)] * 4 == [(process.communicate()[1], process.returncode) for process in processes]
    assert [] == list(tmp_path.iterdir())


def test_processes_of_a_run_come_at_once(tmp_path):
    """However many processes of one run come at the same moment, all get in."""
    code = "import sys; from pathlib import Path; from sklformat.files.disk import shared_directory as s\n"
    code += "sys.stdin.read()\nwith s(Path(sys.argv[1]), 'run'): print('in', flush=True)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    start, hold = os.pipe()
    processes = [subprocess.Popen(command, stdin=start, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    os.close(start)
    os.close(hold)  # the end of all their inputs
    assert ["in\n"] * 4 == [process.communicate()[0] for process in processes]


def test_write_atomically(tmp_path, monkeypatch):
    """The file is the old one or the new one; a failure leaves the old one and nothing beside it."""
    path = tmp_path / "a"
    disk.write_atomically(path, b"old")
    disk.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"

    def fail(fd):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match="Input/output") as caught:
        disk.write_atomically(path, b"newer")
    assert str(path) == caught.value.filename
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["none/a", "directory"])
def test_what_cannot_be_replaced_is_named_as_it_is_called(tmp_path, name):
    """Not by the temporary file beside it, of which nobody knows."""
    (tmp_path / "directory").mkdir()
    with pytest.raises(OSError, match="directory") as caught:
        disk.write_atomically(tmp_path / name, b"new")
    assert str(tmp_path / name) == caught.value.filename
    assert [tmp_path / "directory"] == list(tmp_path.iterdir())


def test_a_killed_replacement_leaves_nothing(tmp_path):
    """What a writer left that was killed before the rename is taken over, whichever process comes next."""
    code = """
import os, signal, sys
from pathlib import Path
from sklformat.files import disk
disk.Disk.rename = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
disk.write_atomically(Path(sys.argv[1]), b"long enough to show if it were not cut")
"""
    path = tmp_path / "a"
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert -signal.SIGKILL == done.returncode
    assert not path.exists()
    disk.write_atomically(path, b"short")
    assert b"short" == path.read_bytes()
    assert [path] == list(tmp_path.iterdir())


def test_two_replacements_at_once_are_refused(tmp_path):
    """The temporary file is one writer's at a time."""
    path = tmp_path / "a"
    with (tmp_path / ".a.tmp").open("wb") as held:
        disk.lock(held.fileno(), path)
        with pytest.raises(InUseError, match="another process"):
            disk.write_atomically(path, b"new")


def test_sync_without_fdatasync(tmp_path, monkeypatch):
    """Where the system has no fdatasync, as on macOS, fsync takes its place."""
    synced = []
    monkeypatch.delattr(os, "fdatasync")
    monkeypatch.setattr(os, "fsync", synced.append)
    disk.Disk().sync(7)
    assert [7] == synced


def test_reading_needs_no_locks(tmp_path):
    """Where the system has no fcntl, shards are read; writing is refused with a typed error."""
    (tmp_path / "a.skl").write_bytes(small_shard(2))
    code = f"""
import sys
sys.modules["fcntl"] = None
import sklformat as skl
from pathlib import Path
with skl.open(Path({str(tmp_path / "a.skl")!r})) as cache:
    assert 2 == len([sequence.targets for sequence in cache])
    header = cache.header
try:
    skl.ShardWriter(Path({str(tmp_path / "b.skl")!r}), header=header)
except skl.UnsupportedError as error:
    assert "b.skl.partial: writing needs file locks" in str(error), error
else:
    raise AssertionError("written without a lock")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (0, "") == (done.returncode, done.stderr)
