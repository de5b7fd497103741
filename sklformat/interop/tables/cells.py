"""One row's numbers in one column: a list, a list of lists, or deeper, without an object for each list."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from sklformat.interop.columns import offsets_of

Columns = Mapping[str, tuple[DTypeLike, int]]
"""Of columns that are written, by name: the type of the numbers, and how many lists are around each."""


@dataclass(frozen=True, slots=True)
class Cell:
    """
    Lists of numbers, one inside the other.

    Attributes:
        values: [n] the innermost numbers, one list after the other.
        levels: Offsets of the lists at each depth, int64 from 0, the outermost first: ``[[7, 8], [9]]`` is values
            [7, 8, 9] and levels ([0, 2, 3],); a plain list of numbers has no level.
        bits: Significant bits that floats had in the file, where these are fewer than those of ``values``.
    """

    values: NDArray[Any]
    levels: tuple[NDArray[np.int64], ...] = ()
    bits: int | None = None

    def flat(self, name: str) -> NDArray[Any]:
        """
        The numbers of a plain list.

        Raises:
            ValueError: It is a list of lists.
        """
        if self.levels:
            raise ValueError(f"{name} is a list of lists, must be a list of numbers")
        return self.values

    def ragged(self, name: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """
        The numbers [n] and the offsets [T + 1] of a list of lists.

        Raises:
            ValueError: It is a plain list, or deeper.
        """
        if len(self.levels) != 1 and self.values.size:
            raise ValueError(f"{name} is not a list of lists")
        return self.values, self.levels[0] if self.levels else np.zeros(1, np.int64)

    def pick(self, index: int, name: str) -> Cell:
        """
        Of lists [T, n, K] the lists [T, K] at ``index`` of the middle.

        Raises:
            ValueError: They are not so deep, or some list is too short.
        """
        if len(self.levels) != 2:
            raise ValueError(f"{name}[{index}] needs lists of lists of lists, {name} is not so deep")
        outer, inner = self.levels
        places = outer[:-1] + index
        if (places >= outer[1:]).any():
            raise ValueError(f"{name}[{index}]: position {int(np.argmax(places >= outer[1:]))} has no such list")
        lengths = inner[places + 1] - inner[places]
        offsets = offsets_of(lengths)
        values = self.values[np.repeat(inner[places] - offsets[:-1], lengths) + np.arange(offsets[-1])]
        return Cell(values, (offsets,), self.bits)


def check_there(names: Iterable[str], there: Collection[str]) -> None:
    """
    A file has the columns that are to be read.

    Raises:
        ValueError: It lacks one; names those that it has.
    """
    if missing := [name for name in names if name not in there]:
        raise ValueError(f"no column {missing[0]!r}, only {', '.join(sorted(there)) or 'none'}")


def array_cell(array: NDArray[Any], bits: int | None = None) -> Cell:
    """The rows of an array [T, …, K] as lists of equal length; ``bits`` as in ``Cell``."""
    levels = []
    for depth in range(array.ndim - 1):
        lists, length = int(np.prod(array.shape[: depth + 1])), array.shape[depth + 1]
        levels.append(np.arange(lists + 1, dtype=np.int64) * length)
    return Cell(array.reshape(-1), tuple(levels), bits)


def list_cell(value: list[Any], name: str) -> Cell:
    """
    Nested Python lists; a null in place of a list is an empty list, as engines write a position without values.

    Raises:
        ValueError: Lists beside numbers, something other than numbers, or integers beyond 64 bits.
    """
    levels = []
    while any(isinstance(one, list) for one in value):
        value = [[] if one is None else one for one in value]
        if not all(isinstance(one, list) for one in value):
            raise ValueError(f"{name} has lists beside numbers")
        levels.append(offsets_of([len(one) for one in value]))
        value = list(itertools.chain.from_iterable(value))
    try:
        values = np.asarray(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{name} is not a list of numbers") from None
    if values.size and values.dtype.kind not in "biuf":
        raise ValueError(f"{name} holds something other than numbers")
    return Cell(values, tuple(levels))
