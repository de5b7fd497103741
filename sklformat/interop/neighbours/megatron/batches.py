"""Micro-batches of one rank, and sequences put together from several context-parallel ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ID_BITS = 17
FILLER_LOGPROB = -1e3
FILLER_ID = (1 << _ID_BITS) - 1
"""Of an entry that is none; other entries may have this id too."""
NO_RECORD = -500.0
"""Log-probs below it are of fillers; versions differ in how far."""


def check_vocab(path: Path, vocab_size: int) -> None:
    """
    Ids have 17 bits.

    Raises:
        ValueError: The vocabulary is larger.
    """
    if vocab_size > 1 << _ID_BITS:
        raise ValueError(
            f"{path}: ids of Megatron's files have 17 bits, so that a vocabulary has at most {1 << _ID_BITS:,}; this "
            f"one has {vocab_size:,}"
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """
    A micro-batch of one rank.

    Attributes:
        values: [S, B, K] log-probs of any float type.
        low, high: [S, B, K] the lower 16 bits of ids, and bit 16.
        documents: [B, n] where each sequence's documents begin, and its length, perhaps repeated; or None.
    """

    values: NDArray[Any]
    low: NDArray[Any]
    high: NDArray[Any]
    documents: NDArray[Any] | None

    @classmethod
    def checked(
        cls, values: NDArray[Any], low: NDArray[Any], high: NDArray[Any], documents: NDArray[Any] | None = None
    ) -> Batch:
        """Of what a member holds; bit 16 of ids is a boolean each, or packed in bytes."""
        if values.ndim != 3 or values.shape != low.shape or values.dtype.kind != "f" or low.dtype.kind not in "iu":
            raise ValueError(f"values of shape {values.shape}, indices_low of shape {low.shape}")
        if high.dtype == np.uint8 and high.shape == (math.ceil(values.size / 8),):
            high = np.unpackbits(high, count=values.size).reshape(values.shape)
        if high.shape != values.shape:
            raise ValueError(f"values of shape {values.shape}, bit_17 of shape {high.shape}")
        if documents is not None and (documents.ndim != 2 or len(documents) != values.shape[1]):
            raise ValueError(f"values of shape {values.shape}, cu_seqlens_padded of shape {documents.shape}")
        return cls(values, low, high, documents)

    def part(self, begin: int, end: int) -> Batch:
        """Some of its sequences."""
        documents = None if self.documents is None else self.documents[begin:end]
        return Batch(self.values[:, begin:end], self.low[:, begin:end], self.high[:, begin:end], documents)

    def sequence(self, number: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Log-probs and ids [S, K]."""
        ids = self.low[:, number].astype(np.int64) | (self.high[:, number].astype(np.int64) << 16)
        return self.values[:, number], ids


def joined(parts: Sequence[NDArray[Any]], filler: float) -> NDArray[Any]:
    """
    [S, K] of the parts [S / n, K'] of n context-parallel ranks: rank r has chunks r and 2n - 1 - r of 2n.

    Raises:
        ValueError: They have not the same number of rows, or an odd one.
    """
    if len(parts) == 1:
        return parts[0]
    size, half = 2 * len(parts), len(parts[0]) // 2
    if any(len(part) != 2 * half for part in parts):
        raise ValueError(f"context-parallel ranks have {', '.join(str(len(part)) for part in parts)} rows")
    whole = np.full((size, half, max(part.shape[1] for part in parts)), filler, parts[0].dtype)
    for rank, part in enumerate(parts):
        whole[rank, :, : part.shape[1]], whole[size - 1 - rank, :, : part.shape[1]] = part[:half], part[half:]
    return whole.reshape(size * half, -1)
