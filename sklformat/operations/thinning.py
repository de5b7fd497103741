"""
Which draws of a position are kept when its counts are thinned: as many as are asked for, each with the same chance.

A pure function of (seed, sequence, position) and the counts.  docs/operations.md has the law with test vectors.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sklformat.format.records import SparseTargets
from sklformat.format.words import mix, word

_STEP = np.uint64(0x9E3779B97F4A7C15)


def thin(targets: SparseTargets, rounds: int, *, seed: int, sequence: int) -> SparseTargets:
    """
    Keep some of the draws that counts are made of, without replacement.

    Args:
        targets: Counts of T positions, each without records or with the same sum.
        rounds: Draws to keep of each position that has any, 1 to that sum.
        seed: 0..2**64 - 1.
        sequence: Number of the sequence, 0..2**64 - 1.

    Returns:
        Counts of the same positions that sum to ``rounds``; ids that keep no draw are left out.

    Source: docs/operations.md, Thinning.
    """
    counts, offsets = targets.counts, targets.offsets
    assert counts is not None
    drawn = np.flatnonzero(np.diff(offsets))
    if not drawn.size:
        return targets
    ends = np.cumsum(counts, dtype=np.int64)  # of the draws that each record stands for
    keys = _keys(drawn, int(ends[-1]) // drawn.size, word(seed, sequence))
    largest = np.partition(keys, rounds - 1, axis=1)[:, rounds - 1 : rounds]
    thinned = np.add.reduceat((keys <= largest).ravel(), ends - counts, dtype=np.uint8)
    is_left = thinned > 0
    before = np.concatenate([[0], np.cumsum(is_left)])
    return SparseTargets.trusted(targets.token_ids[is_left], thinned[is_left], None, before[offsets])


def _keys(positions: NDArray[np.int64], rounds: int, start: int) -> NDArray[np.uint64]:
    """[positions, rounds]: a key for each draw, those of a position all different, since ``mix`` is one to one."""
    states = mix(np.uint64(start) + (positions.astype(np.uint64) + np.uint64(1)) * _STEP)
    return mix(states[:, None] + np.arange(1, rounds + 1, dtype=np.uint64) * _STEP)
