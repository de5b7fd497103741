"""
The optional columns of a sequence: how many values and bytes each has, what these must be, and their bytes.

SPEC.md section 5.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sklformat.errors import CorruptError
from sklformat.format import layout

STARTS, RECORD_LOGPROB = "document_start", "record_logprob"
LABEL_LOGPROB, ENTROPY = "label_logprob", "entropy"
Columns = Mapping[str, NDArray[Any]]
"""By name: bool [T + 1] for document_start, float16 [nnz] for record_logprob, float16 [T] for the others."""
_Count = TypeVar("_Count", int, NDArray[Any])


def bits_of(names: Iterable[str]) -> int:
    """The header's field ``columns``."""
    return sum(layout.COLUMNS[name] for name in names)


def check_names(names: Iterable[str]) -> None:
    """
    Every name is one of a column.

    Raises:
        ValueError: Some are not; names them, and the columns that there are.
    """
    if unknown := set(names) - set(layout.COLUMNS):
        raise ValueError(f"columns may be {', '.join(layout.COLUMNS)}, got {', '.join(sorted(unknown))}")


def size_of(name: str, num_positions: _Count, num_records: _Count) -> _Count:
    """Bytes of a column in a payload; of one sequence, or of many."""
    if name == STARTS:
        return (num_positions + 8) // 8
    return 2 * (num_records if name == RECORD_LOGPROB else num_positions)


def typed_columns(
    names: tuple[str, ...],
    given: Mapping[str, ArrayLike] | None,
    num_positions: int,
    record_shape: tuple[int, ...],
) -> dict[str, NDArray[Any]]:
    """
    Columns as the format has them, in its order: float16 without -0, and bool; values are not checked yet.

    Args:
        names: Of the header.
        given: What the caller has, by name.
        num_positions: T.
        record_shape: Of record_logprob, (nnz,) or whatever is parallel to the records at hand.

    Raises:
        ValueError: Others than the header names, one of another shape, or document starts that are not 0 or 1.
    """
    there = given or {}
    if set(there) != set(names):
        raise ValueError(f"columns {sorted(there)} given, the header names {sorted(names)}")
    shapes = {STARTS: (num_positions + 1,), RECORD_LOGPROB: record_shape}
    typed = {name: _starts(there[name]) if name == STARTS else _halves(there[name]) for name in names}
    for name, values in typed.items():
        if values.shape != (shape := shapes.get(name, (num_positions,))):
            raise ValueError(f"column {name} has shape {values.shape}, must be {shape}")
    return typed


def _halves(given: ArrayLike) -> NDArray[Any]:
    with np.errstate(over="ignore"):  # a block refuses what is not finite in float16
        return np.asarray(given, np.float64).astype(np.float16, order="C") + np.float16(0)


def _starts(given: ArrayLike) -> NDArray[Any]:
    values = np.asarray(given)
    if values.dtype.kind not in "biu" or (values.dtype.kind != "b" and ((values < 0) | (values > 1)).any()):
        raise ValueError(f"column {STARTS} must be booleans, True where a document begins")
    return values.astype(np.bool_, order="C")


def find_fault(columns: Columns, offsets: NDArray[np.int64]) -> str | None:
    """
    What SPEC section 5.1 forbids in the values of typed columns, or None.

    Args:
        columns: Float16 and bool.
        offsets: [T + 1] int64, of the records.
    """
    empty = np.flatnonzero(offsets[1:] == offsets[:-1]) if columns else offsets[:0]
    for name, values in columns.items():
        if name != STARTS and (fault := _value_fault(name, values, empty)):
            return f"column {name} holds {fault}"
    return None


def _value_fault(name: str, values: NDArray[np.float16], empty: NDArray[np.int64]) -> str | None:
    bits = values.view(np.uint16)
    place = "record" if name == RECORD_LOGPROB else "position"
    if name == "entropy":
        good = ((bits & 0x7C00) != 0x7C00) & (bits != 0x8000)
    else:
        good = (bits == 0) | ((bits > 0x8000) & (bits < 0xFC00))
    if not good.all():
        first = int(np.argmin(good))
        if not np.isfinite(values[first]):
            return f"a value at {place} {first} that is not finite in float16"
        rule = "it must be 0" if values[first] == 0 else "a log-probability is not above 0"
        return f"{values[first]} at {place} {first}; {rule}"
    if name != RECORD_LOGPROB and empty.size and bits[empty].any():
        first = int(empty[np.argmax(bits[empty] != 0)])
        return f"{values[first]} at position {first}, which has no record; it must be 0"
    return None


def pack(columns: Columns) -> NDArray[np.uint8] | None:
    """The bytes of typed columns, one after the other; None: there are none."""
    if not columns:
        return None
    return np.concatenate(
        [
            np.packbits(values, bitorder="little") if name == STARTS else values.astype("<f2").view(np.uint8)
            for name, values in columns.items()
        ]
    )


def unpack(names: tuple[str, ...], data: NDArray[np.uint8], num_positions: int, num_records: int) -> Columns:
    """
    Columns from their bytes, which they may share, as ``typed_columns`` gives them; values are not checked yet.

    Raises:
        CorruptError: An unused bit of document_start is set.
    """
    columns: dict[str, NDArray[Any]] = {}
    begin = 0
    for name in names:
        end = begin + size_of(name, num_positions, num_records)
        if name == STARTS:
            starts = np.unpackbits(data[begin:end], bitorder="little")
            if starts[num_positions + 1 :].any():
                raise CorruptError(f"column {STARTS} has a bit behind its {num_positions + 1} tokens")
            columns[name] = starts[: num_positions + 1].astype(np.bool_)
        else:
            values = data[begin:end].view("<f2")
            columns[name] = values.astype(np.float16, copy=not values.flags.aligned)
        begin = end
    assert begin == data.size
    return columns


def follow_records(
    columns: Mapping[str, NDArray[Any]],
    before: tuple[NDArray[np.int64], NDArray[np.uint32]],
    after: tuple[NDArray[np.int64], NDArray[np.uint32]],
) -> dict[str, NDArray[Any]]:
    """
    Columns for records that were put in another order or left out: record_logprob goes with its records, and a position
    that has none left has no log-prob of its label and no entropy either.

    Args:
        columns: Arrays by name; record_logprob [nnz] of the records before.
        before: Offsets [T + 1] and token ids [nnz], distinct within a position.
        after: The same of the records that are left, each of which was there before.
    """
    moved = dict(columns)
    if not moved or np.array_equal(before[1], after[1]):
        return moved
    if RECORD_LOGPROB in moved:
        old, new = _keys(*before), _keys(*after)
        order = np.argsort(old)
        moved[RECORD_LOGPROB] = moved[RECORD_LOGPROB][order[np.searchsorted(old, new, sorter=order)]]
    emptied = (np.diff(after[0]) == 0) & (np.diff(before[0]) > 0)
    for name in moved.keys() - {STARTS, RECORD_LOGPROB} if emptied.any() else ():
        moved[name] = np.where(emptied, 0, moved[name]).astype(moved[name].dtype)
    return moved


def _keys(offsets: NDArray[np.int64], token_ids: NDArray[np.uint32]) -> NDArray[np.int64]:
    """One number for each record that no other of its sequence has."""
    positions = np.repeat(np.arange(offsets.size - 1), np.diff(offsets))
    keys: NDArray[np.int64] = (positions << 32) | token_ids.astype(np.int64)
    return keys
