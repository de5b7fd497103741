"""
Where each byte of a shard lies: SPEC.md's tables as data; nothing else in the package knows an offset.

A test parses the tables of SPEC.md and compares them with these.
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
MAX_SHARDS = 1 << 20
MAX_NAME_SIZE = 255
"""Bytes of a shard's name."""
MAX_CAPTURE_DEPTH = 32
"""Objects and lists inside each other in a capture, itself the first."""
SHARD_SUFFIX = ".skl"
"""Of a shard's name, behind something."""
PARTIAL_SUFFIX = ".partial"
"""Of a shard's name until it is sealed."""

KINDS = {"counts": 1, "ratios": 2}
PROFILES = {"R24": 1, "R24W": 2, "R32": 3}
ROW_CONVENTIONS = {"next-token": 1}
SAMPLERS = {"unknown": 0, "multinomial": 1, "systematic": 2, "topk": 3, "topp": 4, "thinned": 5}
UNBIASED_SAMPLERS = frozenset({"multinomial", "systematic", "thinned"})
"""Their records are made of draws."""
COLUMNS = {"label_logprob": 1, "entropy": 2, "document_start": 4, "record_logprob": 8}
CODECS = {"plain": 0}

ID_BITS = {"R24": 17, "R24W": 18, "R32": 24}
CODE_BITS = {"R24": 7, "R24W": 6, "R32": 7}
RECORD_SIZE = {"R24": 3, "R24W": 3, "R32": 4}

_FORMATS = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "u128": "16s", "f64": "d"}


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


def _table(*rows: tuple[str, str] | tuple[str, str, int]) -> Table:
    """A table from the (name, type) of its fields, or (name, type, size) of raw and reserved ones, in order."""
    fields: list[Field] = []
    for name, kind, *sizes in rows:
        offset = fields[-1].offset + fields[-1].size if fields else 0
        size = sizes[0] if sizes else struct.calcsize("<" + _FORMATS[kind])
        fields.append(Field(offset, size, kind, name))
    return Table(fields)


HEADER_FIELDS = _table(
    ("magic", "bytes", 8),
    ("version_major", "u16"),
    ("version_minor", "u16"),
    ("header_size", "u32"),
    ("incompatible_flags", "u64"),
    ("compatible_flags", "u64"),
    ("kind", "u8"),
    ("profile", "u8"),
    ("row_convention", "u8"),
    ("record_count_size", "u8"),
    ("token_size", "u8"),
    ("scale_log2", "u8"),
    ("columns", "u16"),
    ("vocab_size", "u32"),
    ("seq_len", "u32"),
    ("rounds", "u32"),
    ("shard_number", "u32"),
    ("first_sequence", "u64"),
    ("sampler", "u8"),
    ("reserved_0", "zero", 1),
    ("order_algorithm", "u16"),
    ("order_version", "u16"),
    ("reserved_1", "zero", 2),
    ("proposal_temperature", "f64"),
    ("sampling_seed", "u64"),
    ("packing_seed", "u64"),
    ("tokenizer_fingerprint", "u128"),
    ("corpus_fingerprint", "u128"),
    ("teacher_fingerprint", "u128"),
    ("capture_size", "u32"),
    ("reserved_2", "zero", 108),
    ("capture", "bytes", 3832),
    ("header_checksum", "u64"),
)

BLOCK_FIELDS = _table(
    ("magic", "bytes", 4),
    ("codec", "u8"),
    ("reserved_0", "zero", 3),
    ("block_number", "u64"),
    ("num_positions", "u32"),
    ("num_records", "u32"),
    ("payload_size", "u32"),
    ("reserved_1", "zero", 4),
    ("alignment", "u64"),
    ("payload_checksum", "u64"),
    ("reserved_2", "zero", 8),
    ("block_checksum", "u64"),
)

TRAILER_FIELDS = _table(
    ("magic", "bytes", 8),
    ("index_offset", "u64"),
    ("num_sequences", "u64"),
    ("num_records", "u64"),
    ("root", "u128"),
    ("index_checksum", "u64"),
    ("trailer_checksum", "u64"),
)

INDEX_COLUMNS = _table(
    ("offset", "u64"),
    ("alignment", "u64"),
    ("block_checksum", "u64"),
    ("num_positions", "u32"),
    ("num_records", "u32"),
)
"""Each column is stored whole, one after the other; ``offset`` here is the place in a row of 32 bytes per sequence."""


def pack(fields: Table, values: Mapping[str, Any]) -> bytearray:
    """Lay values out as a table says; reserved fields become zero, raw ones are filled up with zeros."""
    stored = dict(values) | dict(fields.reserved)
    for name in fields.wide:
        stored[name] = int(values[name], 16).to_bytes(16, "little")
    assert all(len(stored[field.name]) <= field.size for field in fields if field.type == "bytes")  # struct would cut
    return bytearray(fields.whole.pack(*(stored[name] for name in fields.names)))


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
