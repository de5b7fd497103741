"""
The sequences of a cache by number: decoded, checked and proven to belong to the tokens trained on.

Knows no order and no rank.  SPEC.md section 13.

Shape letters: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sklformat.cache.payloads import Payloads
from sklformat.cache.reader import Cache
from sklformat.cache.tokens import Tokens, TokenSource
from sklformat.checksums import checksum
from sklformat.distill.loader.batches import Batch, Targets
from sklformat.distill.losses.kl import IGNORED_LABEL
from sklformat.errors import AlignmentError
from sklformat.format.columns import STARTS


class Contents:
    """
    A part of a cache, with the tokens that are handed out.

    Each block's checksum is verified when it is first touched, each sequence's alignment checksum every time.

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
    def isolated(self) -> bool:
        """Whether documents did not see each other when the teacher ran."""
        packing = self.cache.header.capture.get("packing")
        return isinstance(packing, Mapping) and packing.get("isolated") is True

    def batch(self, places: NDArray[np.int64], state: dict[str, Any]) -> Batch:
        """
        The sequences at these places of the part, -1 for an empty row, as one batch.

        Raises:
            FormatError: A block is damaged.
            AlignmentError: The records are not about these tokens.
        """
        return self._decoded(self.cache.payloads(self._numbers(places)), places, state)

    def singles(self, places: NDArray[np.int64]) -> list[Batch]:
        """The same one by one, each with a T of its own and an empty state; they share the memory of one batch."""
        payloads = self.cache.payloads(self._numbers(places))
        batch = self._decoded(payloads, places, {})
        return [batch.row(row, max(length, 1)) for row, length in enumerate(payloads.num_positions.tolist())]

    def _numbers(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        first = self.sequences.start
        return np.where(places < 0, places, places + first) if first else places

    def _decoded(self, payloads: Payloads, places: NDArray[np.int64], state: dict[str, Any]) -> Batch:
        given = None if self.tokens is None else self._given(self._numbers(places), payloads)
        header = self.cache.header
        arrays = payloads.decode(header, given, IGNORED_LABEL, starts=STARTS in header.columns)
        return Batch(
            input_ids=torch.from_numpy(arrays.input_ids),
            labels=torch.from_numpy(arrays.labels),
            targets=Targets(
                token_ids=torch.from_numpy(arrays.token_ids.view(np.int32)),
                probs=torch.from_numpy(arrays.probs),
                offsets=torch.from_numpy(arrays.offsets),
            ),
            state=state,
            position_ids=None if arrays.position_ids is None else torch.from_numpy(arrays.position_ids),
            document_starts=None if arrays.document_starts is None else torch.from_numpy(arrays.document_starts),
        )

    def _given(self, numbers: NDArray[np.int64], payloads: Payloads) -> NDArray[np.uint32]:
        """The training program's own tokens of a batch, proven to be those of the records."""
        assert self.tokens is not None
        first = self.cache.first_sequence
        lengths, alignments = payloads.num_positions.tolist(), payloads.alignment.tolist()
        out = np.zeros((numbers.size, payloads.row_positions(self.cache.header) + 1), "<u4")
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
        return out

    def _neighbour(self, number: int) -> NDArray[np.integer[Any]]:
        """Other tokens of the source, to look for the cause of a misalignment."""
        assert self.tokens is not None
        return self.tokens[number]


def _checked_range(sequences: range | None, available: int) -> range:
    if sequences is None:
        return range(available)
    if not isinstance(sequences, range):
        raise TypeError(f"sequences must be a range, got {sequences!r}")
    if sequences.step != 1 or not 0 <= sequences.start < sequences.stop <= available:
        raise ValueError(f"sequences must be a range of step 1 inside of 0..{available}, not empty, got {sequences}")
    return sequences
