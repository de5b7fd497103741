"""Payloads of one sequence to arrays and back: codec.c, ratios.c, quantise.c and distinct.c."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sklformat.native.door import check, expect, ffi, lib, view


@dataclass(frozen=True, slots=True)
class Shape:
    """Where the bytes of one payload lie; the fields are those of ``skl_shape`` in skl.h."""

    kind: int
    profile: int
    record_count_size: int
    token_size: int
    columns: int
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
                self.columns,
                self.vocab_size,
                self.rounds,
                self.num_positions,
                self.num_records,
            ],
        )


def payload_size(shape: Shape) -> int:
    """
    Size in bytes of a payload of this shape, without padding.  SPEC 5.1.

    Raises:
        ValueError: A field of the shape has no meaning, or does not fit the profile.
    """
    return _payload_size(shape.to_c())


def columns_size(shape: Shape) -> int:
    """Bytes of the optional columns in such a payload, as ``payload_size``.  SPEC 5.1."""
    return payload_size(shape) - payload_size(replace(shape, columns=0)) if shape.columns else 0


def _payload_size(shape: Any) -> int:
    size = ffi.new("uint64_t *")
    check(lib.skl_payload_size(shape, size))
    return int(size[0])


def record_size(shape: Shape) -> int:
    """Bytes of a record.  SPEC 4.1."""
    return 4 if shape.profile == lib.SKL_PROFILE_R32 else 3


def encode(
    shape: Shape,
    offsets: NDArray[np.int64],
    token_ids: NDArray[np.uint32],
    codes: NDArray[np.uint8],
    tokens: NDArray[np.uint32] | None,
    columns: NDArray[np.uint8] | None,
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
        columns: uint8 [columns_size(shape)], as they lie in the payload, or None where there are none.
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
        view("uint8_t[]", columns),
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
    NDArray[np.uint8] | None,
]:
    """
    Read and check one payload, given with its zero padding.

    Returns:
        offsets [T + 1], token_ids [nnz], codes [nnz], tokens [T + 1] or None, columns [columns_size(shape)] or
        None; what is in the columns is not checked.

    Raises:
        ValueError: The shape has no meaning.
        TruncatedError: The payload is shorter than the shape says.
        CorruptError: The bytes contradict SPEC section 4 or 5; the message names position and value.
    """
    positions, records = shape.num_positions, shape.num_records
    # Before anything is allocated: what the shape promises must lie within the bytes at hand.
    c_shape = shape.to_c()
    if _payload_size(c_shape) + 64 > len(payload):
        check(lib.SKL_ERR_TRUNCATED)
    offsets = np.empty(positions + 1, np.int64)
    token_ids = np.empty(records, np.uint32)
    codes = np.empty(records, np.uint8)
    tokens_out = np.empty(positions + 1, np.uint32) if tokens and shape.token_size else None
    columns_out = np.empty(columns_size(shape), np.uint8) if columns and shape.columns else None
    fault = ffi.new("skl_fault *")
    # Released before an error is raised: its traceback would keep the payload's file mapped.
    with ffi.from_buffer("uint8_t[]", payload) as source:
        status = lib.skl_decode(
            c_shape,
            source,
            len(source),
            view("int64_t[]", offsets, writable=True),
            view("uint32_t[]", token_ids, writable=True),
            view("uint8_t[]", codes, writable=True),
            view("uint32_t[]", tokens_out, writable=True),
            view("uint8_t[]", columns_out, writable=True),
            fault,
        )
    check(status, fault)
    return offsets, token_ids, codes, tokens_out, columns_out


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
        ValueError: A weight out of range or an id that comes twice, with the position; or offsets of other arrays.
    """
    _expect_records(offsets, token_ids)
    expect(weights, token_ids.size, np.float32)
    keys = _scratch_keys(offsets, token_ids.size)
    out_offsets = np.empty_like(offsets)
    out_ids, out_codes = np.empty(token_ids.size, np.uint32), np.empty(token_ids.size, np.uint8)
    fault = ffi.new("skl_fault *")
    status = lib.skl_quantise(
        offsets.size - 1,
        token_ids.size,
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


def check_distinct(offsets: NDArray[np.int64], token_ids: NDArray[np.uint32]) -> None:
    """
    No id comes twice in a position; kind "ratios" cannot show this in one pass over its order.

    Args:
        offsets: [T + 1] int64, rising from 0 to nnz.
        token_ids: [nnz] uint32.

    Raises:
        CorruptError: One does; the message names the position.
        ValueError: The offsets are those of other arrays.
    """
    _expect_records(offsets, token_ids)
    keys, fault = _scratch_keys(offsets, token_ids.size), ffi.new("skl_fault *")
    status = lib.skl_check_distinct(
        offsets.size - 1,
        token_ids.size,
        view("int64_t[]", offsets),
        view("uint32_t[]", token_ids),
        view("uint64_t[]", keys, writable=True),
        keys.size,
        fault,
    )
    check(status, fault)


def _expect_records(offsets: NDArray[np.int64], token_ids: NDArray[np.uint32]) -> None:
    expect(offsets, max(offsets.size, 1), np.int64)
    expect(token_ids, token_ids.size, np.uint32)


def _scratch_keys(offsets: NDArray[np.int64], num_records: int) -> NDArray[np.uint64]:
    """A key for each id of the longest position; at least one, since C has no empty arrays."""
    longest = min(int(np.diff(offsets).max(initial=0)), num_records)
    return np.empty(max(longest, 1), np.uint64)


def expand(offsets: NDArray[np.int64], codes: NDArray[np.uint8], scale_log2: int) -> NDArray[np.float32]:
    """Ratio codes [nnz] back to float32 weights [nnz] in (0, 2**scale_log2]; refuses offsets of others.  SPEC 4.3."""
    expect(offsets, max(offsets.size, 1), np.int64)
    expect(codes, codes.size, np.uint8)
    weights = np.empty(codes.size, np.float32)
    status = lib.skl_expand(
        offsets.size - 1,
        codes.size,
        view("int64_t[]", offsets),
        view("uint8_t[]", codes),
        scale_log2,
        view("float[]", weights, writable=True),
    )
    check(status)
    return weights


def _expect(shape: Shape, *arrays: NDArray[Any] | None) -> None:
    positions, records = shape.num_positions, shape.num_records
    expected = (
        (positions + 1, np.int64),
        (records, np.uint32),
        (records, np.uint8),
        (positions + 1, np.uint32),
        (columns_size(shape), np.uint8),
    )
    for array, (size, dtype) in zip(arrays, expected, strict=True):
        expect(array, size, dtype)
