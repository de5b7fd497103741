"""
Records in memory: the sparse teacher distributions of one sequence.

Knows nothing of files or of C. SPEC.md section 2 defines the terms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, slots=True, init=False)
class SparseTargets:
    """
    Sparse teacher distributions of one sequence of T positions, ragged.

    The pairs of position t are ``[offsets[t], offsets[t + 1])``; they describe the token at t + 1 given tokens 0..t.
    A position without pairs carries no target.

    Args:
        token_ids: [nnz] ids in [0, vocab_size); kept as uint32.
        counts: [nnz] how many rounds drew each id, 1..127; kept as uint8. Exactly one of counts and weights is given.
        weights: [nnz] positive weights (probabilities for Top-K); kept as float32.
        offsets: [T + 1] prefix sums of the number of pairs, from 0 to nnz; kept as int64.

    Raises:
        ValueError: Lengths disagree, offsets do not rise from 0 to nnz, values do not fit their type,
            or both or none of counts and weights are given.
    """

    token_ids: NDArray[np.uint32]
    counts: NDArray[np.uint8] | None
    weights: NDArray[np.float32] | None
    offsets: NDArray[np.int64]

    def __init__(
        self,
        *,
        token_ids: ArrayLike,
        counts: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        offsets: ArrayLike,
    ) -> None:
        if (counts is None) == (weights is None):
            raise ValueError("give exactly one of counts and weights")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf, which every writer refuses
            floats = None if weights is None else np.ascontiguousarray(weights, dtype=np.float32)
        values = {
            "token_ids": _cast(token_ids, np.uint32, "token_ids"),
            "counts": None if counts is None else _cast(counts, np.uint8, "counts"),
            "weights": floats,
            "offsets": _cast(offsets, np.int64, "offsets"),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        offsets_array = self.offsets
        pairs = self.counts if self.counts is not None else self.weights
        assert pairs is not None
        if self.token_ids.ndim != 1 or pairs.shape != self.token_ids.shape:
            raise ValueError(f"token_ids {self.token_ids.shape} and counts or weights {pairs.shape} must be equal, 1-D")
        if offsets_array.ndim != 1 or offsets_array.size < 1:
            raise ValueError(f"offsets must be 1-D with T + 1 values, got shape {offsets_array.shape}")
        if offsets_array[0] != 0 or offsets_array[-1] != self.token_ids.size or (np.diff(offsets_array) < 0).any():
            raise ValueError(f"offsets must rise from 0 to the number of pairs, {self.token_ids.size}")

    @classmethod
    def trusted(
        cls,
        token_ids: NDArray[np.uint32],
        counts: NDArray[np.uint8] | None,
        weights: NDArray[np.float32] | None,
        offsets: NDArray[np.int64],
    ) -> SparseTargets:
        """Wrap arrays that a decoder has just checked, without checking them again."""
        targets = object.__new__(cls)
        for name, value in zip(cls.__slots__, (token_ids, counts, weights, offsets), strict=True):
            object.__setattr__(targets, name, value)
        return targets

    @property
    def num_positions(self) -> int:
        """T, the number of positions."""
        return int(self.offsets.size) - 1

    @property
    def num_records(self) -> int:
        """Number of (token id, count) pairs over all positions."""
        return int(self.token_ids.size)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparseTargets):
            return NotImplemented
        return (
            np.array_equal(self.offsets, other.offsets)
            and np.array_equal(self.token_ids, other.token_ids)
            and _equal(self.counts, other.counts)
            and _equal(self.weights, other.weights)
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True, eq=False)
class Sequence:
    """
    One sequence of a cache: its tokens and what the teacher said of them.

    Attributes:
        tokens: [T + 1] uint32, or None where the cache stores none.
        targets: Records of the T positions.
        columns: Optional columns by name: document_start [T + 1] bool, record_logprob [nnz] float16 beside
            targets.token_ids, the others [T] float16.
        alignment: Alignment checksum of the tokens.  SPEC section 6.3.
    """

    tokens: NDArray[np.uint32] | None
    targets: SparseTargets
    columns: Mapping[str, NDArray[Any]]
    alignment: int

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return (
            self.alignment == other.alignment
            and _equal(self.tokens, other.tokens)
            and self.targets == other.targets
            and self.columns.keys() == other.columns.keys()
            and all(_equal(column, other.columns[name]) for name, column in self.columns.items())
        )

    __hash__ = None  # type: ignore[assignment]


def _equal(left: NDArray[np.generic] | None, right: NDArray[np.generic] | None) -> bool:
    if left is None or right is None:
        return left is right
    return np.array_equal(left, right)


def _cast(values: ArrayLike, dtype: type[np.integer], name: str) -> NDArray[np.integer]:
    """Convert integers without ever wrapping: a value that does not fit is an error, not another value."""
    array = np.asarray(values)
    if array.size and array.dtype != dtype:
        if array.dtype.kind not in "iu":
            raise ValueError(f"{name} must be integers, got {array.dtype}")
        limits = np.iinfo(dtype)
        low, high = int(array.min()), int(array.max())
        if low < limits.min or high > limits.max:
            raise ValueError(f"{name} must be in [{limits.min}, {limits.max}], got values from {low} to {high}")
    return np.ascontiguousarray(array, dtype=dtype)
