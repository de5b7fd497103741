"""
Local copies of what was read behind URLs: pieces of files in a directory that many processes share, bounded in bytes.

Knows nothing of the format.  Nothing here has to survive a crash: each piece carries its checksum, and one that is
torn, damaged or gone is fetched again.
"""

from __future__ import annotations

import itertools
import os
import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sklformat.checksums import checksum, fingerprint
from sklformat.files import remote
from sklformat.files.disk import turn

PIECE = 1 << 20
"""Bytes that are fetched in one request: pieces begin at multiples of it."""

_IN_MEMORY = 16  # pieces: those of a batch or two
_AT_ONCE = 8  # of these, fetched side by side: a store answers slowly, and many requests as fast as one
_SUM = 8  # bytes of the checksum behind a piece
_LANES = 64  # of pieces: one piece of each is fetched at a time, whichever thread or process wants it
_TRIES = 100
_SHARE = 64  # part of the bound that a process adds before it looks at the whole directory again


class LocalCopies:
    """
    A directory of pieces of remote files, used by any number of processes at a time.

    Args:
        directory: Where; None: ``~/.cache/sklformat``.
        max_bytes: Above it the pieces that were not used for the longest time are removed, to within a sixty-fourth of
            it for each process that reads; at least one piece.
    """

    def __init__(self, directory: Path | str | None = None, max_bytes: int = 16 << 30) -> None:
        if max_bytes < PIECE + _SUM:
            raise ValueError(f"local copies need at least {PIECE + _SUM} bytes, got {max_bytes}")
        self.directory = Path.home() / ".cache" / "sklformat" if directory is None else Path(directory)
        self.max_bytes = max_bytes
        self._forget()

    def _forget(self) -> None:
        """Begin as a new process does, with a lock that no thread of another one holds."""
        self._lock = threading.Lock()
        self._fetching = [threading.Lock() for _ in range(_LANES)]
        self._memory: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._added: int | None = None  # bytes since the directory was looked at; None: never
        self._numbers = itertools.count()
        self._pid = os.getpid()  # last: another thread that sees it uses the rest

    def _keep_own(self) -> None:
        if self._pid != os.getpid():
            self._forget()

    def __getstate__(self) -> tuple[Path, int]:
        return self.directory, self.max_bytes

    def __setstate__(self, state: tuple[Path, int]) -> None:
        self.directory, self.max_bytes = state
        self._forget()

    def read(self, url: str, identity: str, size: int, offset: int, length: int) -> bytes:
        """
        Bytes ``offset`` to ``offset + length`` of a remote file of ``size`` bytes.

        Args:
            url: The file.
            identity: Of the file's content; another content at the same URL must have another.
            size: Of the whole file.
            offset: First byte.
            length: How many, not beyond the end.

        Raises:
            FileNotFoundError, RemoteError: As ``remote.read_range``.
            OSError: The directory cannot be written.
        """
        self._keep_own()
        key = _key(url, identity, size)
        parts = []
        for number in range(offset // PIECE, -(-(offset + length) // PIECE)):
            start = number * PIECE
            piece = self._piece(url, key, number, min(PIECE, size - start))
            parts.append(piece[max(offset - start, 0) : offset + length - start])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def prepare(self, url: str, identity: str, size: int, spans: Iterable[tuple[int, int]]) -> None:
        """
        Fetch what is missing of (offset, length) spans that are about to be read, side by side: sixteen pieces at most.

        Args, errors: As ``read``.
        """
        self._keep_own()
        key = _key(url, identity, size)
        wanted = {n for start, length in spans for n in range(start // PIECE, -(-(start + length) // PIECE))}
        missing = list(itertools.islice((n for n in sorted(wanted) if not self._is_here(key, n)), _IN_MEMORY))
        if len(missing) > 1:
            with ThreadPoolExecutor(min(len(missing), _AT_ONCE), thread_name_prefix="sklformat-fetch") as pool:
                list(pool.map(lambda n: self._piece(url, key, n, min(PIECE, size - n * PIECE)), missing))

    def forget(self, url: str, identity: str, size: int) -> None:
        """Remove the pieces of a file, so that what is read next is what the store gives then."""
        self._keep_own()
        key = _key(url, identity, size)
        with self._lock:
            for kept in [kept for kept in self._memory if kept[0] == key]:
                del self._memory[kept]
        shutil.rmtree(self._path(key, 0).parent, ignore_errors=True)

    def _is_here(self, key: str, number: int) -> bool:
        with self._lock:
            in_memory = (key, number) in self._memory
        return in_memory or self._path(key, number).exists()

    def _path(self, key: str, number: int) -> Path:
        return self.directory / key[:2] / key / str(number)

    def _piece(self, url: str, key: str, number: int, length: int) -> bytes:
        lane = (int(key[:16], 16) + number) % _LANES  # the same in all processes
        with self._fetching[lane]:
            with self._lock:
                if (found := self._memory.get((key, number))) is not None:
                    self._memory.move_to_end((key, number))
                    return found
            path = self._path(key, number)
            seed = (int(key[:16], 16) + number) % (1 << 64)
            piece = self._kept(path, seed, length)
            if piece is None:
                with turn(self.directory / "turns" / str(lane)):
                    piece = self._kept(path, seed, length)  # by another process, meanwhile
                    if piece is None:
                        piece = remote.read_range(url, number * PIECE, length)
                        self._keep(path, piece + checksum(piece, seed).to_bytes(_SUM, "little"))
            with self._lock:
                self._memory[key, number] = piece
                while len(self._memory) > _IN_MEMORY:
                    self._memory.popitem(last=False)
            return piece

    def _kept(self, path: Path, seed: int, length: int) -> bytes | None:
        """The piece that is in the directory, if it is whole."""
        try:
            data = path.read_bytes()
            os.utime(path)  # used just now
        except FileNotFoundError:  # never there, or removed by a process that needed room
            return None
        piece, stored = data[:-_SUM], data[-_SUM:]
        sound = len(piece) == length and checksum(piece, seed).to_bytes(_SUM, "little") == stored
        return piece if sound else None

    def _keep(self, path: Path, data: bytes) -> None:
        """Put a piece in its place as a whole; a process that puts it there as well puts the same."""
        with self._lock:
            temporary = path.with_name(f".{path.name}.{os.getpid()}.{next(self._numbers)}")
        for tries_left in reversed(range(_TRIES)):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_bytes(data)
                temporary.replace(path)
                break
            except (FileNotFoundError, FileExistsError):  # the directory was removed by a process that made room
                if tries_left == 0:
                    raise
        with self._lock:
            self._added = None if self._added is None else self._added + len(data)
            full = self._added is None or self._added > self.max_bytes // _SHARE
            if full:
                self._added = 0
        if full:
            self._make_room()

    def _pieces(self) -> Iterator[Path]:
        """The pieces of all files, ``??/*/*``; what another process removes meanwhile is passed over."""
        for folder, inside, names in os.walk(self.directory):  # ignores folders that vanish, as Path.glob does not
            place = Path(folder)
            parts = place.relative_to(self.directory).parts
            if len(parts) == 2:
                yield from (place / name for name in names)
                inside.clear()
            elif not parts:
                inside[:] = [name for name in inside if len(name) == 2]

    def _make_room(self) -> None:
        """Remove what was not used for the longest time until the bound holds, with room for this process's share."""
        files = []
        for place in self._pieces():
            try:
                facts = place.stat()
            except FileNotFoundError:
                continue
            files.append((facts.st_mtime_ns, facts.st_size, place))
        files.sort(key=lambda file: file[0])
        excess = sum(size for _, size, _ in files) - (self.max_bytes - self.max_bytes // _SHARE)
        for _, size, place in files[:-1]:  # the last one is what was just put there
            if excess <= 0:
                break
            place.unlink(missing_ok=True)
            excess -= size
            try:
                place.parent.rmdir()
            except OSError:
                continue  # not empty


def _key(url: str, identity: str, size: int) -> str:
    """Name of the folder of a file's pieces."""
    return fingerprint(f"{url}\n{identity}\n{size}".encode())
