"""
What a crash left of an unsealed shard: its valid prefix is kept, the torn tail behind it is named and cut.

Reads and cuts ``.partial`` files, begins one with what a sealed shard holds, and never appends.  SPEC.md section 10.4.
"""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sklformat.cache.contents import partial_path
from sklformat.cache.shard import Shard
from sklformat.errors import CorruptError, FormatError, TruncatedError
from sklformat.files.disk import Disk, lock_named, naming
from sklformat.files.regular import open_regular
from sklformat.format import layout
from sklformat.format.block import BlockHeader, check_payload, decode_body, locate, parse_block_header
from sklformat.format.header import Header, parse_header
from sklformat.format.index import Index

_HEADER_BEGIN = layout.HEADER_MAGIC + layout.VERSION_MAJOR.to_bytes(2, "little")
_CHUNK = 1 << 20
_COPIED_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Recovered:
    """
    What was kept of an unsealed shard.

    Attributes:
        path: The ``.partial`` file.
        sequences: Number of whole, valid sequences kept.
        bytes_cut: Bytes behind them that were cut off.
        cause: Why these bytes could not be kept; None where there were none.
        sequences_cut: Later blocks among them that are whole by their headers.  A crash leaves some where the system
            wrote later bytes before earlier ones; a medium that lost bytes leaves all that followed.
    """

    path: Path
    sequences: int
    bytes_cut: int
    cause: str | None = None
    sequences_cut: int = 0

    def __str__(self) -> str:
        cut = f"{self.bytes_cut} bytes cut"
        if self.cause is not None:
            cut += f" ({self.cause})"
        if self.sequences_cut:
            cut += f", {self.sequences_cut} whole sequences after the fault among them"
        return f"{self.path}: {self.sequences} sequences kept, {cut}"


@dataclass(frozen=True, slots=True)
class Prefix:
    """
    The valid prefix of an unsealed shard.

    Attributes:
        header: None where the crash came before the header was durable: nothing was acknowledged.
        index: Its blocks.
        end: Where they end; 0 without a header.
        fault: What is wrong with the bytes that follow; None where the file ends there.
    """

    header: Header | None
    index: Index
    end: int
    fault: FormatError | None


def recover(path: Path | str) -> Recovered:
    """
    Keep the valid prefix of an unsealed shard and cut its torn tail.

    Args:
        path: ``<name>.partial``, or the shard's final name.

    Returns:
        How many sequences are kept, how many bytes were cut, and why.

    Raises:
        FileNotFoundError: There is no ``.partial``; a sealed shard is never cut.
        InUseError: A writer has it open.
        CorruptError, UnsupportedError: The header is damaged or of another version; nothing is changed.

    Source: SPEC section 10.4.
    """
    given = Path(path)
    partial = given
    if not given.name.endswith(layout.PARTIAL_SUFFIX):
        partial = partial_path(given)
    if not partial.exists():
        state = "a sealed shard is never cut, verify says whether it is sound" if given.exists() else "no such file"
        raise FileNotFoundError(f"{given}: {state}; there is no {partial.name} to recover")
    disk = Disk()
    fd = disk.reopen(partial)
    try:
        lock_named(fd, partial)
        return keep(fd, partial, scan(fd, partial), disk)
    finally:
        os.close(fd)


def unseal(path: Path) -> None:
    """
    Begin a ``.partial`` with all sequences of a sealed shard, so that more can be appended, and remove the shard.

    What it holds is checked and copied: whoever has the sealed file open keeps it as it is.  A crash leaves the sealed
    shard, perhaps with a ``.partial`` that the next call makes again, or the ``.partial`` with all of it.

    Args:
        path: The sealed shard; the caller has made sure that nobody takes the cache for a whole one meanwhile.

    Raises:
        FormatError: The shard is damaged; it stays.
        InUseError: A writer has the ``.partial`` open.
        OSError: The system's own.
    """
    disk, partial = Disk(), partial_path(path)
    with closing(Shard(path, "pread")) as shard:
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            with naming(partial):
                lock_named(fd, partial)
                disk.truncate(fd, 0)
                disk.write(fd, shard.header.pack(), 0)
                end = layout.HEADER_SIZE
                for group in shard.groups(range(len(shard)), _COPIED_BYTES):
                    data, _ = shard.blocks(group)
                    disk.write(fd, data.data, end)
                    end += data.size
                disk.sync(fd)
                disk.sync_directory(path.parent)
                path.unlink()
                disk.sync_directory(path.parent)
        finally:
            os.close(fd)


def keep(fd: int, path: Path, prefix: Prefix, disk: Disk) -> Recovered:
    """
    Cut a file that the caller has locked to its valid prefix, and make that durable.

    A writer that was killed may have synced neither the blocks found here nor the file's name.
    """
    cut = os.fstat(fd).st_size - prefix.end
    later = 0 if prefix.header is None else _count_blocks(fd, prefix.header, prefix.end)
    if cut:
        disk.truncate(fd, prefix.end)
    disk.sync(fd)
    disk.sync_directory(path.parent)
    return Recovered(path, len(prefix.index), cut, str(prefix.fault) if prefix.fault and cut else None, later)


def scan(fd: int, path: Path) -> Prefix:
    """
    Find the valid prefix of an unsealed shard; every block of it is checked as a reader would.

    Raises:
        CorruptError, UnsupportedError: The header is damaged, or something here is of another version.
    """
    size = os.fstat(fd).st_size
    try:
        header = parse_header(os.pread(fd, layout.HEADER_SIZE, 0))
    except FormatError as error:
        if size <= layout.HEADER_SIZE and _never_synced(fd, size):
            return Prefix(None, Index(), 0, error)
        raise locate(error, path=path) from None
    key, index, end = header.shard_key, Index(), layout.HEADER_SIZE
    while end < size:
        try:
            block = _read_block(fd, header, key, len(index), end)
        except FormatError as error:
            locate(error, section="block", sequence=len(index), offset=end)
            if isinstance(error, CorruptError | TruncatedError):
                return Prefix(header, index, end, error)
            raise locate(error, path=path) from None  # of a newer kind, and no torn tail
        index.append(end, block)
        end += block.size
    return Prefix(header, index, end, None)


def count_blocks(path: Path) -> tuple[Header | None, int]:
    """
    Settings and number of whole sequences of an unsealed shard, by its headers alone; a writer may be at work on it.

    No payload is read: what a crash tore inside of one, only ``recover`` finds.

    Returns:
        None and 0 where there is no whole header yet.

    Raises:
        FileNotFoundError, UnreadableError: As ``open_regular``.
    """
    fd = open_regular(path)
    try:
        size, end, number = os.fstat(fd).st_size, layout.HEADER_SIZE, 0
        try:
            header = parse_header(os.pread(fd, layout.HEADER_SIZE, 0))
        except FormatError:
            return None, 0
        while end < size:
            try:
                block = parse_block_header(
                    os.pread(fd, layout.BLOCK_HEADER_SIZE, end), header, header.shard_key, number
                )
            except FormatError:
                break
            if end + block.size > size:
                break
            end, number = end + block.size, number + 1
        return header, number
    finally:
        os.close(fd)


def _never_synced(fd: int, size: int) -> bool:
    """A header that a crash cut short or tore: begun as ours, or zeros where its first sector never arrived."""
    begin = os.pread(fd, min(size, len(_HEADER_BEGIN)), 0)
    return _HEADER_BEGIN.startswith(begin) or not any(begin)


def _read_block(fd: int, header: Header, key: int, number: int, offset: int) -> BlockHeader:
    block = parse_block_header(os.pread(fd, layout.BLOCK_HEADER_SIZE, offset), header, key, number)
    if offset + block.size > os.fstat(fd).st_size:  # before anything is allocated
        raise TruncatedError(f"block of {block.size} bytes ends past the end of the file")
    body = check_payload(os.pread(fd, block.size, offset), block, key)
    decode_body(header, block, body)
    return block


def _count_blocks(fd: int, header: Header, fault: int) -> int:
    """Blocks behind the one at byte ``fault``; their payloads are not read, so that no claim costs time."""
    found, key, end, size = 0, header.shard_key, fault, os.fstat(fd).st_size
    for chunk_start in range(fault, size, _CHUNK):
        chunk = np.frombuffer(os.pread(fd, _CHUNK, chunk_start), np.uint8)
        lines = chunk[: chunk.size // layout.ALIGN * layout.ALIGN].reshape(-1, layout.ALIGN)
        magic = np.frombuffer(layout.BLOCK_MAGIC, np.uint8)
        for line in np.flatnonzero((lines[:, : magic.size] == magic).all(axis=1)).tolist():
            offset, data = chunk_start + line * layout.ALIGN, lines[line].tobytes()
            number = layout.unpack(layout.BLOCK_FIELDS, data)["block_number"]
            if offset < end:  # a payload that looks like a header
                continue
            try:
                end = offset + parse_block_header(data, header, key, number).size
            except FormatError:
                continue
            found += fault < offset and end <= size
    return found
