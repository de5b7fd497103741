"""
The only door to C: arrays in, arrays out, status to exception.

Every buffer stays referenced by a typed ``from_buffer`` handle for the length of the call; cffi releases the GIL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sklformat._native import ffi, lib
from sklformat.errors import STATUS_ERRORS, CorruptError, FormatError

NULL = ffi.NULL
_STATUS_NAMES: dict[int, str] = {value: name for name, value in ffi.typeof("skl_status").relements.items()}
_REASONS: dict[str, str] = {
    "SKL_REASON_NONE": "unknown fault",
    "SKL_REASON_SHAPE": "sizes contradict each other (position {position}, got {value})",
    "SKL_REASON_ID_RANGE": "position {position}: token id {value} is not below vocab_size",
    "SKL_REASON_ID_ORDER": "position {position}: token id {value} comes twice or out of order; ids must rise strictly",
    "SKL_REASON_COUNT_RANGE": "position {position}: count {value} is not in 1..rounds",
    "SKL_REASON_COUNT_SUM": "position {position}: counts sum to {value}, not to rounds",
    "SKL_REASON_WEIGHT_RANGE": "position {position}: weight number {value} is not in (0, scale]",
    "SKL_REASON_NUM_RECORDS": "position {position}: {value} records do not fit; set record_count_size=2 (up to 65535)",
    "SKL_REASON_RATIO_ZERO": "position {position}: ratio code {value} takes the weight to zero",
    "SKL_REASON_RESERVED": "a record's reserved bit is set",
    "SKL_REASON_TOKEN_RANGE": "token number {position} of the sequence is {value}, not below vocab_size",
    "SKL_REASON_PADDING": "padding at payload byte {value} is not zero",
    "SKL_REASON_NOT_FINITE": "position {position}: the logits hold NaN, +inf or a value above 2**20, or none above "
    "-2**20 (first at id {value})",
}
_REASON_TEXTS: dict[int, str] = {value: _REASONS[name] for name, value in ffi.typeof("skl_reason").relements.items()}


@dataclass(frozen=True, slots=True)
class Shape:
    """Where the bytes of one payload lie; the fields are those of ``skl_shape`` in skl.h."""

    kind: int
    profile: int
    record_count_size: int
    token_size: int
    num_columns: int
    vocab_size: int
    rounds: int
    num_positions: int
    num_records: int

    def to_c(self) -> Any:
        """A new ``skl_shape``."""
        return ffi.new(
            "skl_shape *",
            [
                self.kind,
                self.profile,
                self.record_count_size,
                self.token_size,
                self.num_columns,
                self.vocab_size,
                self.rounds,
                self.num_positions,
                self.num_records,
            ],
        )


def view(ctype: str, array: NDArray[Any] | None, *, writable: bool = False) -> Any:
    """Hand a C-contiguous array to C as ``ctype`` (such as "uint8_t[]"), NULL for None; keep the result referenced."""
    return NULL if array is None else ffi.from_buffer(ctype, array, require_writable=writable)


def address_of(buffer: memoryview) -> int:
    """Address of the first byte; good only while whoever owns the memory keeps it."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(buffer)))


def check(status: int, fault: Any = None, where: str = "") -> None:
    """
    Raise what a C status means; the message begins with ``where``.

    Raises:
        ValueError, CorruptError, TruncatedError, UnsupportedError, RingClosedError, RingTimeoutError: As STATUS_ERRORS.
    """
    if status == lib.SKL_OK:
        return
    name = _STATUS_NAMES[status]
    text = name
    if fault is not None and fault.reason:
        text = _REASON_TEXTS[fault.reason].format(position=fault.position, value=fault.value)
    raise STATUS_ERRORS[name](where + text)


def payload_size(shape: Shape) -> int:
    """
    Size in bytes of a payload of this shape, without padding.  SPEC 5.1.

    Raises:
        ValueError: A field of the shape has no meaning, or does not fit the profile.
    """
    size = ffi.new("uint64_t *")
    check(lib.skl_payload_size(shape.to_c(), size))
    return int(size[0])


def encode(
    shape: Shape,
    offsets: NDArray[np.int64],
    token_ids: NDArray[np.uint32],
    codes: NDArray[np.uint8],
    tokens: NDArray[np.uint32] | None,
    columns: NDArray[np.uint16] | None,
    out: NDArray[np.uint8],
) -> int:
    """
    Write one payload into ``out`` and return its size in bytes.

    Args:
        shape: Fixes every size below.
        offsets: [T + 1] int64.
        token_ids: [nnz] uint32.
        codes: [nnz] uint8, counts or ratio codes.
        tokens: [T + 1] uint32, or None where the shape stores none.
        columns: [num_columns, T] uint16 bits, or None where there are none.
        out: Room, at least ``payload_size(shape)`` bytes.

    Raises:
        ValueError: A record that a reader could not trust; the message names position and value.
    """
    _expect(shape, offsets, token_ids, codes, tokens, columns)
    written, fault = ffi.new("size_t *"), ffi.new("skl_fault *")
    status = lib.skl_encode(
        shape.to_c(),
        view("int64_t[]", offsets),
        view("uint32_t[]", token_ids),
        view("uint8_t[]", codes),
        view("uint32_t[]", tokens),
        view("uint16_t[]", columns),
        view("uint8_t[]", out, writable=True),
        out.size,
        written,
        fault,
    )
    check(status, fault)
    return int(written[0])


def decode(
    shape: Shape,
    payload: memoryview | bytes | NDArray[np.uint8],
    *,
    tokens: bool = True,
    columns: bool = True,
) -> tuple[
    NDArray[np.int64],
    NDArray[np.uint32],
    NDArray[np.uint8],
    NDArray[np.uint32] | None,
    NDArray[np.uint16] | None,
]:
    """
    Read and check one payload, given with its zero padding.

    Returns:
        offsets [T + 1], token_ids [nnz], codes [nnz], tokens [T + 1] or None, columns [num_columns, T] or None.

    Raises:
        ValueError: The shape has no meaning.
        TruncatedError: The payload is shorter than the shape says.
        CorruptError: The bytes contradict SPEC section 4 or 5; the message names position and value.
    """
    positions, records = shape.num_positions, shape.num_records
    # Before anything is allocated: what the shape promises must lie within the bytes at hand.
    if payload_size(shape) + 64 > len(payload):
        check(lib.SKL_ERR_TRUNCATED)
    offsets = np.empty(positions + 1, np.int64)
    token_ids = np.empty(records, np.uint32)
    codes = np.empty(records, np.uint8)
    tokens_out = np.empty(positions + 1, np.uint32) if tokens and shape.token_size else None
    columns_out = np.empty((shape.num_columns, positions), np.uint16) if columns and shape.num_columns else None
    fault = ffi.new("skl_fault *")
    # Released before an error is raised: its traceback would keep the payload's file mapped.
    with ffi.from_buffer("uint8_t[]", payload) as source:
        status = lib.skl_decode(
            shape.to_c(),
            source,
            len(source),
            view("int64_t[]", offsets, writable=True),
            view("uint32_t[]", token_ids, writable=True),
            view("uint8_t[]", codes, writable=True),
            view("uint32_t[]", tokens_out, writable=True),
            view("uint16_t[]", columns_out, writable=True),
            fault,
        )
    check(status, fault)
    return offsets, token_ids, codes, tokens_out, columns_out


def decode_batch(
    shape: Shape,
    scale_log2: int,
    sources: NDArray[np.uint64],
    source_lens: NDArray[np.uint64],
    num_positions: NDArray[np.uint32],
    num_records: NDArray[np.uint32],
    tokens: NDArray[np.uint32] | None,
    row_positions: int,
    ignored_label: int,
) -> BatchArrays:
    """
    Decode and check the payloads of B sequences straight into the arrays of a training step.

    Args:
        shape: Of every row; its num_positions and num_records do not count.
        scale_log2: Kind ratios, 0..30.
        sources: [B] addresses of the payloads, which the caller keeps alive; 0 for an empty row.
        source_lens: [B] their bytes, padding included.
        num_positions: [B], at most row_positions; 0 for an empty row.
        num_records: [B].
        tokens: [B, row_positions + 1], used instead of the stored ones, or None.
        row_positions: T.
        ignored_label: Label where there is none.

    Raises:
        RowError: Around the ValueError, TruncatedError or CorruptError of one row.
    """
    rows = sources.size
    total = int(num_records.sum(dtype=np.uint64))
    out = BatchArrays(
        np.empty((rows, row_positions), np.int64),
        np.empty((rows, row_positions), np.int64),
        np.empty(rows * row_positions + 1, np.int64),
        np.empty(total, np.uint32),
        np.empty(total, np.float32),
    )
    codes = np.empty(total, np.uint8)
    arrays: tuple[NDArray[Any], ...] = out
    views = [view(c, a, writable=True) for c, a in zip(_BATCH_TYPES, arrays, strict=True)]
    batch = ffi.new("skl_batch *", [rows, row_positions, total, ignored_label, *views])
    row, fault = ffi.new("uint32_t *"), ffi.new("skl_fault *")
    pointers = ffi.cast("uint8_t **", view("uint64_t[]", sources))
    status = lib.skl_decode_batch(
        shape.to_c(),
        scale_log2,
        pointers,
        view("uint64_t[]", source_lens),
        view("uint32_t[]", num_positions),
        view("uint32_t[]", num_records),
        view("uint32_t[]", tokens),
        batch,
        view("uint8_t[]", codes, writable=True),
        row,
        fault,
    )
    if status != lib.SKL_OK:
        try:
            check(status, fault)
        except (ValueError, FormatError) as error:
            raise RowError(int(row[0])) from error
    return out


class BatchArrays(NamedTuple):
    """input_ids, labels int64 [B, T]; offsets int64 [B * T + 1]; token_ids uint32, probs float32 [nnz]."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    offsets: NDArray[np.int64]
    token_ids: NDArray[np.uint32]
    probs: NDArray[np.float32]


_BATCH_TYPES = ("int64_t[]", "int64_t[]", "int64_t[]", "uint32_t[]", "float[]")


class RowError(Exception):
    """Says which row of a batch its cause is about."""

    def __init__(self, row: int) -> None:
        self.row = row
        super().__init__(f"row {row}")


def quantise(
    offsets: NDArray[np.int64], token_ids: NDArray[np.uint32], weights: NDArray[np.float32], scale_log2: int
) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.uint8]]:
    """
    Turn weights into ratio codes in canonical order; weights too small for the code are left out.  SPEC 4.3.

    Args:
        offsets: [T + 1] int64.
        token_ids: [nnz] uint32, distinct within a position, in any order.
        weights: [nnz] float32 in (0, 2**scale_log2].
        scale_log2: 0..30.

    Returns:
        offsets [T + 1], token_ids [nnz'], codes [nnz'] with nnz' <= nnz.

    Raises:
        ValueError: A weight out of range or an id that comes twice; the message names the position.
    """
    longest = int(np.diff(offsets).max(initial=0))
    keys = np.empty(max(longest, 1), np.uint64)
    out_offsets = np.empty_like(offsets)
    out_ids, out_codes = np.empty(token_ids.size, np.uint32), np.empty(token_ids.size, np.uint8)
    fault = ffi.new("skl_fault *")
    status = lib.skl_quantise(
        offsets.size - 1,
        view("int64_t[]", offsets),
        view("uint32_t[]", token_ids),
        view("float[]", weights),
        scale_log2,
        view("uint64_t[]", keys, writable=True),
        keys.size,
        view("int64_t[]", out_offsets, writable=True),
        view("uint32_t[]", out_ids, writable=True),
        view("uint8_t[]", out_codes, writable=True),
        fault,
    )
    check(status, fault)
    kept = int(out_offsets[-1])
    return out_offsets, out_ids[:kept], out_codes[:kept]


def expand(offsets: NDArray[np.int64], codes: NDArray[np.uint8], scale_log2: int) -> NDArray[np.float32]:
    """Ratio codes [nnz] back to float32 weights [nnz] in (0, 2**scale_log2].  SPEC 4.3."""
    weights = np.empty(codes.size, np.float32)
    status = lib.skl_expand(
        offsets.size - 1,
        view("int64_t[]", offsets),
        view("uint8_t[]", codes),
        scale_log2,
        view("float[]", weights, writable=True),
    )
    check(status)
    return weights


_SAMPLERS = {
    "multinomial": lib.SKL_SAMPLER_MULTINOMIAL,
    "systematic": lib.SKL_SAMPLER_SYSTEMATIC,
    "topk": lib.SKL_SAMPLER_TOPK,
    "topp": lib.SKL_SAMPLER_TOPP,
}
_DTYPES = {
    "float32": lib.SKL_DTYPE_FLOAT32,
    "float16": lib.SKL_DTYPE_FLOAT16,
    "bfloat16": lib.SKL_DTYPE_BFLOAT16,
}
_RECORDS_A_CALL = 1 << 20  # bounds the room for records that a call may need


def draw(
    logits: NDArray[Any],
    *,
    dtype: str,
    sampler: str,
    rounds: int,
    k: int,
    p: float,
    proposal_temperature: float,
    self_normalise: bool,
    weighted: bool,
    seed: int,
    sequence: int,
    first_position: int,
) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[Any]]:
    """
    Draw the records of T positions; ranges as ``skl_sampling`` in skl.h has them.

    Args:
        logits: [T, V] of 4-byte (float32) or 2-byte items, contiguous along V, rows at any distance >= 0.
        dtype: "float32", "float16" or "bfloat16".
        sampler: "multinomial", "systematic", "topk" or "topp".
        rounds: Draws per position; without meaning for topk and topp.
        k: Most ids that topk and topp keep; else without meaning.
        p: Mass that topp keeps; else without meaning.
        proposal_temperature: Exponent of the proposal.
        self_normalise: Importance weights sum to 1.
        weighted: Return weights instead of counts.
        seed: Seed of the whole cache.
        sequence: Global number of the sequence.
        first_position: Position of the first row.

    Returns:
        offsets [T + 1], token_ids [nnz], counts uint8 or weights float32 [nnz].

    Raises:
        ValueError: A field out of range, or a row with NaN, +inf or nothing finite; names sequence and position.
    """
    positions, vocab_size = logits.shape
    stride = logits.strides[0] // logits.itemsize if positions > 1 else vocab_size
    sampling = ffi.new("skl_sampling *")
    sampling.sampler, sampling.dtype, sampling.vocab_size = _SAMPLERS[sampler], _DTYPES[dtype], vocab_size
    sampling.row_stride, sampling.rounds, sampling.k, sampling.p = stride, rounds, k, p
    sampling.proposal_temperature, sampling.self_normalise = proposal_temperature, self_normalise
    sampling.seed, sampling.sequence = seed, sequence
    num_scratch, most = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    check(lib.skl_draw_sizes(sampling, num_scratch, most))
    scratch = np.empty(num_scratch[0], np.uint64)
    rows_a_call = min(max(1, _RECORDS_A_CALL // most[0]), max(1, positions))
    token_ids = np.empty(rows_a_call * most[0], np.uint32)
    values = np.empty(token_ids.size, np.float32 if weighted else np.uint8)
    offsets = np.zeros(positions + 1, np.int64)
    parts: list[tuple[NDArray[np.uint32], NDArray[Any]]] = []
    fault = ffi.new("skl_fault *")
    for begin in range(0, positions, rows_a_call):
        rows = logits[begin : begin + rows_a_call]
        sampling.num_positions, sampling.first_position = len(rows), first_position + begin
        part = np.empty(len(rows) + 1, np.int64)
        status = lib.skl_draw(
            sampling,
            ffi.cast("void *", rows.ctypes.data),  # rows need not be contiguous with each other
            (len(rows) - 1) * stride + vocab_size,
            view("uint64_t[]", scratch, writable=True),
            scratch.size,
            view("int64_t[]", part, writable=True),
            view("uint32_t[]", token_ids, writable=True),
            NULL if weighted else view("uint8_t[]", values, writable=True),
            view("float[]", values, writable=True) if weighted else NULL,
            token_ids.size,
            fault,
        )
        check(status, fault, where=f"sequence {sequence}, ")
        offsets[begin + 1 : begin + len(part)] = part[1:] + offsets[begin]
        parts.append((token_ids[: part[-1]].copy(), values[: part[-1]].copy()))
    if not parts:
        return offsets, token_ids[:0], values[:0]
    return offsets, np.concatenate([ids for ids, _ in parts]), np.concatenate([pairs for _, pairs in parts])


def use_kernels(name: str) -> None:
    """
    Make the sampler run on "avx512", "avx2" or "portable" kernels; all give the same records.

    Raises:
        UnsupportedError: This processor, or this build, does not have them.
    """
    check(lib.skl_use_kernels(name.encode()))


def kernels_name() -> str:
    """Name of the kernels that the sampler runs on."""
    return str(ffi.string(lib.skl_kernels_name()).decode())


def merge_draws(
    draws: NDArray[np.uint32],
) -> tuple[NDArray[np.int64], NDArray[np.uint32], NDArray[np.uint8]]:
    """
    Merge the sorted draws of each position into (token id, count) pairs.

    Args:
        draws: [T, rounds] uint32, each row ascending; rounds 1..127.

    Returns:
        offsets [T + 1], token_ids [nnz] ascending within a position, counts [nnz] that sum to rounds.

    Raises:
        ValueError: A row is not sorted, or rounds is out of range; the message names the position.
    """
    assert draws.dtype == np.uint32
    assert draws.flags.c_contiguous
    positions, rounds = draws.shape
    if not 1 <= rounds <= 127:
        raise ValueError(f"counts hold 1..127 rounds, got {rounds}")
    offsets = np.empty(positions + 1, np.int64)
    token_ids, counts = np.empty(draws.size, np.uint32), np.empty(draws.size, np.uint8)
    fault = ffi.new("skl_fault *")
    status = lib.skl_merge_draws(
        positions,
        rounds,
        view("uint32_t[]", draws),
        view("int64_t[]", offsets, writable=True),
        view("uint32_t[]", token_ids, writable=True),
        view("uint8_t[]", counts, writable=True),
        fault,
    )
    if status == lib.SKL_ERR_ARG and fault.reason == lib.SKL_REASON_ID_ORDER:
        raise ValueError(f"position {fault.position}: draws are not sorted (id {fault.value} follows a larger one)")
    check(status, fault)
    kept = int(offsets[-1])
    return offsets, token_ids[:kept], counts[:kept]


RING_CONTROL_SIZE = 4096
"""Bytes of a ring's memory before its data; the data is a power of two of at least as many."""


class RingFrame(NamedTuple):
    """Where a frame's payload lies in the ring's memory, and what its header says; as ``skl_frame`` in skl.h."""

    offset: int
    length: int
    number: int
    tag: int
    type: int


class RingWords(NamedTuple):
    """The shared words of a ring; as ``skl_ring_words`` in skl.h."""

    capacity: int
    durable: int
    pushed: int
    popped: int
    wait_ns: int
    high_water: int
    producer_closed: bool
    consumer_closed: bool


def ring_memory(memory: Any) -> Any:
    """A handle on a writable mapping for the functions below; ``ring_unmap`` lets go of it."""
    return ffi.from_buffer("uint8_t[]", memory, require_writable=True)


def ring_unmap(memory: Any) -> None:
    """Let go of the mapping, so that it can be closed."""
    ffi.release(memory)


def ring_init(memory: Any) -> None:
    """
    Make zero-filled memory a ring.

    Raises:
        ValueError: The size is not RING_CONTROL_SIZE plus a power of two of at least as many bytes.
        UnsupportedError: The system has no futex: not a 64-bit Linux.
    """
    _check_ring(lib.skl_ring_init(memory, len(memory)))


def ring_push(memory: Any, type_: int, tag: int, parts: Sequence[Any], timeout_ns: int) -> bool:
    """
    Append a frame of contiguous buffers one after the other; False: no room in time.

    Raises:
        ValueError: The frame is larger than the ring.
        RingClosedError: The consumer closed.
        CorruptError: The ring's words were overwritten.
    """
    handles = [ffi.from_buffer("uint8_t[]", part) for part in parts]
    lengths = ffi.new("size_t[]", [len(handle) for handle in handles])
    pointers = ffi.new("void *[]", handles)
    status = lib.skl_ring_push(memory, len(memory), type_, tag, pointers, lengths, len(handles), timeout_ns)
    return _check_ring(status)


def ring_peek(memory: Any, timeout_ns: int) -> RingFrame | None:
    """
    The oldest frame, without taking it; None: nothing in time.

    Raises:
        RingClosedError: The producer closed and nothing is left.
        CorruptError: The ring's words were overwritten.
    """
    frame = ffi.new("skl_frame *")
    if not _check_ring(lib.skl_ring_peek(memory, len(memory), timeout_ns, frame)):
        return None
    return RingFrame(frame.offset, frame.length, frame.number, frame.tag, frame.type)


def ring_release(memory: Any) -> None:
    """Hand back the space of the frame last peeked."""
    _check_ring(lib.skl_ring_release(memory, len(memory)))


def ring_set_durable(memory: Any, durable: int) -> None:
    """Publish how far the consumer's output is safe, 0..2**64 - 1."""
    _check_ring(lib.skl_ring_set_durable(memory, len(memory), durable))


def ring_close(memory: Any, *, producer: bool) -> None:
    """Say that this side pushes or pops no more, and wake the other."""
    side = lib.SKL_SIDE_PRODUCER if producer else lib.SKL_SIDE_CONSUMER
    _check_ring(lib.skl_ring_close(memory, len(memory), side))


def ring_words(memory: Any) -> RingWords:
    """The shared words, each read by itself."""
    words = ffi.new("skl_ring_words *")
    _check_ring(lib.skl_ring_state(memory, len(memory), words))
    return RingWords(
        words.capacity,
        words.durable,
        words.pushed,
        words.popped,
        words.wait_ns,
        words.high_water,
        bool(words.producer_closed),
        bool(words.consumer_closed),
    )


def _check_ring(status: int) -> bool:
    """False on a time-out, which is no error here: the caller looks whether the other side lives, and goes on."""
    if status == lib.SKL_ERR_TIMEOUT:
        return False
    if status == lib.SKL_ERR_CORRUPT:
        raise CorruptError("the ring's shared memory contradicts itself: something overwrote it")
    check(status)
    return True


def _expect(shape: Shape, *arrays: NDArray[Any] | None) -> None:
    """C trusts lengths and types; they are made sure of here."""
    positions, records = shape.num_positions, shape.num_records
    expected = (
        (positions + 1, np.int64),
        (records, np.uint32),
        (records, np.uint8),
        (positions + 1, np.uint32),
        (shape.num_columns * positions, np.uint16),
    )
    for array, (size, dtype) in zip(arrays, expected, strict=True):
        assert array is None or (array.size == size and array.dtype == dtype and array.flags.c_contiguous)


__all__ = [
    "RING_CONTROL_SIZE",
    "BatchArrays",
    "RingFrame",
    "RingWords",
    "RowError",
    "Shape",
    "address_of",
    "check",
    "decode",
    "decode_batch",
    "draw",
    "encode",
    "expand",
    "kernels_name",
    "merge_draws",
    "payload_size",
    "quantise",
    "ring_close",
    "ring_init",
    "ring_memory",
    "ring_peek",
    "ring_push",
    "ring_release",
    "ring_set_durable",
    "ring_unmap",
    "ring_words",
    "use_kernels",
    "view",
]
