"""
Sequences of equal length packed from tokenised documents.

Knows no model and no torch.
Source: Anshumann et al. 2025 (arXiv 2503.16870), Appendix D: documents shuffled by a seed that teacher and student
share, joined by a separator, attention not masked across documents.
"""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sklformat.distill.text.corpus import StoreFacts, TokenStore
from sklformat.format.order import permute


class PackedSequences:
    """
    Windows of ``seq_len + 1`` tokens over all documents, shuffled by seed and joined by a separator.

    The stream is document after document in the order ``permute(arange(n), n, seed=seed)``, each followed by the
    separator. Window i holds tokens ``[i·seq_len, i·seq_len + seq_len]`` of it, both ends included, so neighbours
    share one token and every token but the first is predicted exactly once. What fills no window is dropped.
    A window is a function of (documents, seed, seq_len, separator) alone. Memory: 16 bytes per document.

    Pickled, it is its arguments; the store is opened again, on first use, in the process that unpickled it.

    Args:
        store_path: A token store.
        seq_len: Positions in a sequence, >= 1.
        separator_id: Token id put after each document, >= 0.
        seed: Seed of the documents' order.
        first: Number of the first window of the stream to show; ``self[0]`` is this one.
        count: How many windows to show; None: all from ``first`` on.

    Raises:
        ValueError: An argument out of range, or a text too short for the windows asked; the message has both numbers.
        FileNotFoundError, CorruptError, UnsupportedError: As ``TokenStore``.
    """

    def __init__(
        self,
        store_path: Path | str,
        *,
        seq_len: int,
        separator_id: int,
        seed: int,
        first: int = 0,
        count: int | None = None,
    ) -> None:
        if seq_len < 1:
            raise ValueError(f"seq_len must be >= 1, got {seq_len}")
        if not 0 <= separator_id < 1 << 32 or not 0 <= seed < 1 << 64:
            raise ValueError(f"separator_id must be in [0, 2^32) and seed in [0, 2^64), got {separator_id} and {seed}")
        if first < 0 or (count is not None and count < 1):
            raise ValueError(f"first must be >= 0 and count >= 1, got {first} and {count}")
        self.store_path = Path(store_path)
        self.seq_len = seq_len
        self.separator_id = separator_id
        self.seed = seed
        self.first = first
        self._store: TokenStore | None = None
        store = self._opened()
        num_tokens = store.facts.num_tokens + len(store)
        num_windows = (num_tokens - 1) // seq_len
        wanted = first + (1 if count is None else count)
        if num_windows < wanted:
            need = wanted * seq_len + 1
            raise ValueError(
                f"the text is too short: {wanted} sequences of {seq_len} positions take {need} tokens, "
                f"it has {num_tokens} (separators included); give more text or a smaller seq_len"
            )
        self._count = num_windows - first if count is None else count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> NDArray[np.uint32]:
        """Tokens of one sequence, [seq_len + 1] uint32, a copy."""
        index = operator.index(index)
        if not -self._count <= index < self._count:
            raise IndexError(f"sequence {index} of {self._count}")
        store = self._opened()
        start = (self.first + index % self._count) * self.seq_len
        end = start + self.seq_len + 1
        window = np.empty(self.seq_len + 1, dtype=np.uint32)
        place = int(np.searchsorted(self._stream_ends, start, side="right"))
        at = start
        while at < end:
            document = int(self._order[place])
            document_end = int(self._stream_ends[place])  # one past the separator
            document_start = document_end - 1 - int(store.lengths[document])
            stop = min(end, document_end - 1)
            if at < stop:
                window[at - start : stop - start] = store[document][at - document_start : stop - document_start]
            if document_end <= end:
                window[document_end - 1 - start] = self.separator_id
            at = document_end
            place += 1
        return window

    def document_starts(self, index: int) -> NDArray[np.bool_]:
        """Where documents begin among the tokens of one sequence, [seq_len + 1]; a separator begins none."""
        index = operator.index(index)
        if not -self._count <= index < self._count:
            raise IndexError(f"sequence {index} of {self._count}")
        self._opened()
        begin = (self.first + index % self._count) * self.seq_len
        ends = self._stream_ends[np.searchsorted(self._stream_ends, begin) :]
        ends = ends[: np.searchsorted(ends, begin + self.seq_len, side="right")]
        starts = np.zeros(self.seq_len + 1, np.bool_)
        starts[ends - begin] = True
        starts[0] |= begin == 0
        return starts

    def __getstate__(self) -> dict[str, Any]:
        dropped = ("_store", "_order", "_stream_ends")
        return {name: value for name, value in self.__dict__.items() if name not in dropped} | {"_store": None}

    @property
    def facts(self) -> StoreFacts:
        """What the token store says of itself."""
        return self._opened().facts

    def _opened(self) -> TokenStore:
        if self._store is None:
            store = TokenStore(self.store_path)
            self._order = permute(np.arange(len(store), dtype=np.int64), len(store), seed=self.seed)
            self._stream_ends = np.cumsum(store.lengths[self._order] + 1)
            self._store = store
        return self._store
