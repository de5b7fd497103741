"""Payloads of many sequences to the arrays of a training step: batch.c."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sklformat.errors import FormatError
from sklformat.native.codec import Shape, record_size
from sklformat.native.door import check, ffi, lib, view


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
    arena: Arena | None = None,
    *,
    starts: bool = False,
    packed: bool = False,
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
        arena: Memory for the result, which then lasts until the arena is used again, and has no probs; None: the
            result's own.
        starts: Whether document starts and positions are wanted, of a shape that has the column.
        packed: Leave the records as they are stored, unchecked, for whoever decodes them elsewhere; then there are no
            token_ids and probs.

    Raises:
        RowError: Around the ValueError, TruncatedError or CorruptError of one row.
    """
    rows = sources.size
    total = int(num_records.sum(dtype=np.uint64))
    if arena is not None:
        arena.reset(28 * rows * (row_positions + 1) + 8 + 5 * total)
    new = np.empty if arena is None else arena.empty
    out = BatchArrays(
        new((rows, row_positions + 1), np.uint32) if tokens is None else tokens,
        new((rows, row_positions), np.int64),
        new((rows, row_positions), np.int64),
        new((rows * row_positions + 1,), np.int64),
        new((0 if packed else total,), np.uint32),
        new((0 if packed or arena is not None else total,), np.float32),
        np.empty((rows, row_positions), np.bool_) if starts else None,
        np.empty((rows, row_positions), np.int64) if starts else None,
        np.empty(total * record_size(shape), np.uint8) if packed else None,
    )
    arrays: tuple[NDArray[Any] | None, ...] = out if arena is None else (*out[:5], None, *out[6:])
    views = [view(c, a, writable=True) for c, a in zip(_BATCH_TYPES, arrays, strict=True)]
    batch = ffi.new("skl_batch *", [rows, row_positions, total, ignored_label, tokens is not None, *views])
    row, fault = ffi.new("uint32_t *"), ffi.new("skl_fault *")
    pointers = ffi.cast("uint8_t **", view("uint64_t[]", sources))
    status = lib.skl_decode_batch(
        shape.to_c(),
        scale_log2,
        pointers,
        view("uint64_t[]", source_lens),
        view("uint32_t[]", num_positions),
        view("uint32_t[]", num_records),
        batch,
        view("uint8_t[]", new((0 if packed else total,), np.uint8), writable=True),  # scratch
        row,
        fault,
    )
    check_rows(status, fault, row)
    return out


class Arena:
    """
    Memory that is used again and again, for decoding that only checks: nobody keeps the result.

    Fresh memory costs more than decoding into it: the system clears each page of it at its first touch.
    """

    def __init__(self) -> None:
        self._memory, self._used = np.empty(0, np.uint8), 0

    def reset(self, size_bytes: int) -> None:
        """Start over, with room for arrays of ``size_bytes`` in total; what was handed out before is overwritten."""
        self._used = 0
        size_bytes += 8 * _ARENA_ALIGN
        if self._memory.size < size_bytes:
            self._memory = np.empty(size_bytes, np.uint8)

    def empty(self, shape: tuple[int, ...], dtype: type[Any]) -> NDArray[Any]:
        """As ``numpy.empty``, out of this memory; at most 8 arrays fit between two resets."""
        start, size = self._used, math.prod(shape) * np.dtype(dtype).itemsize
        self._used = -(-(start + size) // _ARENA_ALIGN) * _ARENA_ALIGN
        array: NDArray[Any] = self._memory[start : start + size].view(dtype).reshape(shape)
        return array


_ARENA_ALIGN = 64


class BatchArrays(NamedTuple):
    """
    tokens uint32 [B, T + 1]; input_ids, labels int64 [B, T]; offsets int64 [B * T + 1]; token_ids uint32, probs
    float32 [nnz]; where they were wanted, document_starts bool and position_ids int64 [B, T], and the records uint8
    [nnz * record size] as they are stored.
    """

    tokens: NDArray[np.uint32]
    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    offsets: NDArray[np.int64]
    token_ids: NDArray[np.uint32]
    probs: NDArray[np.float32]
    document_starts: NDArray[np.bool_] | None
    position_ids: NDArray[np.int64] | None
    records: NDArray[np.uint8] | None


_BATCH_TYPES = ("uint32_t[]", *3 * ("int64_t[]",), "uint32_t[]", "float[]", "uint8_t[]", "int64_t[]", "uint8_t[]")


def check_rows(status: int, fault: Any, row: Any) -> None:
    """
    As ``check``, of a call over many rows.

    Raises:
        RowError: From what ``check`` raises; says which row, where C left its number.
    """
    try:
        check(status, fault)
    except (ValueError, FormatError) as error:
        raise RowError(int(row[0])) from error


class RowError(Exception):
    """Says which row of a batch its cause is about."""

    def __init__(self, row: int) -> None:
        self.row = row
        super().__init__(f"row {row}")
