"""
Where each byte of a shard lies: SPEC.md's tables as data; nothing else in the package knows an offset.

A test parses the tables of SPEC.md and holds them against these.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VERSION_MAJOR, VERSION_MINOR = 1, 0
HEADER_MAGIC = b"\x89SKL\r\n\x1a\n"
BLOCK_MAGIC = b"SKLB"
TRAILER_MAGIC = b"\x89SKLEND\n"
ALIGN = 64
"""Blocks, index and trailer start at multiples of this many bytes."""
PADDING = 64
"""At least this many zero bytes follow a payload."""

HEADER_SIZE = 4096
BLOCK_HEADER_SIZE = 64
TRAILER_SIZE = 64
CAPTURE_OFFSET = 256
INDEX_ROW_SIZE = 32

MAX_VOCAB_SIZE = 1 << 24
MAX_POSITIONS = 1 << 22
MAX_PAYLOAD_SIZE = 1 << 30
MAX_SEQUENCES = 1 << 32
MAX_ROUNDS = 65535
MAX_SCALE_LOG2 = 30
MAX_CAPTURE_SIZE = HEADER_SIZE - CAPTURE_OFFSET - 8
MAX_MANIFEST_SIZE = 1 << 28
PARTIAL_SUFFIX = ".partial"
"""Of a shard's name until it is sealed."""

KINDS = {"counts": 1, "ratios": 2}
PROFILES = {"R24": 1, "R24W": 2, "R32": 3}
ROW_CONVENTIONS = {"next-token": 1}
SAMPLERS = {"unknown": 0, "multinomial": 1, "systematic": 2, "topk": 3, "topp": 4}
COLUMNS = {"label_logprob": 1, "entropy": 2}
CODECS = {"plain": 0}

ID_BITS = {"R24": 17, "R24W": 18, "R32": 24}
CODE_BITS = {"R24": 7, "R24W": 6, "R32": 7}
RECORD_SIZE = {"R24": 3, "R24W": 3, "R32": 4}

_FORMATS = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "f64": "d"}


@dataclass(frozen=True, slots=True)
class Field:
    """One row of a table of SPEC.md."""

    offset: int
    size: int
    type: str
    name: str


class Table(tuple[Field, ...]):  # noqa: SLOT001  cached properties need a __dict__
    """A table of SPEC.md whose fields follow each other without holes, read and written as one struct."""

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the fields, in order."""
        return tuple(field.name for field in self)

    @functools.cached_property
    def whole(self) -> struct.Struct:
        """The struct of all fields; reserved, raw and 128-bit ones are bytes."""
        return struct.Struct("<" + "".join(_FORMATS.get(field.type, f"{field.size}s") for field in self))

    @functools.cached_property
    def wide(self) -> tuple[str, ...]:
        """Names of the 128-bit fields."""
        return tuple(field.name for field in self if field.type == "u128")

    @functools.cached_property
    def reserved(self) -> tuple[tuple[str, bytes], ...]:
        """Names of the reserved fields, with the zeros they must be."""
        return tuple((field.name, bytes(field.size)) for field in self if field.type == "zero")


HEADER_FIELDS = Table(
    (
        Field(0, 8, "bytes", "magic"),
        Field(8, 2, "u16", "version_major"),
        Field(10, 2, "u16", "version_minor"),
        Field(12, 4, "u32", "header_size"),
        Field(16, 8, "u64", "incompatible_flags"),
        Field(24, 8, "u64", "compatible_flags"),
        Field(32, 1, "u8", "kind"),
        Field(33, 1, "u8", "profile"),
        Field(34, 1, "u8", "row_convention"),
        Field(35, 1, "u8", "record_count_size"),
        Field(36, 1, "u8", "token_size"),
        Field(37, 1, "u8", "scale_log2"),
        Field(38, 2, "u16", "columns"),
        Field(40, 4, "u32", "vocab_size"),
        Field(44, 4, "u32", "seq_len"),
        Field(48, 4, "u32", "rounds"),
        Field(52, 4, "u32", "shard_number"),
        Field(56, 8, "u64", "first_sequence"),
        Field(64, 1, "u8", "sampler"),
        Field(65, 1, "zero", "reserved_0"),
        Field(66, 2, "u16", "order_algorithm"),
        Field(68, 2, "u16", "order_version"),
        Field(70, 2, "zero", "reserved_1"),
        Field(72, 8, "f64", "proposal_temperature"),
        Field(80, 8, "u64", "sampling_seed"),
        Field(88, 8, "u64", "packing_seed"),
        Field(96, 16, "u128", "tokenizer_fingerprint"),
        Field(112, 16, "u128", "corpus_fingerprint"),
        Field(128, 16, "u128", "teacher_fingerprint"),
        Field(144, 4, "u32", "capture_size"),
        Field(148, 108, "zero", "reserved_2"),
        Field(256, 3832, "bytes", "capture"),
        Field(4088, 8, "u64", "header_checksum"),
    )
)

BLOCK_FIELDS = Table(
    (
        Field(0, 4, "bytes", "magic"),
        Field(4, 1, "u8", "codec"),
        Field(5, 3, "zero", "reserved_0"),
        Field(8, 8, "u64", "block_number"),
        Field(16, 4, "u32", "num_positions"),
        Field(20, 4, "u32", "num_records"),
        Field(24, 4, "u32", "payload_size"),
        Field(28, 4, "zero", "reserved_1"),
        Field(32, 8, "u64", "alignment"),
        Field(40, 8, "u64", "payload_checksum"),
        Field(48, 8, "zero", "reserved_2"),
        Field(56, 8, "u64", "block_checksum"),
    )
)

TRAILER_FIELDS = Table(
    (
        Field(0, 8, "bytes", "magic"),
        Field(8, 8, "u64", "index_offset"),
        Field(16, 8, "u64", "num_sequences"),
        Field(24, 8, "u64", "num_records"),
        Field(32, 16, "u128", "root"),
        Field(48, 8, "u64", "index_checksum"),
        Field(56, 8, "u64", "trailer_checksum"),
    )
)

INDEX_COLUMNS = Table(
    (
        Field(0, 8, "u64", "offset"),
        Field(8, 8, "u64", "alignment"),
        Field(16, 8, "u64", "block_checksum"),
        Field(24, 4, "u32", "num_positions"),
        Field(28, 4, "u32", "num_records"),
    )
)
"""Each column is stored whole, one after the other; ``offset`` here is the place in a row of 32 bytes a sequence."""


def pack(fields: Table, values: Mapping[str, Any]) -> bytearray:
    """Lay values out as a table says; reserved fields become zero."""
    data = bytearray(fields[-1].offset + fields[-1].size)
    for field in fields:
        if field.type == "zero":
            continue
        value = values[field.name]
        if field.type == "bytes":
            raw = bytes(value)
        elif field.type == "u128":
            raw = int(value, 16).to_bytes(16, "little")
        else:
            raw = struct.pack("<" + _FORMATS[field.type], value)
        assert len(raw) <= field.size
        data[field.offset : field.offset + len(raw)] = raw
    return data


def unpack(fields: Table, data: bytes | memoryview) -> dict[str, Any]:
    """Read a table's values; 128-bit fields become 32 hexadecimal digits, reserved ones stay bytes."""
    values: dict[str, Any] = dict(zip(fields.names, fields.whole.unpack(data), strict=True))
    for name in fields.wide:
        values[name] = f"{int.from_bytes(values[name], 'little'):032x}"
    return values


def first_nonzero_reserved(fields: Table, values: Mapping[str, Any]) -> Field | None:
    """The first reserved field that is not zero, or None."""
    for name, zeros in fields.reserved:
        if values[name] != zeros:
            return next(field for field in fields if field.name == name)
    return None


def round_up(size: int) -> int:
    """The next multiple of ALIGN."""
    return -(-size // ALIGN) * ALIGN


def block_size(payload_size: int) -> int:
    """Bytes of a whole block: its header, the payload and the padding."""
    return BLOCK_HEADER_SIZE + round_up(payload_size + PADDING)
