"""
Several teachers of the same sequences as one: their records united, weighted.

Knows no order.

Shape letters: B sequences, T positions, P = B·T positions, nnz records.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sklformat.cache.payloads import Payloads
from sklformat.cache.reader import Cache
from sklformat.cache.tokens import TokenSource
from sklformat.distill.loader.conflicts import check_together
from sklformat.distill.loader.contents import Contents, Decoded, Part
from sklformat.distill.losses.kl import IGNORED_LABEL
from sklformat.errors import AlignmentError
from sklformat.format.mixture import checked_weights
from sklformat.native import BatchArrays

_ID_BITS = 24  # of every profile, at most


class Teachers:
    """
    Caches of the same sequences, each from a teacher of its own: ``SparseLogitDataset(Teachers([a, b], [0.7, 0.3]))``.

    The targets of a position are the mixture m = Σ w_t p_t of what the teachers say there: ids united, probabilities
    weighted and added.  For forward KL, with the student q, this is exact: Σ w_t KL(p_t || q) = Σ w_t Σ p_t log p_t -
    Σ m log q, and KL(m || q) = Σ m log m - Σ m log q; the two differ by Σ w_t KL(p_t || m), in which there is no q.  So
    the gradient is the weighted mean of the teachers' gradients, and as it is linear in the records, it stays unbiased
    where they are sampled.  That holds for every method of ``sparse_kl`` that is linear in the targets; for
    "topk_normalised" and "ghost_token" the loss is that of m.

    Where some teachers have no record, the weights of the others count alone.

    Args:
        caches: Directories, shards or URLs, or caches that ``skl.open`` opened; of equal alignment checksums.
        weights: Of each teacher, > 0; only their ratios count.  None: equal.

    Raises:
        ValueError: No cache, caches of unlike length, or weights that do not fit.
        SettingsError: Tokenizers, isolation of documents or kinds of samplers differ; says both values.
        AlignmentError: The first sequences are of other tokens; for the others the dataset raises it, before it hands
            out anything of them.
        FormatError, FileNotFoundError: As ``skl.open``.
    """

    def __init__(self, caches: Sequence[Path | str | Cache], weights: Sequence[float] | None = None) -> None:
        if isinstance(caches, str | Path | Cache) or not caches:
            raise ValueError(f"Teachers takes a list of caches, at least one, got {caches!r}")
        given = checked_weights([1.0] * len(caches) if weights is None else weights, len(caches))
        exact = [Fraction(weight) for weight in given]
        self.caches = [cache if isinstance(cache, Cache) else Cache(cache) for cache in caches]
        self.weights = [float(weight / sum(exact)) for weight in exact]
        first = self.caches[0]
        for cache in self.caches[1:]:
            if len(cache) != len(first):
                raise ValueError(
                    f"{first.path} has {len(first)} sequences, {cache.path} has {len(cache)}; teachers of one stream "
                    "saw the same sequences"
                )
        check_together(self.caches)
        for cache in self.caches[1:]:
            if cache.alignment_of(0) != first.alignment_of(0):
                raise _misaligned(first, cache, 0, first.alignment_of(0), cache.alignment_of(0))


class Taught:
    """
    A part of the sequences of several teachers, as ``Part`` and ``Contents`` are of one.

    Args:
        teachers: Whose.
        tokens: As for ``Part``; None: those of the first cache that stores any.
        sequences: As for ``Part``.
    """

    def __init__(self, teachers: Teachers, tokens: TokenSource | None, sequences: range | None) -> None:
        self._teachers = teachers
        stored = (cache for cache in teachers.caches if cache.header.store_tokens)
        self.cache = teachers.caches[0] if tokens is not None else next(stored, teachers.caches[0])
        self._part = Part(self.cache, tokens, sequences)
        self._contents = Contents([self._part])
        self.sequences = self._part.sequences

    @property
    def identity(self) -> list[list[Any]]:
        """What loader states say of it."""
        pairs = zip(self._teachers.caches, self._teachers.weights, strict=True)
        return [[cache.fingerprint, weight] for cache, weight in pairs]

    def decoded(self, places: NDArray[np.int64]) -> Decoded:
        """As ``Contents.decoded``; raises AlignmentError too where the teachers' checksums differ."""
        found, numbers = self._contents.decoded(places), self._part.numbers(places)
        # Only whoever has the tokens says how long a batch is; the others have the same tokens.
        seq_len = self.cache.header.seq_len
        said = []
        for cache in self._teachers.caches:
            if cache is self.cache:
                said.append(found.arrays)
                continue
            payloads = cache.payloads(numbers)
            self._check_aligned(cache, numbers, found.payloads, payloads)
            header = dataclasses.replace(cache.header, seq_len=seq_len)
            said.append(payloads.decode(header, found.arrays.tokens, IGNORED_LABEL))
        labels, offsets, token_ids, probs = unite(said, self._teachers.weights)
        arrays = found.arrays._replace(labels=labels, offsets=offsets, token_ids=token_ids, probs=probs)
        return Decoded(found.payloads, arrays)

    def _check_aligned(self, cache: Cache, numbers: NDArray[np.int64], ours: Payloads, theirs: Payloads) -> None:
        wrong = ours.alignment != theirs.alignment
        if wrong.any():
            row = int(wrong.argmax())
            raise _misaligned(
                self.cache, cache, int(numbers[row]), int(ours.alignment[row]), int(theirs.alignment[row])
            )


def unite(
    teachers: Sequence[BatchArrays], weights: Sequence[float]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint32], NDArray[np.float32]]:
    """
    The weighted mixture of what teachers say of the same positions.

    Args:
        teachers: Labels [B, T] and records, of the same B·T positions.
        weights: One for each, > 0.

    Returns:
        labels [B, T], -100 where no teacher has a record; offsets [P + 1]; token_ids [nnz], rising in each position;
        probs [nnz].
    """
    counts = [np.diff(arrays.offsets) for arrays in teachers]
    present = [np.where(count > 0, weight, 0.0) for count, weight in zip(counts, weights, strict=True)]
    total = np.maximum(sum(present), np.finfo(np.float64).tiny)
    first = np.arange(counts[0].size + 1) << _ID_BITS
    ends = np.cumsum([arrays.token_ids.size for arrays in teachers]).tolist()
    keys, parts = np.empty(ends[-1], np.int64), np.empty(ends[-1], np.float32)
    for arrays, count, mine, end in zip(teachers, counts, present, ends, strict=True):
        some = slice(end - arrays.token_ids.size, end)
        np.add(np.repeat(first[:-1], count), arrays.token_ids, out=keys[some])
        np.multiply(np.repeat((mine / total).astype(np.float32), count), arrays.probs, out=parts[some])
    order = np.argsort(keys, kind="stable")  # which merges what is sorted already, as records of kind counts are
    keys, parts = keys[order], parts[order]
    begins = np.flatnonzero(np.concatenate([np.ones(min(keys.size, 1), np.bool_), keys[1:] != keys[:-1]]))
    said_by, probs = np.diff(begins, append=keys.size), parts[begins]
    for more in range(1, len(teachers)):
        shared = np.flatnonzero(said_by > more)
        probs[shared] += parts[begins[shared] + more]
    keys = keys[begins]
    token_ids = (keys & ((1 << _ID_BITS) - 1)).astype(np.uint32)
    labels = np.maximum.reduce([arrays.labels for arrays in teachers])  # of -100 and a token the token
    return labels, np.searchsorted(keys, first), token_ids, probs


def _misaligned(one: Cache, other: Cache, number: int, ours: int, theirs: int) -> AlignmentError:
    return AlignmentError(
        f"{one.path} and {other.path}: sequence {number}: alignment checksum {ours:#018x} in the first, "
        f"{theirs:#018x} in the second; their teachers saw different tokens: make both from the same text, with the "
        "same tokenizer, packing seed and seq_len",
        sequence_index=number,
    )
