"""
The orders of sequences and documents: pure functions of (seed, epoch, index) that need no memory.

A Feistel network over the smallest even number of bits that holds n, walked until it lands inside, permutes all of
[0, n), or blocks of it and what is inside of each.
SPEC.md section 12 specifies both with test vectors; a change of one bit here is a new order algorithm.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sklformat.format.mixture import Mixture
from sklformat.format.words import mix, word

ALGORITHM, VERSION = 1, 1
"""Identifiers of ``permute`` in headers and loader states."""
WINDOWED_ALGORITHM = 2
"""Identifier of ``permute_windows`` in loader states."""

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
    start = _checked(indices, n, seed, epoch)
    keys = _keys(seed, epoch)
    return _walk(start.astype(np.uint64).ravel(), n, keys).astype(np.int64).reshape(start.shape)


def permute_windows(indices: ArrayLike, n: int, window: int, *, seed: int, epoch: int = 0) -> NDArray[np.int64]:
    """
    Where each index goes in the pseudo-random permutation of ``[0, n)`` that keeps neighbourhoods of ``window``.

    Indices b·window to b·window + window - 1 go to as many numbers that follow each other (modulo n), in random order,
    so that whoever reads in this order has one such stretch in hand at a time.  The stretches come in random order, and
    begin elsewhere in each epoch.

    Args:
        indices: Integers in [0, n), any shape.
        n: Size of the permutation, 1..2**62.
        window: Length of a stretch, 1..2**62; at least n: as ``permute``, but for where it begins.
        seed: 0..2**64 - 1.
        epoch: 0..2**64 - 1; each epoch has its own permutation.

    Returns:
        int64 array of the shape of ``indices``; over all of [0, n) each value comes exactly once.

    Raises:
        ValueError: n, window, seed or epoch is out of range, or an index lies outside [0, n).

    Source: SPEC section 12.
    """
    if not 1 <= window <= 1 << 62:
        raise ValueError(f"a window holds 1..2**62 places, got {window}")
    start = _checked(indices, n, seed, epoch)
    whole = n // window  # stretches of full length
    blocks, inside = np.divmod(start.astype(np.uint64).ravel(), np.uint64(window))
    out = np.empty_like(blocks)
    full = blocks < np.uint64(whole)
    if full.any():
        out[full] = _walk(blocks[full], whole, _keys(seed, epoch)) * np.uint64(window)
        out[full] += _walk(inside[full], window, _block_keys(blocks[full], seed, epoch))
    if not full.all():
        rest = ~full
        inner = _walk(inside[rest], n - whole * window, _block_keys(blocks[rest], seed, epoch))
        out[rest] = inner + np.uint64(whole * window)
    shift = word(seed, epoch, _ROUNDS) % n
    out = (out + np.uint64(shift)) % np.uint64(n)
    return out.astype(np.int64).reshape(start.shape)


def _checked(indices: ArrayLike, n: int, seed: int, epoch: int) -> NDArray[np.int64]:
    if not 1 <= n <= 1 << 62:
        raise ValueError(f"a permutation needs 1..2**62 elements, got {n}")
    if not (0 <= seed < 1 << 64 and 0 <= epoch < 1 << 64):
        raise ValueError(f"seed and epoch must be in 0..2**64 - 1, got {seed} and {epoch}")
    array = np.asarray(indices, dtype=np.int64)
    if array.size and (array.min() < 0 or array.max() >= n):
        raise ValueError(f"indices must be in [0, {n}), got values from {array.min()} to {array.max()}")
    return array


def _keys(seed: int, epoch: int) -> NDArray[np.uint64]:
    """[8, 1]: the keys of the network for all indices."""
    return np.array([[word(seed, epoch, number)] for number in range(_ROUNDS)], np.uint64)


def _block_keys(blocks: NDArray[np.uint64], seed: int, epoch: int) -> NDArray[np.uint64]:
    """[8, k]: the keys of the network inside of each of k blocks: those of a seed that the block has for itself."""
    distinct, place = np.unique(blocks, return_inverse=True)
    seeds = [word(seed, epoch, _ROUNDS + 1 + block) for block in distinct.tolist()]
    keys: NDArray[np.uint64] = np.hstack([_keys(own, epoch) for own in seeds])[:, place]
    return keys


def _walk(values: NDArray[np.uint64], n: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Where values in [0, n) go; keys are [8, 1], or [8, k] with one column per value."""
    half = (max((n - 1).bit_length(), 2) + 1) // 2
    out = values.copy()
    pending = np.arange(out.size)
    while pending.size:
        # Cycle walking: outside [0, n) the network is applied again; it lands inside after at most 4 steps on average.
        out[pending] = _network(out[pending], half, keys if keys.shape[1] == 1 else keys[:, pending])
        pending = pending[out[pending] >= np.uint64(n)]
    return out


def _network(values: NDArray[np.uint64], half: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (mix(right + key) & mask)
    return (left << bits) | right


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """
    Which sequences make up each batch of an epoch, on each rank and worker: arithmetic on the order, no state.

    Global step s takes ``batch_size * world_size`` sequences that follow each other in the epoch's order; rank r has
    the r-th slice of them, and worker w of W makes every W-th batch of its rank.  So the stream of sequences is the
    same for any number of workers and for any world size that makes the same global batch.

    Args:
        num_sequences: Size of the epoch, >= 1.
        batch_size: Sequences per batch on one rank, >= 1.
        rank, world_size: Which process of how many.
        seed: Of the order, 0..2**64 - 1.
        shuffle: Whether the order is random; else it is 0, 1, 2, ...
        window: None: the random order is ``permute``'s; else ``permute_windows``' with this window.
        tail: What becomes of the sequences at the end that fill no global batch: "drop" them, "pad" with empty places
            (index -1), or "wrap" around to the epoch's beginning.
        mixture: None: one cache.  Else several, whose sequences are numbered one cache after the other; num_sequences
            is then all of them, which is the epoch's size too, and each has its own order.

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
    window: int | None = None
    tail: str = "drop"
    mixture: Mixture | None = None

    def __post_init__(self) -> None:
        for name in ("num_sequences", "batch_size", "rank", "world_size", "seed", "window"):
            value = getattr(self, name)
            if name == "window" and value is None:
                continue
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
        if self.window is not None and not (self.shuffle and 1 <= self.window <= 1 << 62):
            raise ValueError(
                f"a window needs shuffle and 1..2**62 sequences, got {self.window}, shuffle {self.shuffle}"
            )
        if self.num_batches(0) < 1:
            raise ValueError(
                f"{self.num_sequences} sequences do not fill one batch of {self.batch_size} x {self.world_size} ranks; "
                "lower batch_size, or take tail='pad' or 'wrap'"
            )

    @property
    def algorithm(self) -> int:
        """Identifier of the order in loader states; 0: that of the cache."""
        if not self.shuffle:
            return 0
        return ALGORITHM if self.window is None else WINDOWED_ALGORITHM

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
        several = (
            1 if self.mixture is None else min(len(self.mixture.sizes), 8)
        )  # each of them has a network of its own
        at_once = max(1, several * _PLACES_AT_ONCE // self.batch_size)
        within = self.rank * self.batch_size + np.arange(self.batch_size, dtype=np.int64)
        for first in range(0, len(steps), at_once):
            some = steps[first : first + at_once]
            places = np.asarray(some, np.int64)[:, None] + within
            empty = places >= self.num_sequences
            places %= self.num_sequences
            places = self._ordered(places, epoch)
            if self.tail == "pad":
                places[empty] = -1
            yield from zip(places, some, strict=True)

    def _ordered(self, places: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        if self.mixture is None:
            return self._walked(places, self.num_sequences, self.seed, epoch)
        sources, numbers = self.mixture.find(places.ravel(), epoch, self.seed if self.shuffle else None)
        out, first = np.empty_like(numbers), 0
        for source, size in enumerate(self.mixture.sizes):
            mine = np.flatnonzero(sources == source)
            walks, inside = np.divmod(numbers[mine], size)
            for walk in np.unique(walks).tolist():
                now = walks == walk
                out[mine[now]] = first + self._walked(inside[now], size, word(self.seed, source), walk)
            first += size
        return out.reshape(places.shape)

    def _walked(self, places: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
        """What one cache has at places of its walk number ``epoch``."""
        if not self.shuffle:
            return places
        if self.window is None:
            return permute(places, size, seed=seed, epoch=epoch)
        return permute_windows(places, size, self.window, seed=seed, epoch=epoch)

    def after(self, epoch: int, consumed: int) -> tuple[int, int]:
        """(epoch, consumed) after the step that begins there; the end of an epoch is the beginning of the next."""
        consumed += self.global_batch
        return (epoch, consumed) if self.num_batches(consumed) else (epoch + 1, 0)
