"""
The random words that orders are made of: pure functions of a few integers.

SPEC.md section 12.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from sklformat.checksums import checksum


def word(*numbers: int) -> int:
    """A random u64 of its own for each tuple of integers in 0..2**64 - 1."""
    return checksum(struct.pack(f"<{len(numbers)}Q", *numbers))


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
