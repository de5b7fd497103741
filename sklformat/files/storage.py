"""
The bytes of a sealed file, wherever it lies: mapped into memory, read piece by piece, or behind a URL.

Knows nothing of the format.  A mapping is the fastest way on a local disk.  Elsewhere a page that cannot be read kills
the process, where a read fails with an error; so there, and where nobody knows, files are read.
"""

from __future__ import annotations

import functools
import mmap
import os
import re
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from pathlib import Path
from typing import Literal

from sklformat.errors import TruncatedError
from sklformat.files import remote
from sklformat.files.copies import LocalCopies
from sklformat.files.places import Place
from sklformat.files.regular import check_regular, open_regular, unreadable
from sklformat.native import address_of

Io = Literal["auto", "mmap", "pread"]

PIECE = 8 << 20
"""Bytes that a file behind a URL is read by where it is read once, from begin to end."""

_IN_MEMORY = 3  # such pieces: the end of a file, and two that a read may lie across
_MORE = 4096  # bytes that are asked for beyond the size that a file claims
_MOUNTS = Path("/proc/self/mountinfo")
_LOCAL = {
    *("apfs", "bcachefs", "btrfs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs", "hfsplus", "iso9660", "jfs"),
    *("ntfs3", "overlay", "ramfs", "reiserfs", "squashfs", "tmpfs", "vfat", "xfs", "zfs"),
}


class OpenFile(ABC):
    """
    A file open for reading; it is closed, or unmapped, when nobody refers to it any more, and so never while in use.

    Attributes:
        size: Bytes when it was opened.
        address: Of its first byte in memory, where it is mapped; None: it is read.
    """

    size: int
    address: int | None = None

    def read(self, offset: int, length: int) -> memoryview:
        """Some bytes, to be released by the caller; of a mapped file a view into the mapping, cut at its end."""
        data = memoryview(bytearray(length))
        self.read_into(offset, data)
        return data

    @abstractmethod
    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes from ``offset`` on."""

    def prepare(self, spans: list[tuple[int, int]]) -> None:  # noqa: B027  most files have nothing to prepare
        """Told of the (offset, length) spans that are read next, do what is quicker for all of them together."""

    def forget(self) -> bool:
        """Told that bytes are wrong, let go once of those that came over a network; True: others may come."""
        return False


def empty(path: Place) -> TruncatedError:
    """That a file has no byte."""
    return TruncatedError("the file is empty", path=path)


class MappedFile(OpenFile):
    """A file mapped read-only; damage of the medium, or a file cut short by another process, kills the process."""

    def __init__(self, path: Path) -> None:
        fd = open_regular(path)
        try:
            self.size = os.fstat(fd).st_size
            if self.size == 0:
                raise empty(path)
            self._view = memoryview(mmap.mmap(fd, self.size, access=mmap.ACCESS_READ))
        finally:
            os.close(fd)
        self.address: int | None = address_of(self._view)

    def read(self, offset: int, length: int) -> memoryview:
        return self._view[offset : offset + length]

    def read_into(self, offset: int, out: memoryview) -> None:
        out[:] = self._view[offset : offset + len(out)]


class ReadFile(OpenFile):
    """A file that is read piece by piece; whatever happens to it is an error of the read that meets it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = open_regular(path)
        close = weakref.finalize(self, os.close, self._fd)
        self.size = os.fstat(self._fd).st_size
        if self.size == 0:
            close()  # now: the error's traceback refers to this object
            raise empty(path)

    def fileno(self) -> int:
        """Its descriptor, open for as long as this object is there."""
        return self._fd

    def read_into(self, offset: int, out: memoryview) -> None:
        done = 0
        while done < len(out):
            try:
                count = os.preadv(self._fd, [out[done:]], offset + done)
            except OSError as error:
                raise unreadable(error, self.path, offset + done) from error
            if count == 0:
                raise TruncatedError(
                    f"ends at byte {offset + done}, had {self.size} bytes when it was opened; it was cut short or "
                    "written over: put it back, or capture it again",
                    path=self.path,
                    offset=offset + done,
                )
            done += count


class RemoteFile(OpenFile):
    """A file behind a URL, read by ranges through local copies."""

    def __init__(self, url: str, size: int, identity: str, copies: LocalCopies) -> None:
        self.url, self.size, self.identity, self.copies = url, size, identity, copies
        self._doubted = False

    def read(self, offset: int, length: int) -> memoryview:
        return memoryview(self.copies.read(self.url, self.identity, self.size, offset, length))

    def read_into(self, offset: int, out: memoryview) -> None:
        out[:] = self.read(offset, len(out))

    def prepare(self, spans: list[tuple[int, int]]) -> None:
        self.copies.prepare(self.url, self.identity, self.size, spans)

    def forget(self) -> bool:
        if not self._doubted:  # where the store has them so, once is enough
            self.copies.forget(self.url, self.identity, self.size)
            self._doubted = True
        return True


class StreamedFile(OpenFile):
    """A file behind a URL that is read once: the store's own bytes, no local copies, a few pieces of it in memory."""

    def __init__(self, url: str, size: int) -> None:
        if size == 0:
            raise empty(url)
        self.url, self.size = url, size
        self._pieces: OrderedDict[int, bytes] = OrderedDict()
        self._doubted = False

    def read_into(self, offset: int, out: memoryview) -> None:
        done = 0
        while done < len(out):
            number, skipped = divmod(offset + done, PIECE)
            part = self._piece(number)[skipped : skipped + len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)

    def forget(self) -> bool:
        if not self._doubted:
            self._pieces.clear()
            self._doubted = True
        return True

    def _piece(self, number: int) -> bytes:
        if number not in self._pieces:
            start, last = number * PIECE, (self.size - 1) // PIECE
            # The end is kept: it is read first, for the index, and again behind all blocks.
            if len(self._pieces) == _IN_MEMORY:
                del self._pieces[next(kept for kept in self._pieces if kept != last)]
            self._pieces[number] = remote.read_range(self.url, start, min(PIECE, self.size - start))
        self._pieces.move_to_end(number)
        return self._pieces[number]


def open_file(path: Path, io: Io) -> OpenFile:
    """
    Open a file of this machine.

    Args:
        path: The file.
        io: "mmap" or "pread"; "auto": mmap on local file systems, pread on network and unknown ones.

    Raises:
        TruncatedError: It is empty.
        FileNotFoundError, UnreadableError: As ``open_regular``.
        OSError: As the operating system reports it.
        ValueError: There is no such ``io``.
    """
    if io not in ("auto", "mmap", "pread"):
        raise ValueError(f"io must be auto, mmap or pread, got {io!r}")
    check_regular(path)
    if io == "auto":
        io = _io_of(path.resolve().parent)  # of the file itself, which a link may have elsewhere
    return MappedFile(path) if io == "mmap" else ReadFile(path)


@functools.lru_cache(maxsize=64)
def _io_of(directory: Path) -> Io:
    """How files of a directory are read."""
    if not hasattr(os, "preadv"):
        return "mmap"
    mounts = _MOUNTS.read_text(errors="replace") if _MOUNTS.exists() else ""
    return "mmap" if file_system(directory.resolve(), mounts) in _LOCAL else "pread"


def file_system(path: Path, mounts: str) -> str:
    """
    Type of the file system that a path lies on, such as "ext4" or "nfs4"; "unknown" where no line says it.

    Args:
        path: Absolute, without links.
        mounts: Text of /proc/self/mountinfo.
    """
    found, length = "unknown", -1
    for line in mounts.splitlines():
        fields, _, rest = line.partition(" - ")
        words = fields.split()
        if len(words) < 5 or not rest:
            continue
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), words[4]))
        # Of those that hold the path the innermost counts, and of those at one place the last: it covers the others.
        if path.is_relative_to(point) and len(point.parts) >= length:
            found, length = rest.split()[0], len(point.parts)
    return found


def read_start(place: Place, most: int) -> bytes:
    """
    The first ``most`` bytes of a file, or all of a smaller one, whatever size it claims to have.

    Raises:
        FileNotFoundError, UnreadableError: As ``open_regular``.
    """
    if isinstance(place, str):
        return remote.read_range(place, 0, min(remote.size(place), most))
    fd, parts, done = open_regular(place), [], 0
    try:
        size = os.fstat(fd).st_size
        while part := os.read(fd, min(most - done, max(size - done, 0) + _MORE)):
            parts.append(part)
            done += len(part)
    except OSError as error:
        raise unreadable(error, place, done) from error
    finally:
        os.close(fd)
    return b"".join(parts)
