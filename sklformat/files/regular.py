"""
Regular files and nothing else: whatever a path names, it is opened or refused at once, with an error that says why.

Opening a named pipe waits for its writer, and a device may give endless bytes or do something when it is opened.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from sklformat.errors import UnreadableError

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_ADVICE = {
    errno.ELOOP: "remove the link and put the file itself here",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ENOTDIR: "correct the path",
    errno.EIO: "the disk or the connection to it fails: copy the file from elsewhere",
    errno.ESTALE: "the network file system lost the file: open it again",
}


def open_regular(path: Path) -> int:
    """
    Open a regular file for reading; the caller closes the descriptor.

    Raises:
        FileNotFoundError: Nothing is there.
        UnreadableError: Something is, but no regular file that the system lets this process read.
    """
    check_regular(path)  # a device is not even opened
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise unreadable(error, path) from error
    try:
        _check_mode(os.fstat(fd).st_mode, path)  # another file may have come to the path meanwhile
    except BaseException:
        os.close(fd)
        raise
    return fd


def check_regular(path: Path) -> None:
    """
    Make sure that a path names a regular file, after following links.

    Raises:
        FileNotFoundError, UnreadableError: As ``open_regular``.
    """
    _check_mode(_mode(path), path)


def check_exists(path: Path) -> None:
    """
    Make sure that a path that the user gave names something.

    Raises:
        FileNotFoundError: It does not.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory")


def is_directory(path: Path) -> bool:
    """
    Say whether a path names a directory.

    Raises:
        FileNotFoundError: Nothing is there.
        UnreadableError: The system does not say what is there.
    """
    return stat.S_ISDIR(_mode(path))


def list_directory(path: Path) -> list[Path]:
    """
    What a directory holds, in the order of names.

    Raises:
        FileNotFoundError, UnreadableError: As ``is_directory``.
    """
    try:
        return sorted(path.iterdir())
    except OSError as error:
        raise unreadable(error, path) from error


def unreadable(error: OSError, path: Path, offset: int | None = None) -> OSError:
    """What the system said of a file, as an error of this package; where nothing is, it stays FileNotFoundError."""
    reason, advice = error.strerror or str(error), _ADVICE.get(error.errno or 0, "make it readable for this process")
    if isinstance(error, FileNotFoundError):
        if not path.is_symlink():
            return FileNotFoundError(error.errno, reason, str(path))
        reason, advice = f"a link to {path.readlink()}, where nothing is", "put the file there, or remove the link"
    typed = UnreadableError(f"{reason}; {advice}", path=path, offset=offset)
    typed.errno = error.errno
    return typed


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError as error:
        raise unreadable(error, path) from error


def _check_mode(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no file")
        raise UnreadableError(f"is {kind}, must be a regular file; put the file itself here", path=path)
