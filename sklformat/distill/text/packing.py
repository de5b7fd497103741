"""
Sequences of equal length packed from tokenised documents.

Knows no model and no torch.
Source: Anshumann et al. 2025 (arXiv 2503.16870), Appendix D: documents shuffled by a seed that teacher and student
share, joined by a separator, attention not masked across documents.  Where BOS stands is docs/your-data.md's.
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
    Windows of ``seq_len + 1`` tokens over all documents, shuffled by seed, each document between its marks.

    The stream is document after document in the order ``permute(arange(n), n, seed=seed)``. What stands around them,
    the store says (``Encoding.bos``):

    * "none": each document is followed by the separator.
    * "document": BOS, the document, the separator; where BOS is the separator itself, it stands once between two.
    * "window": as "none", and each window begins with BOS.

    Window i holds tokens ``[i·seq_len, i·seq_len + seq_len]`` of the stream, both ends included, so neighbours share
    one token and every token but the first is predicted exactly once. With "window" it is BOS and tokens
    ``[i·seq_len, (i + 1)·seq_len)``, and every token is predicted exactly once. What fills no window is dropped.
    A window is a function of (store, seed, seq_len, separator) alone. Memory: 16 bytes per document.

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
        self._opened()
        num_tokens = int(self._ends[-1])
        extra = 1 - self._window_bos  # a window's last token, unless BOS takes the place of its first
        num_windows = (num_tokens - extra) // seq_len
        wanted = first + (1 if count is None else count)
        if num_windows < wanted:
            need = wanted * seq_len + extra
            raise ValueError(
                f"the text is too short: {wanted} sequences of {seq_len} positions take {need} tokens, "
                f"it has {num_tokens} (separators included); give more text or a smaller seq_len"
            )
        self._count = num_windows - first if count is None else count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> NDArray[np.uint32]:
        """Tokens of one sequence, [seq_len + 1] uint32, a copy."""
        start = self._start(index)
        store = self._opened()
        window = np.empty(self.seq_len + 1, dtype=np.uint32)
        if self._window_bos:
            window[0] = self._bos_id
        stream = window[self._window_bos :]
        end = start + stream.size
        place = int(np.searchsorted(self._ends, start, side="right"))
        at = start
        while at < end:
            tokens = store[int(self._order[place])]
            document_end = int(self._ends[place])
            text_end = document_end - self._after
            text_start = text_end - tokens.size
            if self._before and text_start > start:
                stream[text_start - 1 - start] = self._bos_id
            at, stop = max(at, text_start), min(end, text_end)
            if at < stop:
                stream[at - start : stop - start] = tokens[at - text_start : stop - text_start]
            if self._after and document_end <= end:
                stream[document_end - 1 - start] = self.separator_id
            at = document_end
            place += 1
        return window

    def document_starts(self, index: int) -> NDArray[np.bool_]:
        """
        Where documents begin among the tokens of one sequence, [seq_len + 1].

        A document begins at its own BOS if it has one; a separator and a window's BOS begin none.
        """
        begin = self._start(index)
        self._opened()
        ends = self._ends[np.searchsorted(self._ends, begin) :]
        ends = ends[: np.searchsorted(ends, begin + self.seq_len - self._window_bos, side="right")]
        starts = np.zeros(self.seq_len + 1, np.bool_)
        starts[ends - begin + self._window_bos] = True
        starts[self._window_bos] |= begin == 0
        return starts

    def __getstate__(self) -> dict[str, Any]:
        dropped = ("_order", "_ends", "_before", "_after", "_window_bos", "_bos_id")
        return {name: value for name, value in self.__dict__.items() if name not in dropped} | {"_store": None}

    @property
    def facts(self) -> StoreFacts:
        """What the token store says of itself."""
        return self._opened().facts

    def _start(self, index: int) -> int:
        """Place in the stream of a sequence's first token of it."""
        index = operator.index(index)
        if not -self._count <= index < self._count:
            raise IndexError(f"sequence {index} of {self._count}")
        return (self.first + index % self._count) * self.seq_len

    def _opened(self) -> TokenStore:
        if self._store is None:
            store = TokenStore(self.store_path)
            bos, self._bos_id = store.facts.bos, store.facts.bos_id or 0
            # Tokens around each document, and in front of each window.
            self._before = int(bos == "document")
            self._after = int(not (self._before and self._bos_id == self.separator_id))
            self._window_bos = int(bos == "window")
            self._order = permute(np.arange(len(store), dtype=np.int64), len(store), seed=self.seed)
            self._ends = np.cumsum(store.lengths[self._order] + self._before + self._after)
            self._store = store
        return self._store
