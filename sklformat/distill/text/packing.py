"""
Sequences of tokenised documents in shuffled order: packed to equal length, or whatever else ``Sequences`` can be.

Knows no model and no torch.
Source: Anshumann et al. 2025 (arXiv 2503.16870), Appendix D: documents shuffled by a seed that teacher and student
share, joined by a separator, attention not masked across documents.  Where BOS stands is docs/your-data.md's.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from sklformat.distill.text.corpus import StoreFacts, TokenStore
from sklformat.format.order import permute


class Sequences(ABC):
    """
    What teacher and student read: sequences made of a token store's documents, in an order that a seed shuffles.

    A sequence is a function of the store and the arguments alone. Memory: some 16 bytes per document.

    Pickled, it is its arguments; the store is opened again, on first use, in the process that unpickled it.

    Args:
        store_path: A token store.
        seq_len: Positions in a sequence, at most, >= 1.
        separator_id: Token id put after each document, >= 0.
        seed: Seed of the documents' order.
        first: Number of the first sequence of the text to show; ``self[0]`` is this one.
        count: How many sequences to show; None: all from ``first`` on.
        isolated: Whether documents do not see each other, so that nothing predicts their first tokens.

    Raises:
        ValueError: An argument out of range, or a text too short for the sequences asked; the message has both numbers.
        FileNotFoundError, CorruptError, UnsupportedError: As ``TokenStore``.

    Attributes:
        is_ragged: Whether each sequence has a length of its own.
    """

    is_ragged = False
    PICKLED: ClassVar[tuple[str, ...]] = (
        "store_path",
        "seq_len",
        "separator_id",
        "seed",
        "first",
        "isolated",
        "_count",
    )

    def __init__(
        self,
        store_path: Path | str,
        *,
        seq_len: int,
        separator_id: int,
        seed: int,
        first: int = 0,
        count: int | None = None,
        isolated: bool = False,
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
        self.isolated = isolated
        self._store: TokenStore | None = None
        self._opened()
        available, wanted = self._num_available(), first + (1 if count is None else count)
        if available < wanted:
            raise ValueError(self._too_short(wanted))
        self._count = available - first if count is None else count

    def __len__(self) -> int:
        return self._count

    @abstractmethod
    def __getitem__(self, index: int) -> NDArray[np.uint32]:
        """Tokens of one sequence, [positions + 1] uint32, a copy."""

    @abstractmethod
    def document_starts(self, index: int) -> NDArray[np.bool_]:
        """
        Where documents begin among the tokens of one sequence, [positions + 1].

        A document begins at its own BOS if it has one; a separator and a window's BOS begin none.
        """

    @abstractmethod
    def counted(self, index: int, starts: NDArray[np.bool_] | None = None) -> NDArray[np.bool_] | None:
        """
        The positions of one sequence that are learnt from, [positions]; None: all.

        Those that predict answers, if these are marked, and of isolated documents none that predicts a first token.

        Args:
            index: Of the sequence.
            starts: Its ``document_starts``, where they are at hand.
        """

    def position_ids(self, index: int, starts: NDArray[np.bool_] | None = None) -> NDArray[np.int64] | None:
        """
        Each input's place in its document, or in what the sequence has of it, [positions]; None: all are one.

        They begin at 0 where the sequence and where each isolated document does.

        Args:
            index: Of the sequence.
            starts: Its ``document_starts``, where they are at hand.
        """
        if not self.isolated or self.is_ragged:
            return None
        return places_of((self.document_starts(index) if starts is None else starts)[:-1])

    def width(self, begin: int, end: int) -> int:
        """Positions of the longest sequence of begin..end - 1, also of those behind the last that is shown."""
        del begin, end
        return self.seq_len

    def has_counted(self) -> bool:
        """Whether any position is learnt from."""
        counted = (self.counted(index) for index in range(len(self)))
        return any(positions is None or positions.any() for positions in counted)

    def num_positions(self) -> int:
        """Positions that are learnt from, of all sequences together."""
        if not self.facts.marks_answers:
            return self._num_all_positions()
        counted = (self.counted(index) for index in range(len(self)))
        return sum(int(positions.sum()) for positions in counted if positions is not None)

    def _num_all_positions(self) -> int:
        return len(self) * self.seq_len

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in self.PICKLED} | {"_store": None}

    @property
    def facts(self) -> StoreFacts:
        """What the token store says of itself."""
        return self._opened().facts

    def _opened(self) -> TokenStore:
        if self._store is None:
            store = TokenStore(self.store_path)
            # Tokens around each document; chats come with all that stands around them.
            self._bos_id = store.facts.bos_id or 0
            self._before = int(store.facts.bos == "document")
            is_one = bool(self._before) and self._bos_id == self.separator_id
            self._after = int(not store.facts.marks_answers and not is_one)
            self._arrange(store)
            self._store = store
        return self._store

    def _number(self, index: int) -> int:
        """Number among all sequences of the text."""
        index = operator.index(index)
        if not -self._count <= index < self._count:
            raise IndexError(f"sequence {index} of {self._count}")
        self._opened()
        return self.first + index % self._count

    @abstractmethod
    def _arrange(self, store: TokenStore) -> None:
        """Bring the documents into their order."""

    @abstractmethod
    def _num_available(self) -> int:
        """How many sequences the whole text gives."""

    @abstractmethod
    def _too_short(self, wanted: int) -> str:
        """Why a text does not give this many."""


class PackedSequences(Sequences):
    """
    Windows of ``seq_len + 1`` tokens over all documents, each document between its marks.

    The stream is document after document in the order ``permute(arange(n), n, seed=seed)``. What stands around them,
    the store says (``Encoding``):

    * bos "none": each document is followed by the separator.
    * "document": BOS, the document, the separator; where BOS is the separator itself, it stands once between two.
    * "window": as "none", and each window begins with BOS.
    * Where answers are marked, nothing: a chat brings all that stands around it.

    Window i holds tokens ``[i·seq_len, i·seq_len + seq_len]`` of the stream, both ends included, so neighbours share
    one token and every token but the first is predicted exactly once. With "window" it is BOS and tokens
    ``[i·seq_len, (i + 1)·seq_len)``, and every token is predicted exactly once. What fills no window is dropped.

    Args, Raises: As ``Sequences``.
    """

    def __getitem__(self, index: int) -> NDArray[np.uint32]:
        window = np.empty(self.seq_len + 1, dtype=np.uint32)
        start, stream = self._stream(index, window)
        if self._window_bos:
            window[0] = self._bos_id
        for document, place in self._documents(start, start + stream.size):
            tokens = self._opened()[document]
            paste(stream, place - start, tokens)
            if self._before:
                paste(stream, place - 1 - start, [self._bos_id])
            if self._after:
                paste(stream, place + tokens.size - start, [self.separator_id])
        return window

    def document_starts(self, index: int) -> NDArray[np.bool_]:
        window = np.zeros(self.seq_len + 1, np.bool_)
        start, stream = self._stream(index, window)
        for _, place in self._documents(start, start + stream.size):
            paste(stream, place - self._before - start, [True])
        return window

    def counted(self, index: int, starts: NDArray[np.bool_] | None = None) -> NDArray[np.bool_] | None:
        borders = None
        if self.isolated:
            borders = (self.document_starts(index) if starts is None else starts)[1:]
        if not self.facts.marks_answers:
            return None if borders is None else ~borders
        window = np.zeros(self.seq_len + 1, np.bool_)
        start, stream = self._stream(index, window)
        for document, place in self._documents(start, start + stream.size):
            paste(stream, place - start, self._opened().answers(document))
        return window[1:] if borders is None else window[1:] & ~borders

    def _num_all_positions(self) -> int:
        first = self.first * self.seq_len + 1 - self._window_bos  # place in the stream of the first that is predicted
        end = first + len(self) * self.seq_len
        starts = np.concatenate([[0], self._ends[:-1]]) if self.isolated else np.zeros(0, np.int64)
        return end - first - int(np.subtract(*np.searchsorted(starts, (end, first))))

    def _stream(self, index: int, window: NDArray[Any]) -> tuple[int, NDArray[Any]]:
        """Where a window begins in the stream, and the part of it that the stream fills."""
        return self._number(index) * self.seq_len, window[self._window_bos :]

    def _documents(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The documents in a part of the stream, and where in the stream the first token of each own stands."""
        for place in range(int(np.searchsorted(self._ends, start, side="right")), len(self._ends)):
            document = int(self._order[place])
            begin = int(self._ends[place]) - self._after - int(self._opened().lengths[document])
            if begin - self._before >= end:
                return
            yield document, begin

    def _arrange(self, store: TokenStore) -> None:
        self._window_bos = int(store.facts.bos == "window")
        self._order = permute(np.arange(len(store), dtype=np.int64), len(store), seed=self.seed)
        self._ends = np.cumsum(store.lengths[self._order] + self._before + self._after)

    def _num_available(self) -> int:
        # A window has one token more than positions, of which BOS may be one.
        return (int(self._ends[-1]) - 1 + self._window_bos) // self.seq_len

    def _too_short(self, wanted: int) -> str:
        need = wanted * self.seq_len + 1 - self._window_bos
        return (
            f"the text is too short: {wanted} sequences of {self.seq_len} positions take {need} tokens, "
            f"it has {self._ends[-1]} (separators included); give more text or a smaller seq_len"
        )


def places_of(starts: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How far each token is from the last start at or before it, or from the first token, [tokens]."""
    own = np.arange(starts.size)
    places: NDArray[np.int64] = own - np.maximum.accumulate(np.where(starts, own, 0))
    return places


def paste(out: NDArray[Any], place: int, values: Any) -> None:
    """Write values into an array from a place on, as far as they lie inside of it."""
    begin, end = max(place, 0), min(place + len(values), out.size)
    if begin < end:
        out[begin:end] = values[begin - place : end - place]
