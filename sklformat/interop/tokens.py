"""Token ids of a source that has none, from a file beside it: ``--tokens``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sklformat.interop.columns import in_row, typed
from sklformat.interop.tables.cells import Cell
from sklformat.interop.tables.files import SUFFIXES, open_table

_COLUMN = "input_ids"


@dataclass(frozen=True)
class TokenFile:
    """
    Sequences of token ids: an .npy array [S, L], an npz, or a table with a column ``input_ids``.

    Attributes:
        path: The file, or directory of a table's parts.
    """

    path: Path

    def rows(self, start: int = 0) -> Iterator[NDArray[Any]]:
        """
        Ids [L] of each sequence from number ``start`` on; integers that nobody looked at yet.

        Raises:
            CorruptError: The file is damaged; names the row.
            ValueError: It is of no kind that is known here, or an array of another shape.
            OSError: The system's own.
        """
        if self.path.suffix == ".npy":
            yield from self.array()[start:]
            return
        table = open_table(self.path, self._kind())
        for number, row in enumerate(table.rows([_COLUMN], start), start):
            with in_row(self.path, number):
                cell = row[_COLUMN]
                if not isinstance(cell, Cell):
                    raise ValueError(f"{_COLUMN} is text or an object, must be a list of ids")  # noqa: TRY004  of a file
                ids = typed(cell.flat(_COLUMN), _COLUMN)
            yield ids

    def array(self) -> NDArray[Any]:
        """
        The ids [S, L] of an .npy file, mapped.

        Raises:
            ValueError: It is no such array.
            OSError: The system's own.
        """
        try:
            tokens: NDArray[Any] = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{self.path}: not a .npy array: {error}") from None
        if not isinstance(tokens, np.ndarray) or tokens.ndim != 2 or tokens.dtype.kind not in "iu":
            raise ValueError(f"{self.path}: must be an integer array of one row per sequence")
        return tokens

    def check_count(self, count: int) -> None:
        """
        An array has as many rows as there are sequences; of other files this is known when they end.

        Raises:
            ValueError: It has not, or is no such array.
        """
        if self.path.suffix == ".npy" and len(self.array()) != count:
            raise ValueError(f"{self.path}: has {len(self.array())} rows for {count} sequences; give one row for each")

    def _kind(self) -> str:
        files = [self.path] if not self.path.is_dir() else sorted(self.path.iterdir())
        kinds = {kind for file in files for kind, suffixes in SUFFIXES.items() if file.suffix in suffixes}
        if len(kinds) != 1:
            raise ValueError(f"{self.path}: --tokens takes .npy, .npz, .jsonl, .parquet, .arrow or .safetensors")
        return kinds.pop()


def next_tokens(tokens: Iterator[NDArray[Any]], path: Path, number: int) -> NDArray[Any]:
    """
    Ids of the next sequence, number ``number`` of the source at ``path``.

    Raises:
        ValueError: There are none left.
    """
    ids = next(tokens, None)
    if ids is None:
        raise ValueError(f"{path}: --tokens ends before its sequence {number}; give the tokens of all sequences")
    return np.asarray(ids)


def check_no_more(tokens: Iterator[NDArray[Any]], path: Path) -> None:
    """
    The tokens end with the source.

    Raises:
        ValueError: They do not.
    """
    if next(tokens, None) is not None:
        raise ValueError(f"{path}: --tokens holds more sequences; give the tokens of this source")
