"""Whether the columns of many payloads are sound: columns.c."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sklformat.native.codec import Shape
from sklformat.native.door import check, expect, ffi, lib, view


def columns_are_sound(
    shape: Shape,
    sources: NDArray[np.uint64],
    source_lens: NDArray[np.uint64],
    num_positions: NDArray[np.uint32],
    num_records: NDArray[np.uint32],
) -> bool:
    """
    Whether the columns of many payloads hold what SPEC section 5.1 allows; what is wrong is not named.

    Args:
        shape: Of every payload; its num_positions and num_records do not count.
        sources: [B] uint64 addresses of the payloads, of memory that the caller keeps alive.
        source_lens: [B] uint64 bytes, padding included.
        num_positions: [B] uint32.
        num_records: [B] uint32.

    Raises:
        ValueError, TruncatedError: As ``decode``.
    """
    arrays = ((sources, np.uint64), (source_lens, np.uint64), (num_positions, np.uint32), (num_records, np.uint32))
    for array, dtype in arrays:
        expect(array, sources.size, dtype)
    addresses = view("uint64_t[]", sources)
    status = lib.skl_check_columns(
        shape.to_c(),
        sources.size,
        ffi.cast("uint8_t **", addresses),
        view("uint64_t[]", source_lens),
        view("uint32_t[]", num_positions),
        view("uint32_t[]", num_records),
    )
    if status == lib.SKL_ERR_CORRUPT:
        return False
    check(status)
    return True
