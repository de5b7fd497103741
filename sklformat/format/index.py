"""
The end of a sealed shard: an index of its blocks and a trailer that proves both.

Packs, parses and checks; reads and writes no file.  SPEC.md sections 8 and 9.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sklformat.checksums import checksum, describe_mismatch, fingerprint_of
from sklformat.errors import CorruptError, TruncatedError
from sklformat.format import layout
from sklformat.format.block import BlockHeader
from sklformat.format.columns import size_of
from sklformat.format.header import Header


class Index:
    """The index of a shard while it is written: 32 bytes per sequence."""

    def __init__(self) -> None:
        self._columns = {f.name: array("Q" if f.type == "u64" else "I") for f in layout.INDEX_COLUMNS}

    def __len__(self) -> int:
        return len(self._columns["offset"])

    def append(self, offset: int, block: BlockHeader) -> None:
        """Note a block that begins at byte ``offset``."""
        values = (offset, block.alignment, block.block_checksum, block.num_positions, block.num_records)
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)

    def extend(self, offsets: NDArray[np.uint64], checksums: NDArray[np.uint64], index: SealedIndex, of: slice) -> None:
        """
        Note blocks that were copied from a sealed shard.

        Args:
            offsets: [n] where each begins now.
            checksums: [n] those of their headers now.
            index: Of the sealed shard.
            of: Which rows of it they are, n of them.
        """
        rows = (offsets, index.alignment[of], checksums, index.num_positions[of], index.num_records[of])
        for column, values in zip(self._columns.values(), rows, strict=True):
            column.frombytes(np.ascontiguousarray(values, f"u{column.itemsize}").view(np.uint8).data)

    def columns(self) -> dict[str, NDArray[Any]]:
        """Copies of its columns, unsigned, by their names in SPEC section 8."""
        return {name: np.array(column, f"u{column.itemsize}") for name, column in self._columns.items()}

    def alignment(self, number: int) -> int:
        """Alignment checksum of sequence ``number``."""
        return self._columns["alignment"][number]

    def pack(self) -> bytes:
        """The index's bytes: column after column, zero-padded to a multiple of 64."""
        parts = [
            np.frombuffer(self._columns[f.name], f"u{f.size}").astype(f"<u{f.size}").tobytes()
            for f in layout.INDEX_COLUMNS
        ]
        data = b"".join(parts)
        return data + bytes(layout.round_up(len(data)) - len(data))

    @property
    def num_records(self) -> int:
        """Pairs over all sequences."""
        return sum(self._columns["num_records"])

    def root(self, header: Header) -> str:
        """The root digest of the shard.  SPEC section 6.4."""
        sums = np.frombuffer(self._columns["block_checksum"], np.uint64)
        return root_digest(header.pack(), sums)


@dataclass(frozen=True, slots=True)
class SealedIndex:
    """
    The checked index of a sealed shard; each column has one value per sequence.

    Attributes:
        offset: uint64, byte offset of the block.
        alignment: uint64, alignment checksum of its tokens.
        block_checksum: uint64, checksum of its block header.
        num_positions: uint32.
        num_records: uint32.
        root: The shard's fingerprint, 32 hexadecimal digits.
    """

    offset: NDArray[np.uint64]
    alignment: NDArray[np.uint64]
    block_checksum: NDArray[np.uint64]
    num_positions: NDArray[np.uint32]
    num_records: NDArray[np.uint32]
    root: str

    def __len__(self) -> int:
        return int(self.offset.size)


@dataclass(frozen=True, slots=True)
class Trailer:
    """The last 64 bytes of a sealed shard, checked against the size of the file."""

    index_offset: int
    index_size: int
    num_sequences: int
    num_records: int
    root: str
    index_checksum: int


def root_digest(header: bytes | memoryview, block_checksums: NDArray[np.uint64]) -> str:
    """XXH3-128 over the header's checksum and every block's, in order.  SPEC section 6.4."""
    return fingerprint_of((header[-8:], np.ascontiguousarray(block_checksums, "<u8").view(np.uint8).data))


def pack_trailer(header: Header, key: int, index_offset: int, index: Index, packed_index: bytes) -> bytes:
    """The 64 bytes of SPEC section 9."""
    values = {
        "magic": layout.TRAILER_MAGIC,
        "index_offset": index_offset,
        "num_sequences": len(index),
        "num_records": index.num_records,
        "root": index.root(header),
        "index_checksum": checksum(packed_index, key),
        "trailer_checksum": 0,
    }
    data = layout.pack(layout.TRAILER_FIELDS, values)
    data[-8:] = checksum(data[:-8], key).to_bytes(8, "little")
    return bytes(data)


def parse_trailer(data: bytes | memoryview, key: int, file_size: int) -> Trailer:
    """
    Read and check the last 64 bytes of a file.

    Raises:
        TruncatedError: They are no trailer: the shard was never sealed, or lost its end.
        CorruptError: They contradict their checksum or the size of the file.
    """
    offset = file_size - layout.TRAILER_SIZE
    if file_size < layout.HEADER_SIZE + layout.TRAILER_SIZE or data[:8] != layout.TRAILER_MAGIC:
        raise TruncatedError(
            "no trailer at the end: cut short, or never finished: copy or capture it again",
            section="trailer",
            offset=offset,
        )
    values = layout.unpack(layout.TRAILER_FIELDS, data)
    computed = checksum(data[:-8], key)
    if computed != values["trailer_checksum"]:
        raise CorruptError(
            describe_mismatch("checksum", values["trailer_checksum"], computed),
            section="trailer",
            offset=offset + 56,
        )
    sequences = values["num_sequences"]
    if sequences >= layout.MAX_SEQUENCES:
        raise CorruptError(
            f"{sequences} sequences, a shard holds fewer than {layout.MAX_SEQUENCES}",
            section="trailer",
            offset=offset + 16,
        )
    index_size = layout.round_up(sequences * layout.INDEX_ROW_SIZE)
    expected = values["index_offset"] + index_size + layout.TRAILER_SIZE
    if expected != file_size or values["index_offset"] < layout.HEADER_SIZE:
        raise CorruptError(
            f"index at byte {values['index_offset']} with {sequences} sequences makes {expected} bytes, "
            f"the file has {file_size}",
            section="trailer",
            offset=offset,
        )
    return Trailer(
        values["index_offset"],
        index_size,
        sequences,
        values["num_records"],
        values["root"],
        values["index_checksum"],
    )


def parse_index(
    data: bytes | memoryview, trailer: Trailer, header_bytes: bytes, header: Header, key: int
) -> SealedIndex:
    """
    Read and check the index: its blocks cover the file from the header to the index without hole or overlap.

    Raises:
        CorruptError: It contradicts its checksum, the trailer, or SPEC section 8.
    """

    def corrupt(message: str) -> CorruptError:
        return CorruptError(message, section="index", offset=trailer.index_offset)

    if len(data) != trailer.index_size:
        raise TruncatedError(f"{len(data)} bytes of {trailer.index_size}", section="index", offset=trailer.index_offset)
    computed = checksum(data, key)
    if computed != trailer.index_checksum:
        raise corrupt(describe_mismatch("checksum", trailer.index_checksum, computed))
    columns: dict[str, NDArray[np.generic]] = {}
    start, count = 0, trailer.num_sequences
    if header.first_sequence + count > 1 << 64:
        raise corrupt(f"{count} sequences from number {header.first_sequence} on pass 2**64")
    for field in layout.INDEX_COLUMNS:
        # A copy: nothing that leaves the reader may look into a mapping.
        columns[field.name] = np.frombuffer(data, f"<u{field.size}", count, start).astype(f"u{field.size}")
        start += field.size * count
    if any(data[start:]):
        raise corrupt("padding after the columns is not zero")
    index = SealedIndex(**columns, root=trailer.root)  # type: ignore[arg-type]
    if root_digest(header_bytes, index.block_checksum) != trailer.root:
        raise corrupt("the root digest does not follow from the header and the block checksums")
    positions, records = index.num_positions.astype(np.uint64), index.num_records.astype(np.uint64)
    if int(records.sum()) != trailer.num_records:
        raise corrupt(f"records sum to {int(records.sum())}, the trailer says {trailer.num_records}")
    if count and (int(positions.min()) < 1 or int(positions.max()) > layout.MAX_POSITIONS):
        raise corrupt(f"sequences have {positions.min()}..{positions.max()} positions")
    if header.seq_len and (positions != header.seq_len).any():
        raise corrupt(f"a sequence's length differs from seq_len {header.seq_len}")
    assert header.record_count_size is not None
    if (records > positions * np.uint64(256**header.record_count_size - 1)).any():
        raise corrupt(f"a sequence has more records than its positions count in {header.record_count_size} bytes each")
    ends = np.append(index.offset[1:], np.uint64(trailer.index_offset))
    if count and (
        int(index.offset[0]) != layout.HEADER_SIZE
        or (ends <= index.offset).any()
        or (index.offset % np.uint64(64)).any()
    ):
        raise corrupt("block offsets do not rise from the end of the header to the index")
    payloads = payload_sizes(header, index.num_positions, index.num_records)
    if count and (ends - index.offset != _block_sizes(payloads)).any():
        raise corrupt("block offsets leave a hole or overlap")
    if not count and trailer.index_offset != layout.HEADER_SIZE:
        raise corrupt("bytes between the header and the index belong to no block")
    return index


_NUMPY_TYPES = {"u8": "u1", "u32": "<u4", "u64": "<u8"}
_BLOCK_HEADER = np.dtype(
    {
        "names": list(layout.BLOCK_FIELDS.names),
        "formats": [_NUMPY_TYPES.get(field.type, f"S{field.size}") for field in layout.BLOCK_FIELDS],
        "offsets": [field.offset for field in layout.BLOCK_FIELDS],
        "itemsize": layout.BLOCK_HEADER_SIZE,
    }
)


def expected_headers(
    index: SealedIndex, payload_sizes: NDArray[np.uint64], numbers: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """
    The 64 bytes before each payload as the index implies them, but for the payload's checksum, which is 0 here.

    Args:
        index: Of the shard.
        payload_sizes: Of every block, as ``payload_sizes`` gives them.
        numbers: [k] blocks.

    Returns:
        [k, 8] uint64: the words of each.
    """
    heads = np.zeros(numbers.size, _BLOCK_HEADER)
    heads["magic"], heads["codec"] = layout.BLOCK_MAGIC, layout.CODECS["plain"]
    heads["block_number"], heads["payload_size"] = numbers, payload_sizes[numbers]
    for name in ("num_positions", "num_records", "alignment", "block_checksum"):
        heads[name] = getattr(index, name)[numbers]
    return heads.view("<u8").reshape(numbers.size, layout.BLOCK_HEADER_SIZE // 8)


def payload_sizes(header: Header, positions: NDArray[np.uint32], records: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Bytes of the payload of every block, without padding, from the plain codec's rule; SPEC section 5.1."""
    assert header.profile is not None
    positions, records = positions.astype(np.uint64), records.astype(np.uint64)
    sizes: NDArray[np.uint64] = positions * np.uint64(header.record_count_size or 0)
    sizes += records * np.uint64(layout.RECORD_SIZE[header.profile])
    sizes += (positions + np.uint64(1)) * np.uint64(header.token_size or 0)
    for name in header.columns:
        sizes += size_of(name, positions, records)
    return sizes


def _block_sizes(payloads: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """As ``layout.block_size``, for every block."""
    align = np.uint64(layout.ALIGN)
    padded = (payloads + np.uint64(layout.PADDING) + align - np.uint64(1)) // align * align
    sizes: NDArray[np.uint64] = padded + np.uint64(layout.BLOCK_HEADER_SIZE)
    return sizes
