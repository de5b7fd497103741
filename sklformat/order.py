"""
The order of sequences and documents: a pure function of (seed, epoch, index) that needs no memory.

A Feistel network over the smallest even number of bits that holds n, walked until it lands inside.
SPEC.md section 12 specifies it with test vectors; a change of one bit here is a new order algorithm.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sklformat.checksums import checksum

ALGORITHM, VERSION = 1, 1
"""Identifiers of this order in headers and loader states."""

_ROUNDS = 8
_PLACES_AT_ONCE = 4096  # the network costs the same for one index and for some hundred


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
        ValueError: n, seed or epoch is out of range, or an index lies outside [0, n).

    Source: SPEC section 12.
    """
    if not 1 <= n <= 1 << 62:
        raise ValueError(f"a permutation needs 1..2**62 elements, got {n}")
    if not (0 <= seed < 1 << 64 and 0 <= epoch < 1 << 64):
        raise ValueError(f"seed and epoch must be in 0..2**64 - 1, got {seed} and {epoch}")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """
    Which sequences make up each batch of an epoch, on each rank and worker: arithmetic on the order, no state.

    Global step s takes ``batch_size * world_size`` sequences that follow each other in the epoch's order; rank r has
    the r-th slice of them, and worker w of W makes every W-th batch of its rank.  So the stream of sequences is the
    same for any number of workers and for any world size that makes the same global batch.

    Args:
        num_sequences: Size of the epoch, >= 1.
        batch_size: Sequences a batch on one rank, >= 1.
        rank, world_size: Which process of how many.
        seed: Of the order, 0..2**64 - 1.
        shuffle: Whether the order is ``permute``'s; else it is 0, 1, 2, ...
        tail: What becomes of the sequences at the end that fill no global batch: "drop" them, "pad" with empty places
            (index -1), or "wrap" around to the epoch's beginning.

    Raises:
        ValueError: A value out of range, or an epoch that has no batch at all.
        TypeError: A number that is no integer.

    Source: SPEC section 12.
    """

    num_sequences: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    shuffle: bool = True
    tail: str = "drop"

    def __post_init__(self) -> None:
        for name in ("num_sequences", "batch_size", "rank", "world_size", "seed"):
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, operator.index(value))
            except TypeError:
                raise TypeError(f"{name} must be an integer, got {value!r}") from None
        if self.batch_size < 1 or self.world_size < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"need batch_size >= 1 and 0 <= rank < world_size, got batch_size {self.batch_size}, "
                f"rank {self.rank}, world_size {self.world_size}"
            )
        if self.tail not in ("drop", "pad", "wrap"):
            raise ValueError(f"tail must be drop, pad or wrap, got {self.tail!r}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must be in 0..2**64 - 1, got {self.seed}")
        if self.num_batches(0) < 1:
            raise ValueError(
                f"{self.num_sequences} sequences do not fill one batch of {self.batch_size} x {self.world_size} ranks; "
                "lower batch_size, or take tail='pad' or 'wrap'"
            )

    @property
    def global_batch(self) -> int:
        """Sequences of all ranks in one step."""
        return self.batch_size * self.world_size

    def num_batches(self, consumed: int) -> int:
        """Batches that this rank (and so every rank) still has in an epoch of which ``consumed`` sequences are done."""
        rest = max(self.num_sequences - consumed, 0)
        return rest // self.global_batch if self.tail == "drop" else -(-rest // self.global_batch)

    def batches(
        self, epoch: int, consumed: int, worker: int = 0, num_workers: int = 1
    ) -> Iterator[tuple[NDArray[np.int64], int]]:
        """
        The batches of this rank that worker ``worker`` makes in an epoch of which ``consumed`` sequences are done.

        Yields:
            The [batch_size] sequences of a batch, -1 for an empty place, and the sequences consumed before its step.
        """
        size = self.global_batch
        steps = range(consumed + worker * size, consumed + self.num_batches(consumed) * size, num_workers * size)
        at_once = max(1, _PLACES_AT_ONCE // self.batch_size)
        within = self.rank * self.batch_size + np.arange(self.batch_size, dtype=np.int64)
        for first in range(0, len(steps), at_once):
            some = steps[first : first + at_once]
            places = np.asarray(some, np.int64)[:, None] + within
            empty = places >= self.num_sequences
            places %= self.num_sequences
            if self.shuffle:
                places = permute(places, self.num_sequences, seed=self.seed, epoch=epoch)
            if self.tail == "pad":
                places[empty] = -1
            yield from zip(places, some, strict=True)

    def after(self, epoch: int, consumed: int) -> tuple[int, int]:
        """(epoch, consumed) after the step that begins there; the end of an epoch is the beginning of the next."""
        consumed += self.global_batch
        return (epoch, consumed) if self.num_batches(consumed) else (epoch + 1, 0)
