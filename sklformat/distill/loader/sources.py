"""
Where a stream's sequences come from, one cache or several, numbered one cache after the other.

Knows no order and no rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sklformat.cache.reader import Cache
from sklformat.cache.tokens import TokenSource
from sklformat.distill.loader.batches import Batch, Targets
from sklformat.distill.loader.conflicts import check_together
from sklformat.distill.loader.contents import Contents, Decoded, Part, is_isolated
from sklformat.distill.loader.teachers import Taught, Teachers
from sklformat.distill.losses.kl import IGNORED_LABEL
from sklformat.format.columns import LABEL_LOGPROB, STARTS
from sklformat.format.header import other_teacher
from sklformat.native import BatchArrays
from sklformat.settings.train import Decode

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
        self._packed = self._with_logprob = False
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

    def pack(self) -> None:
        """
        From now on leave the records of batches as they are stored, for a device that decodes them.

        Raises:
            ValueError: They are not all of kind counts and of one layout, or of several teachers.
        """
        self._check_packable()
        self._packed = True

    @property
    def have_label_logprob(self) -> bool:
        """Whether every cache says how sure the teacher of its records was of each label."""
        columns = [isinstance(part, Part) and LABEL_LOGPROB in part.cache.header.columns for part in self._parts]
        return all(columns) and all(other_teacher(cache.header) is None for cache in self.caches)

    def give_label_logprob(self) -> None:
        """
        From now on batches have the column, for which the host reads their sequences once more.

        Raises:
            ValueError: A cache has none of its records' teacher, or the records are left packed.
        """
        if not self.have_label_logprob or self._packed:
            raise ValueError(
                f"{self.where}: label_logprob is asked for, and not in each cache, of the teacher of its records; "
                'capture with --columns label_logprob, and decode="cpu"'
            )
        self._with_logprob = True

    def decoding(self, asked: Decode, device: torch.device) -> tuple[Literal["cpu", "cuda"], str]:
        """
        Where the records of what trains on a device are decoded, as ``SparseLogitDataset`` has it, and a note on it.

        Args:
            asked: "auto": on a GPU, if that is what trains and knows these records.
            device: What trains.

        Raises:
            ValueError: "cuda" is asked for, and something else trains, or it does not know these records.
        """
        if asked == "cuda" and device.type != "cuda":
            raise ValueError(f'decode="cuda" needs a student that trains on a GPU, it is on {device}; use decode="cpu"')
        if asked == "cuda":
            self._check_packable()
        if asked == "cpu" or device.type != "cuda":
            return "cpu", ""
        if why := self._why_not_packed():
            return "cpu", f"{self.where}: the host decodes the records, of {why}"
        return "cuda", f"{self.where}: the GPU decodes the records and checks them before each step"

    def _check_packable(self) -> None:
        if why := self._why_not_packed():
            raise ValueError(f'{self.where}: decode="cuda" does not fit {why}; use decode="cpu"')

    def _why_not_packed(self) -> str:
        """What a device does not know of these records; "" where it knows them."""
        header = self.caches[0].header
        if not all(isinstance(unit, Contents) for unit in self._units):
            return "several teachers, whose records are united on the host"
        if header.kind != "counts":
            return f"kind {header.kind!r}, of which only the host decodes; the device knows 'counts'"
        if len(self._units) > 1:
            return "other caches beside it whose records have another layout (profile, rounds, vocabulary or tokens)"
        return ""

    def batch(self, places: NDArray[np.int64], state: dict[str, Any]) -> Batch:
        """
        The sequences at these places, -1 for an empty row, as one batch.

        Raises:
            FormatError: A block is damaged.
            AlignmentError: The records are not about these tokens.
        """
        unit = self._units[0]
        if self._packed and isinstance(unit, Contents):
            return unit.decoded(places, packed=True).batch(state)
        if len(self._units) == 1:
            batch = unit.decoded(places).batch(state)
        else:
            pieces = [(rows, decoded.arrays) for rows, decoded in self._pieces(places)]
            batch = _interleaved(pieces, places.size, self._positions, self._all_have_starts, state)
        if not self._with_logprob:
            return batch
        return dataclasses.replace(batch, label_logprob=self._label_logprob(places, batch.input_ids.shape[1]))

    def _label_logprob(self, places: NDArray[np.int64], width: int) -> Tensor:
        """The column [B, T] of the sequences at these places."""
        source = np.searchsorted(self._starts, places, side="right") - 1
        column = np.zeros((places.size, width), np.float32)
        for row, (place, number) in enumerate(zip(places.tolist(), source.tolist(), strict=True)):
            if place >= 0:
                first = self.spans[number].start - int(self._starts[number])
                values = self.caches[number][first + place].columns[LABEL_LOGPROB]
                column[row, : values.size] = values
        return torch.from_numpy(column)

    def singles(self, places: NDArray[np.int64]) -> list[Batch]:
        """The same of one source, one by one, each with a T of its own and an empty state."""
        assert len(self._parts) == 1
        return self._units[0].decoded(places).singles()

    def _pieces(self, places: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], Decoded]]:
        """What each call decodes, and in which rows it stands; empty rows, of source -1, are of the last."""
        source = np.searchsorted(self._starts, places, side="right") - 1
        unit = self._unit_of[source]
        inside = np.where(places < 0, -1, places + self._shift[source])
        for number in np.unique(unit).tolist():
            rows = np.flatnonzero(unit == number)
            yield rows, self._units[number].decoded(inside[rows])


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


def _interleaved(
    pieces: list[tuple[NDArray[np.int64], BatchArrays]],
    num_rows: int,
    positions: int,
    borders: bool,
    state: dict[str, Any],
) -> Batch:
    """Rows of several calls as one batch, of at least so many positions, padded as ``collate`` pads."""
    width = max(positions, *(arrays.input_ids.shape[1] for _, arrays in pieces))
    input_ids = np.zeros((num_rows, width), np.int64)
    labels, counts = np.full_like(input_ids, IGNORED_LABEL), np.zeros_like(input_ids)
    starts, places = np.zeros((num_rows, width), np.bool_), np.zeros_like(input_ids)
    records: dict[int, tuple[NDArray[np.uint32], NDArray[np.float32]]] = {}
    for rows, arrays in pieces:
        own = arrays.input_ids.shape[1]
        input_ids[rows, :own], labels[rows, :own] = arrays.input_ids, arrays.labels
        counts[rows, :own] = np.diff(arrays.offsets).reshape(-1, own)
        ends = arrays.offsets[::own].tolist()
        for row, first, last in zip(rows.tolist(), ends[:-1], ends[1:], strict=True):
            records[row] = arrays.token_ids[first:last], arrays.probs[first:last]
        if borders and arrays.document_starts is not None and arrays.position_ids is not None:
            starts[rows, :own], places[rows, :own] = arrays.document_starts, arrays.position_ids
            places[rows, own:] = arrays.position_ids[:, -1:] + np.arange(1, width - own + 1)
    offsets = np.zeros(input_ids.size + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    token_ids, probs = (np.concatenate([records[row][field] for row in range(num_rows)]) for field in (0, 1))
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(labels),
        Targets(torch.from_numpy(token_ids.view(np.int32)), torch.from_numpy(probs), torch.from_numpy(offsets)),
        state,
        torch.from_numpy(places) if borders else None,
        torch.from_numpy(starts) if borders else None,
    )
