"""
One sequence as one block of a shard: header, payload, padding and their checksums.

C lays out the payload, this module the 64 bytes before it; neither knows of files.  SPEC.md section 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sklformat import native
from sklformat.checksums import alignment, checksum, checksums_of, describe_mismatch, tokens_array
from sklformat.errors import CorruptError, FormatError, TruncatedError, UnsupportedError
from sklformat.format import layout
from sklformat.format.columns import Columns, bits_of, find_fault, follow_records, pack, typed_columns, unpack
from sklformat.format.header import Header
from sklformat.format.records import Sequence, SparseTargets

_MAX_SIZE = layout.block_size(layout.MAX_PAYLOAD_SIZE)
_BLOCK_NUMBER, _PAYLOAD_CHECKSUM = (  # in words
    f.offset // 8 for f in layout.BLOCK_FIELDS if f.name in ("block_number", "payload_checksum")
)
_OF_PAYLOADS = (
    *("kind", "profile", "record_count_size", "token_size", "scale_log2", "columns", "row_convention", "vocab_size"),
    *("seq_len", "rounds"),
)


@dataclass(frozen=True, slots=True)
class BlockHeader:
    """The 64 bytes before a payload, checked."""

    number: int
    num_positions: int
    num_records: int
    payload_size: int
    alignment: int
    payload_checksum: int
    block_checksum: int

    @property
    def size(self) -> int:
        """Bytes of the whole block."""
        return layout.block_size(self.payload_size)


def encode_block(
    header: Header,
    key: int,
    number: int,
    tokens: ArrayLike | None,
    targets: SparseTargets,
    columns: Mapping[str, ArrayLike] | None = None,
    *,
    aligned: int | None = None,
) -> tuple[memoryview, BlockHeader]:
    """
    Encode one sequence as block ``number`` of a shard.

    Args:
        header: Settings of the shard.
        key: ``header.shard_key``, computed once by the caller.
        number: 0-based place in the shard.
        tokens: [T + 1] integer ids below vocab_size, T = targets.num_positions; None: nobody has them any more.
        targets: Records; counts or weights as header.kind asks.
        columns: An array for each of header.columns: document_start [T + 1] bool, record_logprob [nnz] beside
            targets.token_ids, the others [T].
        aligned: Alignment checksum of the tokens, where these are None.

    Returns:
        The block's bytes, and what its header says.

    Raises:
        ValueError: Anything a reader could not trust; the message names what, where and the values.

    Source: SPEC section 5.
    """
    positions = targets.num_positions
    ids = None if tokens is None else tokens_array(tokens)
    check_sizes(header, positions + 1 if ids is None else ids.size, positions)
    if ids is not None:
        if ids.max(initial=0) >= header.vocab_size:
            place = int(np.argmax(ids >= header.vocab_size))
            raise ValueError(f"token number {place} is {ids[place]}, vocab_size is {header.vocab_size}")
        aligned = alignment(ids)
    assert aligned is not None
    offsets, token_ids, codes = _codes(header, targets)
    shape = block_shape(header, positions, int(token_ids.size))
    payload_size = native.payload_size(shape)
    if payload_size > layout.MAX_PAYLOAD_SIZE:
        raise ValueError(f"payload of {payload_size} bytes, the format's limit is {layout.MAX_PAYLOAD_SIZE}")
    data = np.zeros(layout.block_size(payload_size), np.uint8)
    body = data[layout.BLOCK_HEADER_SIZE :]
    assert ids is not None or not header.token_size
    stored = ids if header.token_size else None
    typed = typed_columns(header.columns, columns, positions, (targets.num_records,))
    kept = follow_records(typed, (targets.offsets, targets.token_ids), (offsets, token_ids))
    if fault := find_fault(kept, offsets):
        raise ValueError(fault)
    try:
        native.encode(shape, offsets, token_ids, codes, stored, pack(kept), body)
    except ValueError as error:
        raise ValueError(f"{error} (vocab_size {header.vocab_size}, rounds {header.rounds})") from error
    payload_checksum = checksum(body.data, key)
    packed = layout.pack(
        layout.BLOCK_FIELDS,
        {
            "magic": layout.BLOCK_MAGIC,
            "codec": layout.CODECS["plain"],
            "block_number": number,
            "num_positions": positions,
            "num_records": shape.num_records,
            "payload_size": payload_size,
            "alignment": aligned,
            "payload_checksum": payload_checksum,
            "block_checksum": 0,
        },
    )
    block_checksum = checksum(packed[:-8], key)
    packed[-8:] = block_checksum.to_bytes(8, "little")
    data[: layout.BLOCK_HEADER_SIZE] = np.frombuffer(packed, np.uint8)
    return data.data, BlockHeader(
        number, positions, shape.num_records, payload_size, aligned, payload_checksum, block_checksum
    )


def parse_block_header(data: bytes | memoryview, header: Header, key: int, number: int) -> BlockHeader:
    """
    Read and check the 64 bytes before a payload.

    Raises:
        TruncatedError: Fewer than 64 bytes.
        UnsupportedError: A codec this version does not know.
        CorruptError: Anything else that contradicts SPEC section 5.2.
    """
    if len(data) < layout.BLOCK_HEADER_SIZE:
        raise TruncatedError(f"{len(data)} bytes, a block header has {layout.BLOCK_HEADER_SIZE}")
    data = bytes(data[: layout.BLOCK_HEADER_SIZE])  # a copy: an error's traceback would keep the file mapped
    values = layout.unpack(layout.BLOCK_FIELDS, data)
    if values["magic"] != layout.BLOCK_MAGIC:
        raise CorruptError(f"block magic is {values['magic'].hex(' ')}, must be {layout.BLOCK_MAGIC.hex(' ')}")
    computed = checksum(data[:-8], key)
    if computed != values["block_checksum"]:
        raise CorruptError(describe_mismatch("block header checksum", values["block_checksum"], computed))
    if values["codec"] not in layout.CODECS.values():
        raise UnsupportedError(f"codec {values['codec']} is not known to this version; install a newer sklformat")
    if reserved := layout.first_nonzero_reserved(layout.BLOCK_FIELDS, values):
        raise CorruptError(f"{reserved.name} of the block header is not zero")
    if values["block_number"] != number:
        raise CorruptError(f"block number {values['block_number']} stands where block {number} belongs")
    positions = values["num_positions"]
    if not 1 <= positions <= layout.MAX_POSITIONS or (header.seq_len and positions != header.seq_len):
        expected_length = header.seq_len or f"1..{layout.MAX_POSITIONS}"
        raise CorruptError(f"block of {positions} positions, must have {expected_length}")
    try:
        expected = native.payload_size(block_shape(header, positions, values["num_records"]))
    except ValueError as error:
        raise CorruptError(f"{values['num_records']} records in {positions} positions") from error
    if values["payload_size"] != expected or expected > layout.MAX_PAYLOAD_SIZE:
        raise CorruptError(f"payload_size {values['payload_size']} stored, {expected} follows from the counts")
    return BlockHeader(
        number,
        positions,
        values["num_records"],
        values["payload_size"],
        values["alignment"],
        values["payload_checksum"],
        values["block_checksum"],
    )


def find_unsound(
    data: memoryview,
    begins: NDArray[np.uint64],
    lengths: NDArray[np.uint64],
    expected: NDArray[np.uint64],
    key: int,
) -> int | None:
    """
    Look for a block that has not the expected header, or of which a checksum is wrong; what is wrong is not named.

    Args:
        data: Memory with whole blocks in it, a multiple of 64 bytes.
        begins: [n] where in it each block begins, a multiple of 64 too.
        lengths: [n] their bytes, padding included.
        expected: [n, 8] words of their headers as the index implies them, but for the payload's checksum.
        key: The shard's.

    Returns:
        The place of the first, or None.
    """
    size = np.uint64(layout.BLOCK_HEADER_SIZE)
    stored = np.frombuffer(data, "<u8").reshape(-1, expected.shape[1])[begins // size]
    heads = checksums_of(data, begins.tolist(), [layout.BLOCK_HEADER_SIZE - 8] * begins.size, key)
    payloads = checksums_of(data, (begins + size).tolist(), (lengths - size).tolist(), key)
    differs = stored != expected
    differs[:, -1] |= stored[:, -1] != heads
    differs[:, _PAYLOAD_CHECKSUM] = stored[:, _PAYLOAD_CHECKSUM] != payloads
    unsound = differs.any(axis=1) | (lengths > _MAX_SIZE)
    return int(unsound.argmax()) if unsound.any() else None


def renumber(
    data: NDArray[np.uint8], begins: NDArray[np.uint64], lengths: NDArray[np.uint64], first: int, key: int
) -> NDArray[np.uint64]:
    """
    Make whole blocks those of another shard, in place: their payloads stay, numbers and checksums are made again.

    Args:
        data: Memory with sound blocks in it, a multiple of 64 bytes.
        begins: [n] where in it each block begins, a multiple of 64 too.
        lengths: [n] their bytes, padding included.
        first: Number of the first block there; the others follow it.
        key: Of the other shard.

    Returns:
        [n] uint64: the checksums of the new headers.
    """
    size = np.uint64(layout.BLOCK_HEADER_SIZE)
    words = data.view("<u8").reshape(-1, layout.BLOCK_HEADER_SIZE // 8)
    heads = words[begins // size]
    heads[:, _BLOCK_NUMBER] = np.arange(first, first + begins.size)
    heads[:, _PAYLOAD_CHECKSUM] = checksums_of(data.data, (begins + size).tolist(), (lengths - size).tolist(), key)
    starts = range(0, begins.size * layout.BLOCK_HEADER_SIZE, layout.BLOCK_HEADER_SIZE)
    packed = heads.view(np.uint8).reshape(-1).data
    sums = checksums_of(packed, starts, [layout.BLOCK_HEADER_SIZE - 8] * begins.size, key)
    heads[:, -1] = sums
    words[begins // size] = heads
    return sums


def check_payload(data: memoryview | bytes, block: BlockHeader, key: int) -> memoryview:
    """
    Checksum a whole block's payload and padding and return them.

    Raises:
        TruncatedError: The block ends early.
        CorruptError: The checksum differs.
    """
    if len(data) < block.size:
        raise TruncatedError(f"block of {block.size} bytes ends after {len(data)}")
    body = memoryview(data)[layout.BLOCK_HEADER_SIZE : block.size]
    computed = checksum(body, key)
    if computed != block.payload_checksum:
        body.release()  # the error's traceback would keep the file mapped
        raise CorruptError(describe_mismatch("payload checksum", block.payload_checksum, computed))
    return body


def decode_body(
    header: Header, block: BlockHeader, body: memoryview, *, tokens: bool = True, columns: bool = True
) -> Sequence:
    """
    Decode a checked payload; the result shares no memory with ``body``.

    Raises:
        CorruptError: Records, tokens or columns contradict SPEC sections 4 and 5.
    """
    shape = block_shape(header, block.num_positions, block.num_records)
    offsets, token_ids, codes, ids, data = native.decode(shape, body, tokens=tokens, columns=columns)
    if header.kind == "counts":
        targets = SparseTargets.trusted(token_ids, codes, None, offsets)
    else:
        weights = native.expand(offsets, codes, header.scale_log2)
        targets = SparseTargets.trusted(token_ids, None, weights, offsets)
    if ids is not None and (computed := alignment(ids)) != block.alignment:
        raise misaligned(block.alignment, computed)
    values: Columns = {}
    if data is not None:
        values = unpack(header.columns, data, block.num_positions, block.num_records)
        if fault := find_fault(values, offsets):
            raise CorruptError(fault)
    return Sequence(ids, targets, values, block.alignment)


def layout_differences(ours: Header, theirs: Header) -> list[str]:
    """One "name: ours != theirs" for each setting that differs and that the bytes of a payload depend on."""
    names = [name for name in _OF_PAYLOADS if getattr(ours, name) != getattr(theirs, name)]
    return [f"{name}: {getattr(ours, name)!r} != {getattr(theirs, name)!r}" for name in names]


def misaligned(stored: int, computed: int) -> CorruptError:
    """That the tokens of a block are not those that its alignment checksum was made from."""
    return CorruptError(f"alignment checksum {stored:#018x} stored, the tokens give {computed:#018x}")


def locate(error: FormatError, **place: object) -> FormatError:
    """Say where a fault is: fill path, offset, section or sequence where they are not known yet."""
    for name, value in place.items():
        if getattr(error, name) is None:
            setattr(error, name, value)
    return error


def check_sizes(header: Header, tokens: int, positions: int) -> None:
    """
    A sequence of so many tokens can have records at ``positions`` positions.

    Raises:
        ValueError: It cannot; names both numbers.
    """
    if tokens != positions + 1:
        raise ValueError(
            f"{tokens} tokens and {positions} positions of records; a sequence of L tokens has exactly L - 1 records"
        )
    if header.seq_len and positions != header.seq_len:
        raise ValueError(f"sequence of {positions} positions, the header's seq_len is {header.seq_len}")
    if not 1 <= positions <= layout.MAX_POSITIONS:
        raise ValueError(f"a sequence has 1..{layout.MAX_POSITIONS} positions, got {positions}")


def _codes(header: Header, targets: SparseTargets) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.uint8]]:
    """Counts as they are, weights as ratio codes."""
    if header.kind == "counts":
        if targets.counts is None:
            raise ValueError("the header's kind is 'counts', the targets hold weights")
        return targets.offsets, targets.token_ids, targets.counts
    if targets.weights is None:
        raise ValueError("the header's kind is 'ratios', the targets hold counts")
    return native.quantise(targets.offsets, targets.token_ids, targets.weights, header.scale_log2)


def block_shape(header: Header, num_positions: int, num_records: int) -> native.Shape:
    """What fixes where the bytes of a payload lie."""
    assert header.profile is not None
    assert header.record_count_size is not None
    assert header.token_size is not None
    return native.Shape(
        layout.KINDS[header.kind],
        layout.PROFILES[header.profile],
        header.record_count_size,
        header.token_size,
        bits_of(header.columns),
        header.vocab_size,
        header.rounds,
        num_positions,
        num_records,
    )
