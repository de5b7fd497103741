"""
Rows as an engine shows them, put together to whole sequences: each row exactly once, whatever happened on the way.

An engine divides prompts into chunks, begins a request again that it had pre-empted, and may end one without all of its
rows.  A chunk from row 0 on begins its sequence; any other must begin where the last one ended, else the sequence is
not whole before it begins again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sklformat.errors import EngineError
from sklformat.format.columns import RECORD_LOGPROB
from sklformat.format.records import SparseTargets

_LOST = -1


class Part(NamedTuple):
    """
    The records of some rows of a sequence that follow each other, P of them with n records.

    Attributes:
        first: The first of the rows.
        lengths: [P] int64, records of each.
        token_ids: [n] uint32.
        pairs: [n] counts (uint8) or weights (float32).
        columns: float16 by name: record_logprob [n], the others [P].
    """

    first: int
    lengths: NDArray[np.int64]
    token_ids: NDArray[np.uint32]
    pairs: NDArray[Any]
    columns: Mapping[str, NDArray[np.float16]]


class Assembly:
    """The sequences that are on their way; parts of any other are passed over."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}
        self._parts: dict[int, list[Part]] = {}
        self._next: dict[int, int] = {}

    def expect(self, sequence: int, positions: int) -> None:
        """Take parts of a sequence of this many rows from now on."""
        self._sizes[sequence], self._parts[sequence], self._next[sequence] = positions, [], 0

    def add(self, sequence: int, part: Part) -> None:
        """
        Take a part.

        Raises:
            EngineError: The sequence has fewer rows.
        """
        if sequence not in self._sizes:
            return
        end = part.first + part.lengths.size
        if end > self._sizes[sequence]:
            raise EngineError(
                f"a worker sent rows {part.first}..{end - 1} of sequence {sequence}, which has "
                f"{self._sizes[sequence]}; this version of the engine is not understood, use another"
            )
        if part.first == 0:
            self._parts[sequence], self._next[sequence] = [], 0
        if part.first != self._next[sequence]:
            self._parts[sequence], self._next[sequence] = [], _LOST
            return
        self._parts[sequence].append(part)
        self._next[sequence] = end

    def is_whole(self, sequence: int) -> bool:
        """Whether all rows of a sequence are there, each once."""
        return self._next[sequence] == self._sizes[sequence]

    def describe(self, sequence: int) -> str:
        """How much of a sequence is there, in words."""
        reached, size = max(0, self._next[sequence]), self._sizes[sequence]
        return f"rows {reached}..{size - 1} of the {size} of sequence {sequence}"

    def take(self, sequence: int) -> tuple[SparseTargets, dict[str, NDArray[np.float16]]]:
        """The records of a whole sequence, and its columns; it is no longer expected."""
        assert self.is_whole(sequence)
        del self._sizes[sequence], self._next[sequence]
        parts = self._parts.pop(sequence)
        lengths = np.concatenate([part.lengths for part in parts])
        pairs = np.concatenate([part.pairs for part in parts])
        targets = SparseTargets(
            token_ids=np.concatenate([part.token_ids for part in parts]),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            **{"counts" if pairs.dtype == np.uint8 else "weights": pairs},
        )
        names = parts[0].columns
        columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in names}
        assert columns.get(RECORD_LOGPROB, targets.token_ids).size == targets.num_records
        return targets, columns
