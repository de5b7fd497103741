"""
The sequences of caches by number: decoded, checked and proven to belong to the tokens trained on.

Knows no order and no rank.  SPEC.md section 13.

Shape letters: B sequences, T positions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sklformat.cache.payloads import Payloads
from sklformat.cache.reader import Cache
from sklformat.cache.tokens import Tokens, TokenSource
from sklformat.checksums import checksum
from sklformat.distill.loader.batches import Batch, Targets
from sklformat.distill.loader.packed import PackedTargets
from sklformat.distill.losses.kl import IGNORED_LABEL
from sklformat.errors import AlignmentError
from sklformat.format import captures
from sklformat.format.block import block_shape
from sklformat.format.columns import STARTS
from sklformat.native import BatchArrays, Shape


class Part:
    """
    A part of a cache, with the tokens that are handed out.

    Args:
        path: A cache, or where one is.
        tokens: The training program's own tokens, by the global sequence number; None: those in the cache.
        sequences: The part; None: all of the cache.

    Raises:
        ValueError: The cache stores no tokens and none are given, or the part is none of this cache.
        TypeError: The part is no range, or the tokens no source of tokens.
        AlignmentError: Too few tokens.
        FormatError, FileNotFoundError: As ``skl.open``.
    """

    def __init__(self, path: Path | str | Cache, tokens: TokenSource | None, sequences: range | None) -> None:
        self.cache = path if isinstance(path, Cache) else Cache(path)
        self.sequences = _checked_range(sequences, len(self.cache))
        self.tokens = None if tokens is None else Tokens(tokens)
        self._check_tokens()

    def _check_tokens(self) -> None:
        cache = self.cache
        if self.tokens is None:
            if not cache.header.store_tokens:
                raise ValueError(
                    f"{cache.path}: the cache stores no tokens; pass tokens= with the sequences it was made from"
                )
            return
        needed = cache.first_sequence + self.sequences.stop
        available = self.tokens.num_sequences
        if available is not None and available < needed:
            raise AlignmentError(
                f"{cache.path}: {available} sequences of tokens given, the cache reaches to sequence {needed - 1}; "
                "pack the tokens with the cache's tokenizer, corpus, seed and seq_len",
                sequence_index=available,
            )

    @property
    def identity(self) -> str:
        """What loader states say of it."""
        return self.cache.fingerprint

    @property
    def layout(self) -> tuple[object, ...]:
        """What parts must have in common to be decoded by one call."""
        header = self.cache.header
        return block_shape(header, 0, 0), header.scale_log2, self.tokens is None

    def numbers(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places of the part as numbers of the cache; -1 stays."""
        first = self.sequences.start
        return np.where(places < 0, places, places + first) if first else places

    def stretches(self, start: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shards that the part reaches into, and the place where it does, if its first sequence is at ``start``."""
        starts = self.cache.starts
        first, last = starts.searchsorted([self.sequences.start, self.sequences.stop - 1], "right") - 1
        shards = np.arange(first, last + 1)
        return start + np.maximum(starts[shards] - self.sequences.start, 0), shards

    def give(self, out: NDArray[np.uint32], numbers: NDArray[np.int64], payloads: Payloads) -> None:
        """Put the training program's own tokens into the rows [B, T + 1] of ``out``, proven to be the records'."""
        assert self.tokens is not None
        first = self.cache.first_sequence
        lengths, alignments = payloads.num_positions.tolist(), payloads.alignment.tolist()
        data, row_bytes = out.data.cast("B"), out.strides[0]
        for row, number in enumerate(numbers.tolist()):
            if number < 0:
                continue
            tokens, length = self.tokens[first + number], lengths[row] + 1
            if tokens.size == length:
                # Values that do not fit are cut here, but what is handed out is what was proven.
                out[row, :length] = tokens
                if checksum(data[row * row_bytes : row * row_bytes + 4 * length]) == alignments[row]:
                    continue
            self.cache.check_alignment(number, tokens, lambda i: self._neighbour(first + i))

    def _neighbour(self, number: int) -> NDArray[np.integer[Any]]:
        """Other tokens of the source, to look for the cause of a misalignment."""
        assert self.tokens is not None
        return self.tokens[number]


class Decoded(NamedTuple):
    """The arrays of B rows, the payloads they came from, and what their records are where these are packed."""

    payloads: Payloads
    arrays: BatchArrays
    packed: Shape | None = None

    def batch(self, state: dict[str, Any]) -> Batch:
        """The rows as one batch; it shares their memory."""
        arrays = self.arrays
        return Batch(
            input_ids=torch.from_numpy(arrays.input_ids),
            labels=torch.from_numpy(arrays.labels),
            targets=self._targets(),
            state=state,
            position_ids=None if arrays.position_ids is None else torch.from_numpy(arrays.position_ids),
            document_starts=None if arrays.document_starts is None else torch.from_numpy(arrays.document_starts),
        )

    def _targets(self) -> Targets:
        arrays = self.arrays
        offsets = torch.from_numpy(arrays.offsets)
        if self.packed is not None and arrays.records is not None:
            return PackedTargets(torch.from_numpy(arrays.records), offsets, self.packed, self.payloads.origins())
        token_ids = torch.from_numpy(arrays.token_ids.view(np.int32))
        return Targets(token_ids, torch.from_numpy(arrays.probs), offsets)

    def singles(self) -> list[Batch]:
        """The rows one by one, each with a T of its own and an empty state; they share the memory of one batch."""
        batch = self.batch({})
        return [batch.row(row, max(length, 1)) for row, length in enumerate(self.payloads.num_positions.tolist())]


class Contents:
    """
    Parts that one call decodes, one or several of the same layout, as one list of sequences in their order.

    Each block's checksum is verified when it is first touched, each sequence's alignment checksum every time.  Batches
    of several parts have the T of the one with the longest sequences.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        lengths = [part.cache.header.seq_len for part in parts]
        self._header = dataclasses.replace(parts[0].cache.header, seq_len=max(lengths) if all(lengths) else 0)
        ends = np.cumsum([len(part.sequences) for part in parts]).tolist()
        self._starts = [0, *ends[:-1]]

    def __reduce__(self) -> tuple[type[Contents], tuple[tuple[Part, ...]]]:
        return Contents, (self.parts,)  # worker processes find the shards themselves

    @functools.cached_property
    def _stretches(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Of each shard of each part: its first place, its number in the cache, and the part."""
        found = [part.stretches(start) for part, start in zip(self.parts, self._starts, strict=True)]
        firsts, shards = (np.concatenate(some) for some in zip(*found, strict=True))
        return firsts, shards, np.repeat(np.arange(len(self.parts)), [some.size for some, _ in found])

    def decoded(self, places: NDArray[np.int64], *, packed: bool = False) -> Decoded:
        """
        The sequences at these places, [B], over all parts; -1 for an empty row.

        Args:
            places: Which.
            packed: Leave the records as they are stored, unchecked, for the device.

        Raises:
            FormatError: A block is damaged.
            AlignmentError: The records are not about these tokens.
        """
        header, first = self._header, self.parts[0]
        found = first.cache.payloads(first.numbers(places)) if len(self.parts) == 1 else self._payloads(places)
        tokens = None
        if first.tokens is not None:
            tokens = np.zeros((places.size, found.row_positions(header) + 1), "<u4")
            for part, start in zip(self.parts, self._starts, strict=True):
                own = (places >= start) & (places < start + len(part.sequences))
                part.give(tokens, part.numbers(np.where(own, places - start, -1)), found)
        arrays = found.decode(header, tokens, IGNORED_LABEL, starts=STARTS in header.columns, packed=packed)
        return Decoded(found, arrays, block_shape(header, 0, 0) if packed else None)

    def _payloads(self, places: NDArray[np.int64]) -> Payloads:
        """The payloads of several parts, found shard by shard, as ``Cache.payloads`` finds those of one."""
        found, (firsts, shards, owners) = Payloads(places.size), self._stretches
        which = firsts.searchsorted(places, "right") - 1  # of empty rows: -1
        distinct = [stretch for stretch in dict.fromkeys(which.tolist()) if stretch >= 0]
        for stretch in distinct:
            rows, owner = np.flatnonzero(which == stretch), int(owners[stretch])
            part = self.parts[owner]
            numbers = places[rows] + (part.sequences.start - self._starts[owner])
            part.cache.fill(found, rows, int(shards[stretch]), numbers, len(distinct))
        return found


def is_isolated(cache: Cache) -> bool:
    """Whether documents did not see each other when the teacher ran."""
    return captures.is_isolated(cache.header.capture)


def _checked_range(sequences: range | None, available: int) -> range:
    if sequences is None:
        return range(available)
    if not isinstance(sequences, range):
        raise TypeError(f"sequences must be a range, got {sequences!r}")
    if sequences.step != 1 or not 0 <= sequences.start < sequences.stop <= available:
        raise ValueError(f"sequences must be a range of step 1 inside of 0..{available}, not empty, got {sequences}")
    return sequences
