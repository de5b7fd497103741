"""What the records of many payloads add up to: stats.c."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sklformat.native.batches import check_rows
from sklformat.native.codec import Shape
from sklformat.native.door import expect, ffi, lib, view

SUMS: tuple[str, ...] = tuple(
    name.removeprefix("SKL_STATS_").lower()
    for _, name in sorted(ffi.typeof("skl_stats_sum").elements.items())
    if name != "SKL_STATS_SUMS"
)
"""Of a row, in the order of its sums; skl.h says what each is."""


class StatsTables:
    """
    What was seen so far, added up over every payload that ``add`` was given.

    Attributes:
        bucket_positions: As given.
        ids: As given.
        uniques: uint64 [num_uniques], positions by their number of records; the last for that many or more.
        sizes: uint64 [256], records by their count; of ratios by the powers of two that they are below 1.
        id_counts: uint64 [len(ids)], how often each is a token.
        bins: float64 [20, 3], by the largest weight: positions, largest weights, how often it was the label's.
        buckets: float64 [num_buckets, 5], by place in the sequence: positions, labels that have a record, labels of
            elsewhere that have one, what is expected of tokens without record, weights of labels.
    """

    def __init__(self, num_uniques: int, num_buckets: int, bucket_positions: int, ids: NDArray[np.uint32]) -> None:
        self._num_uniques, self._num_buckets = num_uniques, num_buckets
        self.bucket_positions, self.ids = bucket_positions, ids
        self.uniques, self.sizes = np.zeros(num_uniques, np.uint64), np.zeros(256, np.uint64)
        self.id_counts = np.zeros(ids.size, np.uint64)
        self.bins, self.buckets = np.zeros((lib.SKL_STATS_BINS, 3)), np.zeros((num_buckets, 5))
        self._reserve(0, 0)

    def _reserve(self, positions: int, records: int) -> None:
        self._offsets, self._tokens = np.empty(positions + 1, np.int64), np.empty(positions + 1, np.uint32)
        self._token_ids, self._codes = np.empty(records, np.uint32), np.empty(records, np.uint8)
        self._weights = np.empty(records, np.float32)

    def add(
        self,
        shape: Shape,
        scale_log2: int,
        sources: NDArray[np.uint64],
        source_lens: NDArray[np.uint64],
        num_positions: NDArray[np.uint32],
        num_records: NDArray[np.uint32],
    ) -> NDArray[np.float64]:
        """
        Decode and check payloads, and add them to the tables.

        Args:
            shape: Of every payload; its num_positions and num_records do not count.
            scale_log2: Kind ratios, 0..30.
            sources: [B] uint64 addresses of the payloads, of memory that the caller keeps alive.
            source_lens: [B] uint64 bytes, padding included.
            num_positions: [B] uint32.
            num_records: [B] uint32.

        Returns:
            [B, len(SUMS)] float64.

        Raises:
            RowError: Around the ValueError, TruncatedError or CorruptError of one row; the tables are then spoilt.
        """
        arrays = ((sources, np.uint64), (source_lens, np.uint64), (num_positions, np.uint32), (num_records, np.uint32))
        for array, dtype in arrays:
            expect(array, sources.size, dtype)
        positions, records = int(num_positions.max(initial=0)), int(num_records.max(initial=0))
        if positions + 1 > self._offsets.size or records > self._codes.size:
            self._reserve(max(positions, self._offsets.size - 1), max(records, self._codes.size))
        rows = np.zeros((sources.size, len(SUMS)))
        views = [
            view("uint32_t[]", self.ids),
            view("int64_t[]", self._offsets, writable=True),
            view("uint32_t[]", self._tokens, writable=True),
            view("uint32_t[]", self._token_ids, writable=True),
            view("uint8_t[]", self._codes, writable=True),
            view("float[]", self._weights, writable=True),
            view("double[]", rows, writable=True),
            view("uint64_t[]", self.uniques, writable=True),
            view("uint64_t[]", self.sizes, writable=True),
            view("uint64_t[]", self.id_counts, writable=True),
            view("double[]", self.bins, writable=True),
            view("double[]", self.buckets, writable=True),
        ]
        room = [self._offsets.size - 1, self._codes.size]
        tables = [self._num_uniques, self._num_buckets, self.bucket_positions, self.ids.size]
        row, fault = ffi.new("uint32_t *"), ffi.new("skl_fault *")
        addresses = view("uint64_t[]", sources)
        status = lib.skl_gather_stats(
            shape.to_c(),
            scale_log2,
            sources.size,
            ffi.cast("uint8_t **", addresses),
            view("uint64_t[]", source_lens),
            view("uint32_t[]", num_positions),
            view("uint32_t[]", num_records),
            ffi.new("skl_stats *", [*room, *tables, *views]),
            row,
            fault,
        )
        check_rows(status, fault, row)
        return rows
