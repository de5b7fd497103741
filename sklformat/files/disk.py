"""
Files that survive a crash: the only place that appends, syncs, renames and locks.

Knows nothing of the format.  A synced write stays; an fsync that fails is final, since the kernel may have dropped
the pages; a rename is durable once its directory is synced.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from sklformat.errors import InUseError, UnsupportedError
from sklformat.files.regular import check_regular

LOCK_NAME = ".lock"
"""Of the file that holds a directory, while it is held."""

_POLL_SECONDS = 0.02
_ALONE_SECONDS = 2.0


class Disk:
    """The system calls of a writer; tests put a faulty one in its place."""

    def create(self, path: Path) -> int:
        """Open a file that must not exist yet, for writing."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)

    def reopen(self, path: Path) -> int:
        """Open a regular file that exists, for writing."""
        check_regular(path)
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def write(self, fd: int, data: bytes | memoryview, offset: int) -> None:
        """Write all of ``data`` at ``offset``; a short write is continued where it ended."""
        rest = memoryview(data).cast("B")
        while len(rest):
            written = os.pwrite(fd, rest, offset)
            rest, offset = rest[written:], offset + written

    def truncate(self, fd: int, size: int) -> None:
        """Cut the file to ``size`` bytes."""
        os.ftruncate(fd, size)

    def sync(self, fd: int) -> None:
        """Make the file's bytes and size durable."""
        if hasattr(os, "fdatasync"):
            os.fdatasync(fd)
        else:  # macOS has none
            os.fsync(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Put ``source`` in the place of ``target``, durably."""
        source.rename(target)
        self.sync_directory(target.parent)

    def sync_directory(self, path: Path) -> None:
        """Make names in a directory durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def lock(fd: int, path: Path) -> None:
    """
    Hold a file for this process until it is closed.

    Raises:
        InUseError: Another process holds it.
        UnsupportedError: The system has no such lock.
    """
    if not _flock(fd, path, "LOCK_EX"):
        raise _in_use(path)


def _flock(fd: int, path: Path, operation: str) -> bool:
    """Take or change a lock without waiting; False: others are in the way."""
    try:
        import fcntl  # noqa: PLC0415  reading needs no lock, and works where there is none
    except ImportError:
        raise UnsupportedError(
            f"writing needs file locks (fcntl), which {sys.platform} does not have; write on Linux or macOS, "
            "read anywhere",
            path=path,
        ) from None
    try:
        fcntl.flock(fd, getattr(fcntl, operation) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _in_use(path: Path) -> InUseError:
    return InUseError(f"{path}: another process is writing here; wait for it, or choose another place")


def lock_named(fd: int, path: Path) -> None:
    """
    As ``lock``, and make sure that ``path`` still names the file: its writer may have renamed it before it let go.

    Raises:
        InUseError: Another process holds it, or finished it between opening and locking.
    """
    lock(fd, path)
    if not _is_named(fd, path):
        raise InUseError(f"{path}: another process finished it just now; look again")


@contextmanager
def locked_directory(directory: Path) -> Iterator[None]:
    """
    Hold a directory, made if it is missing, against a second writer; no lock file is left behind.

    Raises:
        InUseError: Another process holds it.
    """
    path = directory / LOCK_NAME
    directory.mkdir(parents=True, exist_ok=True)
    while True:
        with ExitStack() as held:
            fd = _open_lock(path, held)
            lock(fd, directory)
            if not _is_named(fd, path):
                continue  # its holder removed it between opening and locking
            held.callback(let_go, fd, path)
            yield
        return


def refuse_held(directory: Path) -> None:
    """
    Look whether another process holds a directory now; hold and make nothing.

    Raises:
        InUseError: One does.
    """
    try:
        fd = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return  # nobody holds it; or who wants to hold it is told what is wrong
    try:
        lock(fd, directory)
    finally:
        os.close(fd)


@contextmanager
def shared_directory(
    directory: Path, run: str, *, name: str = LOCK_NAME, patience: float = 0.0, inherited: bool = False
) -> Iterator[int]:
    """
    Hold a directory, made if it is missing, together with the other processes of one run, against any other run.

    No process leads: the first to come writes the run's name into the lock file, the others find their own there, the
    last to go removes it.  ``locked_directory`` counts as another run.

    Args:
        directory: What to hold.
        run: Name of the run, of at most 255 bytes; the same in all of its processes and in no other run's.
        name: The lock file.
        patience: Seconds to wait for another run to let go.
        inherited: Whether the descriptor goes to further processes, which hold the directory as well. The lock file
            stays, until the caller knows that they have ended (``let_go``).

    Yields:
        The descriptor that holds the lock.

    Raises:
        InUseError: Another run holds it still.
    """
    path = directory / name
    directory.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    while True:
        with ExitStack() as held:
            fd = _open_lock(path, held)
            if joined := _join_run(fd, directory, run):
                if not _is_named(fd, path):
                    continue  # the last of a run removed it between opening and locking
                if not inherited:
                    held.callback(let_go, fd, path)
                yield fd
                return
        # A process of the same run holds the lock alone for the moment in which it comes first.
        limit = patience if joined is False else max(patience, _ALONE_SECONDS)
        waited = time.monotonic() - begin
        if waited > limit:
            raise _in_use(directory)
        time.sleep(min(max(_POLL_SECONDS, waited / 10), 1.0))  # of many that wait long, none asks often


@contextmanager
def turn(path: Path) -> Iterator[None]:
    """
    Hold a lock file, made if it is missing, when the other processes that want it are done; one thread at a time.

    It saves work, no more: where the system or the file system has no such locks, nobody waits.  A process that is
    forked meanwhile does not hold it.
    """
    with ExitStack() as held:
        with suppress(ImportError, OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = _open_lock(path, held)
            while not _take_turn(fd):
                time.sleep(_POLL_SECONDS)
        yield


def _take_turn(fd: int) -> bool:
    """False: processes seem to wait for each other; the system does not know that other threads hold the locks."""
    import fcntl  # noqa: PLC0415  as above

    try:
        fcntl.lockf(fd, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno == errno.EDEADLK:
            return False
        raise
    return True


def let_go(fd: int, path: Path) -> None:
    """
    Remove a lock file that is about to be closed, unless other processes hold it too.

    Whoever opened it before and locks it afterwards finds that it lost its name, and looks again.
    """
    with suppress(OSError):  # a file that stays does no harm
        if _flock(fd, path, "LOCK_EX") and _is_named(fd, path):
            path.unlink()


def _open_lock(path: Path, held: ExitStack) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    held.callback(os.close, fd)
    return fd


def _is_named(fd: int, path: Path) -> bool:
    """Whether a path still names the file that was opened there."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _join_run(fd: int, directory: Path, run: str) -> bool | None:
    """True: the run's lock is held now. False: another run's name is in the file. None: one process holds it alone."""
    if _flock(fd, directory, "LOCK_EX"):
        os.ftruncate(fd, 0)
        os.pwrite(fd, run.encode(), 0)
    if not _flock(fd, directory, "LOCK_SH"):
        return None
    if os.pread(fd, 256, 0) == run.encode():
        return True
    _flock(fd, directory, "LOCK_UN")
    return False


@contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """
    Let a call that fails say of which file it was: on a descriptor, such as a write to a full disk, or on the name that
    the file has meanwhile.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, None if temporary is None else str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def make_place_of(path: Path) -> None:
    """Make the directory that a file will be in; best before the work that the file is of, which else may be lost."""
    path.parent.mkdir(parents=True, exist_ok=True)


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """
    Replace ``path`` by ``data``: a crash leaves the old file or the new one, whole.

    The temporary file beside it always has the same name, so that the next call takes over what a killed one left.

    Raises:
        InUseError: Another process is replacing the same file.
    """
    disk = Disk()
    temporary = path.with_name(f".{path.name}.tmp")
    with naming(path, temporary):
        fd = os.open(str(temporary), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        lock_named(fd, temporary)
        try:
            with naming(path, temporary):
                disk.truncate(fd, 0)
                disk.write(fd, data, 0)
                disk.sync(fd)
                disk.rename(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    finally:
        os.close(fd)
