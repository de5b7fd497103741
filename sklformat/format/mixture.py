"""
Which of several caches each place of a mixed stream takes its sequence from, and the how-many-eth of that cache.

Pure arithmetic without memory: any place of any epoch is found directly.  SPEC.md section 12 specifies it with test
vectors; a change of one bit here is a new version of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from sklformat.format.words import mix, word

VERSION = 1
"""Identifies the law in loader states."""
MAX_EPOCH = 1 << 32
"""Sequences of an epoch, so that products of two numbers of places fit 64 bits."""

_BLOCK = 16


@dataclass(frozen=True, slots=True)
class Mixture:
    """
    A stream of several caches, of which each gives the same number of sequences to every epoch.

    Each cache is walked in an order of its own, in the next epoch from where this one stopped; where all of its
    sequences were had, the next walk begins, in another order.  So none comes again before all others have come.

    Over any stretch from an epoch's beginning, a cache of two has given fewer than 2 sequences more or less than its
    share, one of up to four fewer than 4, of up to eight fewer than 6, and so on.

    Attributes:
        sizes: Sequences of each cache, >= 1.
        shares: What each gives to an epoch, >= 1; together MAX_EPOCH at most.
    """

    sizes: tuple[int, ...]
    shares: tuple[int, ...]

    @classmethod
    def of(cls, sizes: Sequence[int], weights: Sequence[float] | None) -> Mixture:
        """
        The mixture whose epoch is as long as all caches together, shared out by weights.

        Args:
            sizes: Sequences of each cache, >= 1.
            weights: Of each cache, > 0; only their ratios count.  None: the sizes, so that every epoch has each
                sequence once.

        Raises:
            ValueError: Not one weight for each cache, one that is not positive and finite, or so small that the cache
                would give nothing; or more sequences than an epoch can have.
        """
        if sum(sizes) > MAX_EPOCH:
            raise ValueError(f"a mixture has up to 2**32 sequences, got {sum(sizes)}; give fewer with sequences=")
        return cls(tuple(sizes), tuple(sizes) if weights is None else _shares(sum(sizes), len(sizes), weights))

    @property
    def num_sequences(self) -> int:
        """E, the places of an epoch."""
        return sum(self.shares)

    def find(self, places: NDArray[np.int64], epoch: int, seed: int | None) -> tuple[NDArray[np.int64], ...]:
        """
        What stands at places of an epoch.

        Args:
            places: [k], in [0, E).
            epoch: 0..2**62 / E.
            seed: 0..2**64 - 1; None: caches take turns without chance.

        Returns:
            For each place the cache, and the number of its sequence among all that the cache gives, from epoch 0 on.

        Raises:
            ValueError: An epoch so late that its numbers pass 2**62.

        Source: SPEC section 12.
        """
        if (epoch + 1) * self.num_sequences > 1 << 62:
            raise ValueError(f"epoch {epoch} of {self.num_sequences} sequences each lies beyond 2**62 sequences")
        sources, numbers = np.zeros(places.size, np.int64), np.zeros(places.size, np.int64)
        pending = [(0, len(self.shares), np.arange(places.size), places.astype(np.uint64))]
        while pending:
            first, end, which, inner = pending.pop()
            if end - first == 1:
                sources[which], numbers[which] = first, inner.astype(np.int64) + epoch * self.shares[first]
            elif which.size:
                middle = (first + end) // 2
                key = None if seed is None else word(seed, epoch, first, end)
                to_left, before = _split(inner, sum(self.shares[first:middle]), sum(self.shares[first:end]), key)
                pending.append((first, middle, which[to_left], before[to_left]))
                pending.append((middle, end, which[~to_left], (inner - before)[~to_left]))
        return sources, numbers


def _split(
    places: NDArray[np.uint64], left: int, total: int, key: int | None
) -> tuple[NDArray[np.bool_], NDArray[np.uint64]]:
    """
    Which of ``total`` places belong to the left part, which has ``left`` of them, and how many before each do.

    Every block of 16 has as many as its place says, evenly spread, and begins at a random point of that pattern: else
    one rank's rows might be of the same cache for ever.
    """
    block = np.uint64(_BLOCK)
    begin = places - places % block
    size = np.minimum(block, np.uint64(total) - begin)
    before = begin * np.uint64(left) // np.uint64(total)
    here = (begin + size) * np.uint64(left) // np.uint64(total) - before
    turn = np.zeros_like(places) if key is None else mix(begin // block + np.uint64(key)) % size
    since = turn * here // size

    def taken(inside: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return before + (inside + turn) * here // size - since

    inside = places - begin
    count = taken(inside)
    return taken(inside + np.uint64(1)) > count, count


def checked_weights(weights: Sequence[float], num_caches: int) -> list[float]:
    """
    Weights as floats, whatever numbers they are.

    Raises:
        ValueError: Not one for each cache, or one that is not positive and finite.
    """
    if len(weights) != num_caches:
        raise ValueError(f"give one weight for each cache, got {len(weights)} for {num_caches}")
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"weights must be positive and finite, got {weight}; leave out what is not wanted")
    return [float(weight) for weight in weights]


def _shares(num_places: int, num_caches: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Whole shares of ``num_places``: rounded down, and the rest to those that lost most by it."""
    exact = [Fraction(weight) for weight in checked_weights(weights, num_caches)]
    quotas = [num_places * weight / sum(exact) for weight in exact]
    shares = [math.floor(quota) for quota in quotas]
    by_rest = sorted(range(num_caches), key=lambda s: shares[s] - quotas[s])
    for s in by_rest[: num_places - sum(shares)]:
        shares[s] += 1
    if 0 in shares:
        s = shares.index(0)
        raise ValueError(
            f"weight {weights[s]} of {sum(weights)} gives cache {s} none of the {num_places} sequences of an epoch; "
            "raise it, or leave the cache out"
        )
    return tuple(shares)
