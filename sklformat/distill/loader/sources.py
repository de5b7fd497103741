"""
Where a stream's sequences come from, one cache or several, numbered one cache after the other.

Knows no order and no rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from sklformat.cache.reader import Cache
from sklformat.cache.tokens import TokenSource
from sklformat.distill.loader.batches import Batch, together
from sklformat.distill.loader.conflicts import check_together
from sklformat.distill.loader.contents import Contents, Part, is_isolated
from sklformat.distill.loader.teachers import Taught, Teachers
from sklformat.format.columns import STARTS

Source: TypeAlias = Path | str | Cache | Teachers


class Sources:
    """
    The sequences of one cache or several.

    What has the same layout is decoded by one call; the rest is put together row by row.

    Args:
        paths: Each a cache, where one is, or several teachers'.
        tokens: As for ``Part``, of each.
        sequences: As for ``Part``, of each.

    Raises:
        SettingsError: They do not go together.
        ValueError, TypeError, AlignmentError, FormatError, FileNotFoundError: As ``Part``.
    """

    def __init__(
        self,
        paths: Sequence[Source],
        tokens: Sequence[TokenSource | None],
        sequences: Sequence[range | None],
    ) -> None:
        self._parts = [
            Taught(path, its, some) if isinstance(path, Teachers) else Part(path, its, some)
            for path, its, some in zip(paths, tokens, sequences, strict=True)
        ]
        self.caches = [part.cache for part in self._parts]
        check_together(self.caches)
        self.sizes = [len(part.sequences) for part in self._parts]
        self._starts = np.cumsum([0, *self.sizes[:-1]])
        self._units, self._unit_of, self._shift = _units(self._parts, self._starts)
        lengths = [cache.header.seq_len for cache in self.caches]
        self._positions = max(lengths) if all(lengths) else 1
        self._all_have_starts = all(STARTS in cache.header.columns for cache in self.caches)

    @classmethod
    def of(
        cls,
        path: Source | Sequence[Source],
        tokens: TokenSource | Sequence[TokenSource | None] | None,
        sequences: range | Sequence[range | None] | None,
    ) -> Sources:
        """One source with its tokens and its part, or a list of them with lists, or None, of as many."""
        if not isinstance(path, list | tuple):
            return cls([cast("Source", path)], [cast("TokenSource | None", tokens)], [cast("range | None", sequences)])
        if not path:
            raise ValueError("a stream of several caches needs at least one, got an empty list")
        return cls(path, _one_each("tokens", tokens, len(path)), _one_each("sequences", sequences, len(path)))

    @property
    def where(self) -> str:
        """What messages call it."""
        more = len(self.caches) - 1
        return f"{self.caches[0].path}{f' and {more} more' if more else ''}"

    @property
    def isolated(self) -> bool:
        """Whether documents did not see each other when the teachers ran."""
        return is_isolated(self.caches[0])

    @property
    def spans(self) -> list[range]:
        """The part of each cache."""
        return [part.sequences for part in self._parts]

    @property
    def identities(self) -> list[Any]:
        """What loader states say of each."""
        return [part.identity for part in self._parts]

    def batch(self, places: NDArray[np.int64], state: dict[str, Any]) -> Batch:
        """
        The sequences at these places, -1 for an empty row, as one batch.

        Raises:
            FormatError: A block is damaged.
            AlignmentError: The records are not about these tokens.
        """
        if len(self._units) == 1:
            return self._units[0].batch(places, state)
        return together(self.singles(places), state, self._positions)

    def singles(self, places: NDArray[np.int64]) -> list[Batch]:
        """The same one by one, each with a T of its own and an empty state."""
        if len(self._units) == 1:
            return self._units[0].singles(places)
        empty = places < 0
        source = np.searchsorted(self._starts, places, side="right") - 1
        unit = np.where(empty, 0, self._unit_of[source])
        inside = np.where(empty, -1, places + self._shift[source])
        rows: dict[int, Batch] = {}
        for number in np.unique(unit).tolist():
            mine = np.flatnonzero(unit == number)
            rows |= zip(mine.tolist(), self._units[number].singles(inside[mine]), strict=True)
        singles = [rows[row] for row in range(places.size)]
        return singles if self._all_have_starts else [_without_borders(single) for single in singles]


def _one_each(name: str, values: Any, num_caches: int) -> Sequence[Any]:
    if values is None:
        return [None] * num_caches
    if not isinstance(values, list | tuple) or len(values) != num_caches:
        given = f"{len(values)} for {num_caches}" if isinstance(values, list | tuple) else f"a {type(values).__name__}"
        raise ValueError(f"{name} of several caches are a list with one, or None, for each cache, got {given}")
    return values


def _units(
    parts: Sequence[Part | Taught], starts: NDArray[np.int64]
) -> tuple[list[Contents | Taught], NDArray[np.int64], NDArray[np.int64]]:
    """What is decoded by one call; of each part, in which of these it is, and how far its places move there."""
    alike: dict[object, list[int]] = {}
    for number, part in enumerate(parts):
        alike.setdefault(part.layout if isinstance(part, Part) else number, []).append(number)
    units: list[Contents | Taught] = []
    unit_of, shift = np.zeros(len(parts), np.int64), np.zeros(len(parts), np.int64)
    for members in alike.values():
        begin = 0
        for number in members:
            unit_of[number], shift[number] = len(units), begin - int(starts[number])
            begin += len(parts[number].sequences)
        some = [part for number in members if isinstance(part := parts[number], Part)]
        taught = [part for number in members if isinstance(part := parts[number], Taught)]
        units += [Contents(some)] if some else taught
    return units, unit_of, shift


def _without_borders(single: Batch) -> Batch:
    """Where not all caches say where documents begin, no sequence does."""
    return Batch(single.input_ids, single.labels, single.targets, single.state)
