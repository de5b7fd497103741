"""Arrays of safetensors files, mapped; as rows, where they are stacked rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sklformat.errors import CorruptError
from sklformat.interop.tables.cells import check_there
from sklformat.interop.tables.npz import stacked_rows

_LENGTH_SIZE = 8
_MAX_HEADER = 100_000_000  # bytes; the format's own bound
_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1",
}  # fmt: skip


class Bfloats:
    """
    An array of bfloat16; what is taken of it is float32.

    Args:
        halves: The upper halves of float32 numbers, uint16 of any shape.
    """

    bits = 8
    """Significant bits of a number."""

    def __init__(self, halves: NDArray[np.uint16]) -> None:
        self._halves, self.ndim, self.shape = halves, halves.ndim, halves.shape

    def __len__(self) -> int:
        return len(self._halves)

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        values: NDArray[np.float32] = (self._halves[key].astype(np.uint32) << 16).view(np.float32)
        return values


Array = NDArray[Any] | Bfloats


def open_arrays(path: Path) -> dict[str, Array]:
    """
    The arrays of a file, by name, mapped; read when one takes parts of them.

    Raises:
        CorruptError: It is no safetensors file, or its header lies about the rest: holes, overlaps, sizes.
        OSError: The system's own.
    """
    size = path.stat().st_size
    try:
        begin, header = _read_header(path, size)
        places = {name: _place(name, entry) for name, entry in header.items() if name != "__metadata__"}
        _check_whole(places, size - begin)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"not a safetensors file: {error}", path=path) from None
    if size == begin:
        return {name: np.zeros(shape, dtype) for name, (dtype, shape, _, _) in places.items()}
    content = np.memmap(path, np.uint8, "r", begin)
    arrays: dict[str, Array] = {}
    for name, (dtype, shape, first, last) in places.items():
        array = content[first:last].view(dtype).reshape(shape)
        arrays[name] = Bfloats(array) if header[name]["dtype"] == "BF16" else array
    return arrays


def _read_header(path: Path, size: int) -> tuple[int, dict[str, Any]]:
    """Where the arrays begin, and what the header says of them."""
    with path.open("rb") as file:
        begin = _LENGTH_SIZE + int.from_bytes(file.read(_LENGTH_SIZE), "little")
        if not _LENGTH_SIZE + 2 <= begin <= min(size, _LENGTH_SIZE + _MAX_HEADER):
            raise ValueError(f"its header would end at byte {begin} of {size}")
        header = json.loads(file.read(begin - _LENGTH_SIZE), object_pairs_hook=_unique)
    if not isinstance(header, dict):
        raise ValueError("its header is no object")  # noqa: TRY004  of a file, not of an argument
    return begin, header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


_Place = tuple[np.dtype[Any], tuple[int, ...], int, int]


def _place(name: str, entry: Any) -> _Place:
    """Type, shape and bytes of an array."""
    try:
        kind, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{name} has no dtype, shape and data_offsets") from None
    if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
        raise ValueError(f"shape or data_offsets of {name} are not natural numbers")
    if kind not in _TYPES:
        raise ValueError(f"{name} has type {kind!r}, known are {', '.join(_TYPES)}")
    dtype = np.dtype(_TYPES[kind])
    if math.prod(shape) * dtype.itemsize != last - first:
        raise ValueError(f"{name} has {last - first} bytes for shape {list(shape)} of {kind}")
    return dtype, shape, first, last


def _check_whole(places: dict[str, _Place], size: int) -> None:
    """All bytes belong to one array each."""
    end = 0
    for name, (_, _, first, last) in sorted(places.items(), key=lambda item: item[1][2:]):
        if first != end:
            raise ValueError(f"{name} begins at byte {first}, must at {end}")
        end = last
    if end != size:
        raise ValueError(f"its arrays end at byte {end} of {size}")


def read_head(path: Path) -> tuple[set[str], str | None]:
    """Names of the arrays; there is no note."""
    return set(open_arrays(path)), None


def read_cells(path: Path, names: Sequence[str], start: int = 0) -> Iterator[dict[str, Any]]:
    """As ``files.Table.rows``, of arrays that are stacked rows."""
    arrays = open_arrays(path)
    check_there(names, arrays)
    try:
        yield from stacked_rows(path, {name: arrays[name] for name in names}, start)
    except ValueError as error:
        raise CorruptError(f"safetensors: {error}", path=path) from None
