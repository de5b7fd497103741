"""Whether whole blocks are sound, many in a call: blocks.c and checksum.c."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sklformat.native.codec import Shape
from sklformat.native.door import check, expect, ffi, lib, view


def find_misaligned(
    tokens: NDArray[np.uint32], num_positions: NDArray[np.uint32], alignment: NDArray[np.uint64]
) -> tuple[int, int] | None:
    """
    The first row of which the tokens do not give the alignment checksum.  SPEC section 6.3.

    Args:
        tokens: [B, T + 1] uint32.
        num_positions: [B] uint32, at most T; 0 for a row that is not looked at.
        alignment: [B] uint64.

    Returns:
        The row and what its tokens give, or None where all do.

    Raises:
        ValueError: A row of more than T positions.
    """
    rows, width = tokens.shape
    for array, dtype in ((num_positions, np.uint32), (alignment, np.uint64)):
        expect(array, rows, dtype)
    little = tokens.astype("<u4", copy=False)
    row, computed = ffi.new("uint32_t *"), ffi.new("uint64_t *")
    status = lib.skl_check_tokens(
        rows,
        width - 1,
        view("uint32_t[]", little),
        view("uint32_t[]", num_positions),
        view("uint64_t[]", alignment),
        row,
        computed,
    )
    if status == lib.SKL_ERR_CORRUPT:
        return int(row[0]), int(computed[0])
    check(status)
    return None


def find_unsound(
    blocks: NDArray[np.uint64],
    block_lens: NDArray[np.uint64],
    expected: NDArray[np.uint8],
    *,
    key: int,
    max_size: int,
    checksum_offset: int,
) -> int | None:
    """
    The first block that has not the header that is expected, or not the checksums of its content.

    Args:
        blocks: [n] uint64 addresses, of memory that the caller keeps alive.
        block_lens: [n] uint64 bytes, padding included.
        expected: [n, header size] uint8 headers; the payload's checksum in them is not looked at.
        key: The shard's.
        max_size: Most bytes of a block.
        checksum_offset: Where in a header the payload's checksum begins.

    Returns:
        Its place, or None where all are sound.

    Raises:
        ValueError: A header without room for both checksums.
    """
    expect(block_lens, blocks.size, np.uint64)
    expect(expected, blocks.size * expected.shape[1], np.uint8)
    layout = ffi.new("skl_block_layout *", [key, max_size, expected.shape[1], checksum_offset])
    block = ffi.new("uint64_t *")
    status = lib.skl_check_blocks(
        layout,
        blocks.size,
        _pointers(blocks),
        view("uint64_t[]", block_lens),
        view("uint8_t[]", expected),
        block,
    )
    if status == lib.SKL_ERR_CORRUPT:
        return int(block[0])
    check(status)
    return None


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
    for array, dtype in ((source_lens, np.uint64), (num_positions, np.uint32), (num_records, np.uint32)):
        expect(array, sources.size, dtype)
    status = lib.skl_check_columns(
        shape.to_c(),
        sources.size,
        _pointers(sources),
        view("uint64_t[]", source_lens),
        view("uint32_t[]", num_positions),
        view("uint32_t[]", num_records),
    )
    if status == lib.SKL_ERR_CORRUPT:
        return False
    check(status)
    return True


def _pointers(addresses: NDArray[np.uint64]) -> Any:
    """Valid as long as the array is."""
    expect(addresses, addresses.size, np.uint64)
    return ffi.cast("uint8_t **", view("uint64_t[]", addresses))
