"""Members of tar files, found by their headers and read one by one, unpacked; and tars written."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import NamedTuple

from sklformat.errors import CorruptError
from sklformat.files import zstd

_PIECE = 1 << 16
_MOST_TIMES, _MOST_BYTES = 1000, 64 << 20  # of its size, or bytes: what a member may unpack to


class Member(NamedTuple):
    """Where the ``size`` bytes of a file in a tar are."""

    path: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """
        Its bytes.

        Raises:
            OSError: The system's own.
        """
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def unpack(self) -> bytes:
        """
        Its bytes, of one that is packed as Zstandard.

        Raises:
            ValueError: It is not, is damaged, or unpacks to an absurd size.
            ModuleNotFoundError: zstandard is missing.
            OSError: The system's own.
        """
        packed = self.read()
        limit = max(_MOST_TIMES * len(packed), _MOST_BYTES)
        content = bytearray()
        for piece in zstd.unpack(packed[i : i + _PIECE] for i in range(0, len(packed), _PIECE)):
            content += piece
            if len(content) > limit:
                raise ValueError(f"its content is out of proportion, more than {limit:,} bytes")
        return bytes(content)


def find_members(path: Path) -> list[Member]:
    """
    The regular files in a tar that is not packed, in their order.

    Raises:
        CorruptError: It is none, or ends inside a member; one that lost whole members looks whole.
        OSError: The system's own.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            return [Member(path, entry.name, entry.offset_data, entry.size) for entry in archive if entry.isreg()]
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise CorruptError(f"tar: {error}", path=path) from None


class TarWriter:
    """
    A tar whose bytes depend on names and contents alone.

    Args:
        path: The file; replaced if it is there.
    """

    def __init__(self, path: Path) -> None:
        self._archive = tarfile.open(path, "w")  # noqa: SIM115  close() does

    def add(self, name: str, content: bytes) -> None:
        """One more file."""
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        self._archive.addfile(entry, io.BytesIO(content))

    def close(self) -> None:
        """Complete the tar."""
        self._archive.close()
