"""Sequences as files of other systems have them: the same number of records at each position, a row for each token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from sklformat.format.header import Header
from sklformat.interop.columns import Row
from sklformat.interop.tables.cells import Cell, Columns
from sklformat.interop.tables.files import SUFFIXES, TableWriter

FILLER = -1e4
"""The log-prob of a record that is none: its probability is 0 in every precision, and it is finite in each."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """
    What is to be written for another system.

    Attributes:
        header: Of the source.
        count: Sequences.
        k: Records of each position, where a system has the same number everywhere: as many as any position has,
            or what the user asks for.
    """

    header: Header
    count: int
    k: int


class Exporter(Protocol):
    """
    Writes sequences for another system; what it writes gets its name when the context is left without an exception.

    Attributes:
        says: Sentences, when all is written: which token a row describes, what was lost.
    """

    @property
    def says(self) -> Sequence[str]: ...

    def append(self, row: Row) -> None:
        """Add one sequence of L tokens with L - 1 rows about the next token; its values are natural log-probs."""

    def __enter__(self) -> Exporter: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Evened(NamedTuple):
    """
    Records of T positions, k at each, the most probable first; fillers behind them.

    Attributes:
        token_ids: [T, k] int64; no id twice at a position, fillers included.
        logprobs: [T, k] float64; ``FILLER`` where there is no record.
        real: [T, k] whether it is a record.
    """

    token_ids: NDArray[np.int64]
    logprobs: NDArray[np.float64]
    real: NDArray[np.bool_]

    def with_last(self) -> Evened:
        """With a row of fillers behind the last, about the token behind the sequence."""
        ids, logs, real = (np.concatenate([each, each[-1:]]) for each in self)
        logs[-1], real[-1] = FILLER, False
        return Evened(ids, logs, real)


class Evener:
    """
    Makes all positions have k records, and counts what that takes.

    Args:
        export: Says k.
        filler: The log-prob of a record that is none.

    Attributes:
        cut: Records left out, since their position had more than k.
        fillers: Put in, since their position had fewer.
        empty: Positions that have no record.
    """

    def __init__(self, export: Export, filler: float = FILLER) -> None:
        self._filler = filler
        self._k, self._vocab_size = export.k, export.header.vocab_size
        self.cut = self.fillers = self.empty = 0
        self._left_out = 0.0

    def even(self, row: Row) -> Evened:
        """The records of a row, whose values are log-probs."""
        lengths, k = np.diff(row.offsets), self._k
        positions = np.repeat(np.arange(lengths.size), lengths)
        order = np.lexsort((row.token_ids, -row.values, positions))
        ranks = np.arange(order.size) - np.repeat(row.offsets[:-1], lengths)
        kept = ranks < k
        ids = self._spare_ids(positions[kept], row.token_ids[order][kept], np.minimum(lengths, k))
        logs = np.full(ids.shape, self._filler)
        places = positions[kept], ranks[kept]
        ids[places], logs[places] = row.token_ids[order][kept], row.values[order][kept]
        real = np.arange(k) < lengths[:, None]
        self.cut += int(order.size - kept.sum())
        self._left_out += float(np.exp(row.values[order][~kept]).sum())
        self.fillers += int(real.size - real.sum())
        self.empty += int((lengths == 0).sum())
        return Evened(ids, logs, real)

    def _spare_ids(self, positions: NDArray[Any], ids: NDArray[Any], lengths: NDArray[Any]) -> NDArray[np.int64]:
        """[T, k] for each position the smallest ids that it has not, from its number of records on."""
        k = self._k
        taken = np.zeros((lengths.size, min(2 * k, self._vocab_size)), np.bool_)
        small = ids < taken.shape[1]
        taken[positions[small], ids[small]] = True
        free = np.argsort(taken, axis=1, kind="stable")
        ranks = np.maximum(np.arange(k) - lengths[:, None], 0)
        return np.take_along_axis(free, ranks, 1)

    def says(self) -> list[str]:
        """What it took."""
        said = []
        if self.cut:
            said.append(
                f"lost: {self.cut} records of positions with more than {self._k}; their probabilities sum to "
                f"{self._left_out:.4g}"
            )
        if self.fillers:
            said.append(
                f"each position has {self._k} entries: {self.fillers} were put in, with log-prob {self._filler:g}, "
                f"probability 0; {self.empty} positions have no other"
            )
        return said


class EvenTable(ABC):
    """
    An ``Exporter`` into one Parquet or JSONL file, by its name's end, with L rows of k records for L tokens.

    Subclasses say which columns the file has, and the cells of a sequence.
    """

    COLUMNS: ClassVar[Columns]

    def __init__(self, path: Path, export: Export) -> None:
        kinds = [kind for kind in ("parquet", "jsonl") if path.suffix in SUFFIXES[kind]]
        if not kinds:
            raise ValueError(f"{path}: is to be Parquet or JSON lines; end its name in .parquet or .jsonl")
        self._evener = Evener(export)
        self._writer = TableWriter(path, kinds[0], self.COLUMNS)

    @abstractmethod
    def cells(self, tokens: NDArray[Any], evened: Evened) -> dict[str, Cell]:
        """The columns of a sequence of L tokens [L] with L rows of records, the last without a real one."""

    @property
    def fillers(self) -> int:
        """Entries that are no records, but for those of the last rows."""
        return self._evener.fillers

    @property
    def says(self) -> Sequence[str]:
        return self._evener.says()

    def append(self, row: Row) -> None:
        """As ``Exporter``."""
        self._writer.append_cells(self.cells(row.input_ids, self._evener.even(row).with_last()))

    def __enter__(self) -> EvenTable:
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)
