"""
One sealed shard read through a memory map; every byte is checked before it is believed.

Nothing that leaves this module looks into the mapping, but for addresses that C reads from.  SPEC.md section 13.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sklformat import layout
from sklformat.block import BlockHeader, check_payload, decode_body, locate, parse_block_header
from sklformat.checksums import checksum
from sklformat.errors import CorruptError, FormatError, TruncatedError
from sklformat.header import Header, parse_header
from sklformat.index import SealedIndex, Trailer, parse_index, parse_trailer, payload_sizes
from sklformat.manifest import Entry
from sklformat.native import address_of
from sklformat.records import Sequence


class Shard:
    """
    One sealed shard, mapped read-only; its header, trailer and index are checked on opening, blocks when touched.

    Args:
        path: The file.

    Raises:
        FormatError: Its children, as ``parse_header``, ``parse_trailer`` and ``parse_index`` say.
        OSError: The system's own.
    """

    header: Header
    trailer: Trailer
    index: SealedIndex

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        with self.path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise TruncatedError("the file is empty", path=self.path)
            self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        self._view = memoryview(self._map)
        self._address = address_of(self._view)
        self._checked = np.zeros(0, np.bool_)
        try:
            self._open(size)
        except FormatError as error:
            self.close()
            raise locate(error, path=self.path) from None

    def _open(self, size: int) -> None:
        first = bytes(self._view[: layout.HEADER_SIZE])
        self.header = parse_header(first)
        self.key = self.header.shard_key
        end = bytes(self._view[max(size - layout.TRAILER_SIZE, 0) :])
        self.trailer = parse_trailer(end, self.key, size)
        start = self.trailer.index_offset
        packed = self._view[start : start + self.trailer.index_size]
        try:
            self.index = parse_index(packed, self.trailer, first, self.header, self.key)
        finally:
            packed.release()
        self._checked = np.zeros(len(self.index), np.bool_)
        self._payload_sizes = payload_sizes(self.header, self.index.num_positions, self.index.num_records)
        self._ends = np.append(self.index.offset[1:], np.uint64(self.trailer.index_offset))

    def __len__(self) -> int:
        return len(self.index)

    @property
    def fingerprint(self) -> str:
        """The root digest: identity of the shard's whole content.  SPEC section 6.4."""
        return self.index.root

    def __getitem__(self, number: int) -> Sequence:
        """
        Decode sequence ``number`` of this shard.

        Raises:
            IndexError: There is no such sequence.
            CorruptError, UnsupportedError: Its block is damaged or of a newer kind.
            ValueError: The shard is closed.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"{self.path}: sequence {number} of {len(self)}")
        offset = int(self.index.offset[number])
        try:
            block, body = self.block(number)
            try:
                return decode_body(self.header, block, body)
            finally:
                body.release()
        except FormatError as error:
            raise locate(error, path=self.path, section="block", sequence=number, offset=offset) from None

    def block(self, number: int) -> tuple[BlockHeader, memoryview]:
        """
        The checked header of a block and a view of its payload with padding, which the caller must release.

        The payload is checksummed when the block is touched for the first time.
        """
        self._check_open()
        index, offset = self.index, int(self.index.offset[number])
        with self._view[offset : offset + layout.BLOCK_HEADER_SIZE] as head:
            block = parse_block_header(head, self.header, self.key, number)
        expected = (
            int(index.alignment[number]),
            int(index.block_checksum[number]),
            int(index.num_positions[number]),
            int(index.num_records[number]),
        )
        if (block.alignment, block.block_checksum, block.num_positions, block.num_records) != expected:
            raise CorruptError("the block's header contradicts the index")
        if self._checked[number]:
            return block, self._view[offset + layout.BLOCK_HEADER_SIZE : offset + block.size]
        with self._view[offset : offset + block.size] as whole:
            body = check_payload(whole, block, self.key)
        self._checked[number] = True
        return block, body

    def payloads(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """
        Addresses and sizes in bytes of checked payloads with their padding, for C; valid while the shard is open.

        Headers and payloads are checked when they are touched for the first time; records and tokens are the decoder's
        to check.

        Args:
            numbers: Sequences of this shard.

        Raises:
            FormatError: As ``shard[number]``.
        """
        self._check_open()
        for number in numbers[~self._checked[numbers]].tolist():
            self._touch(number)
            self._checked[number] = True
        starts = self.index.offset[numbers] + np.uint64(layout.BLOCK_HEADER_SIZE)
        return starts + np.uint64(self._address), self._ends[numbers] - starts

    def _touch(self, number: int) -> None:
        """Check header and payload of a block against the index; what is wrong is then named by the full check."""
        index, offset = self.index, self.index.offset.item(number)
        with self._view[offset : self._ends.item(number)] as block:
            head = block[: layout.BLOCK_HEADER_SIZE]
            stored = index.block_checksum.item(number)
            # The index proves the checksum, the checksum proves the header, and the header its payload.
            if checksum(head[:-8], self.key) == stored:
                values = layout.unpack(layout.BLOCK_FIELDS, head)
                if (
                    values["block_checksum"] == stored
                    and values["magic"] == layout.BLOCK_MAGIC
                    and values["codec"] == layout.CODECS["plain"]
                    and values["block_number"] == number
                    and values["num_records"] == index.num_records.item(number)
                    and values["num_positions"] == index.num_positions.item(number)
                    and values["alignment"] == index.alignment.item(number)
                    and values["payload_size"] == self._payload_sizes.item(number) <= layout.MAX_PAYLOAD_SIZE
                    and layout.first_nonzero_reserved(layout.BLOCK_FIELDS, values) is None
                    and checksum(block[layout.BLOCK_HEADER_SIZE :], self.key) == values["payload_checksum"]
                ):
                    return
            head.release()
        self[number]
        raise CorruptError("a fault that the full check does not find", path=self.path, sequence=number, offset=offset)

    def _check_open(self) -> None:
        if self._map.closed:
            raise ValueError(f"{self.path}: the shard is closed; open it again")

    def close(self) -> None:
        """Unmap the file; the shard is unusable afterwards."""
        self._view.release()
        self._map.close()


def describe(shard: Shard) -> Entry:
    """What a manifest says of a shard."""
    return Entry(
        path=shard.path,
        shard_number=shard.header.shard_number,
        first_sequence=shard.header.first_sequence,
        num_sequences=len(shard),
        num_records=shard.trailer.num_records,
        size_bytes=shard.trailer.index_offset + shard.trailer.index_size + layout.TRAILER_SIZE,
        fingerprint=shard.fingerprint,
    )
