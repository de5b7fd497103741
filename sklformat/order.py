"""
The order of sequences and documents: a pure function of (seed, epoch, index) that needs no memory.

A Feistel network over the smallest even number of bits that holds n, walked until it lands inside.
SPEC.md section 12 specifies it with test vectors; a change of one bit here is a new order algorithm.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sklformat.checksums import checksum

ALGORITHM, VERSION = 1, 1
"""Identifiers of this order in headers and loader states."""

_ROUNDS = 8


def permute(indices: ArrayLike, n: int, *, seed: int, epoch: int = 0) -> NDArray[np.int64]:
    """
    Where each index goes in the pseudo-random permutation of ``[0, n)`` named by (seed, epoch).

    Args:
        indices: Integers in [0, n), any shape.
        n: Size of the permutation, 1..2**62.
        seed: 0..2**64 - 1.
        epoch: 0..2**64 - 1; each epoch has its own permutation.

    Returns:
        int64 array of the shape of ``indices``; over all of [0, n) each value comes exactly once.

    Raises:
        ValueError: n is out of range, or an index lies outside [0, n).

    Source: SPEC section 12.
    """
    if not 1 <= n <= 1 << 62:
        raise ValueError(f"a permutation needs 1..2**62 elements, got {n}")
    start = np.asarray(indices, dtype=np.int64)
    if start.size and (start.min() < 0 or start.max() >= n):
        raise ValueError(f"indices must be in [0, {n}), got values from {start.min()} to {start.max()}")
    half = (max((n - 1).bit_length(), 2) + 1) // 2
    keys = [np.uint64(checksum(struct.pack("<QQQ", seed, epoch, number))) for number in range(_ROUNDS)]
    values = start.astype(np.uint64).ravel()
    pending = np.arange(values.size)
    while pending.size:
        # Cycle walking: outside [0, n) the network is applied again; it lands inside after at most 4 steps on average.
        values[pending] = _network(values[pending], half, keys)
        pending = pending[values[pending] >= np.uint64(n)]
    return values.astype(np.int64).reshape(start.shape)


def _network(values: NDArray[np.uint64], half: int, keys: list[np.uint64]) -> NDArray[np.uint64]:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << bits) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
