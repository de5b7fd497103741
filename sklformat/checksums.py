"""
The only door to xxhash: checksums that detect damage, and fingerprints that name content.

XXH3-64 values are integers, stored as u64; XXH3-128 values are 32 hexadecimal digits, stored as a 16-byte
little-endian integer.  SPEC.md section 6.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import xxhash
from numpy.typing import ArrayLike, NDArray

Buffer = bytes | bytearray | memoryview

__all__ = [
    "Fingerprint",
    "alignment",
    "alignments",
    "check_integers",
    "checksum",
    "checksums_of",
    "describe_mismatch",
    "fingerprint",
    "fingerprint_of",
    "tokens_array",
]


def checksum(data: Buffer, seed: int = 0) -> int:
    """XXH3-64 of ``data`` with a 64-bit seed."""
    value: int = xxhash.xxh3_64_intdigest(data, seed)
    return value


def checksums_of(data: memoryview, begins: Iterable[int], lengths: Iterable[int], seed: int = 0) -> NDArray[np.uint64]:
    """
    XXH3-64 of many pieces of some memory.

    Args:
        data: Items of one size.
        begins: [n] where each piece begins, in items.
        lengths: [n] how many items it has.
        seed: 64 bits.

    Returns:
        [n] uint64.
    """
    digest, places = xxhash.xxh3_64_intdigest, zip(begins, lengths, strict=True)
    return np.array([digest(data[begin : begin + length], seed) for begin, length in places], np.uint64)


def describe_mismatch(name: str, stored: int, computed: int) -> str:
    """What is wrong where bytes do not give the checksum that is stored beside them."""
    return f"{name} {stored:#018x} stored, {computed:#018x} computed"


def fingerprint(data: Buffer) -> str:
    """XXH3-128 of ``data``, 32 hexadecimal digits."""
    return str(xxhash.xxh3_128_hexdigest(data))


def fingerprint_of(parts: Iterable[Buffer]) -> str:
    """XXH3-128 of the concatenation of ``parts``, 32 hexadecimal digits, without joining them in memory."""
    state = xxhash.xxh3_128()
    for part in parts:
        state.update(part)
    return str(state.hexdigest())


class Fingerprint:
    """``fingerprint_of`` parts that come one at a time."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def update(self, part: Buffer) -> None:
        """Add a part."""
        self._state.update(part)

    def digits(self) -> str:
        """Of the parts so far, 32 hexadecimal digits."""
        return str(self._state.hexdigest())


def tokens_array(tokens: ArrayLike) -> NDArray[np.uint32]:
    """
    Token ids as a contiguous 1-D uint32 array, never wrapped.

    Raises:
        ValueError: Not 1-D, not integers, or a value outside [0, 2**32).
    """
    array = np.asarray(tokens)
    check_integers(array)
    if array.dtype != np.uint32 and array.size and (int(array.min()) < 0 or int(array.max()) > 0xFFFFFFFF):
        raise ValueError(f"tokens must be in [0, 2**32), got values from {array.min()} to {array.max()}")
    return np.ascontiguousarray(array, dtype="<u4")


def check_integers(tokens: NDArray[Any]) -> None:
    """
    An array may be token ids; their values are not looked at.

    Raises:
        ValueError: Not 1-D, or not integers.
    """
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise ValueError(f"tokens must be a 1-D array of integers, got shape {tokens.shape} of {tokens.dtype}")


def alignment(tokens: ArrayLike) -> int:
    """
    The alignment checksum of a sequence: XXH3-64 over its tokens as little-endian u32.

    Args:
        tokens: [seq_len + 1] integer token ids.

    Raises:
        ValueError: Not 1-D integers in [0, 2**32).

    Source: SPEC section 6.3.
    """
    return checksum(tokens_array(tokens).view(np.uint8).data)


def alignments(tokens: NDArray[np.uint32], num_positions: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """
    The alignment checksums of many sequences.

    Args:
        tokens: [B, T + 1] uint32 in one piece.
        num_positions: [B] uint32, at most T: the row's tokens are one more.

    Returns:
        [B] uint64.
    """
    data = tokens.astype("<u4", copy=False).reshape(-1).data
    begins = range(0, tokens.size, tokens.shape[1])
    return checksums_of(data, begins, (num_positions + np.uint32(1)).tolist())
