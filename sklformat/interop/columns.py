"""
Plain columns in npz, Parquet and JSONL: the files that home-made scripts write and read.

One row is one sequence of L tokens with T rows of records:

* ``input_ids``: L ids; ``token_ids``: T lists of ids; and, parallel to these, ``counts`` (integers that sum to the
  number of rounds) or ``logprobs`` (natural logarithms).  An empty list: no record at this position.
* optionally ``label_logprob`` and ``entropy``: T numbers, in nats.

Parquet: these are the columns, of lists and lists of lists.  JSONL: one JSON object a line with these keys.
npz: flat arrays, nothing pickled, so that lists need offsets:

* ``input_ids`` of all sequences one after the other; those of sequence s are
  ``input_ids[sequence_offsets[s]:sequence_offsets[s + 1]]``, with ``sequence_offsets`` int64 [S + 1];
* ``token_ids`` and ``counts`` or ``logprobs`` of all positions; those of position i, counted over all sequences, are
  ``token_ids[position_offsets[i]:position_offsets[i + 1]]``; each sequence has one position less than tokens.

Files written here also carry a note, a JSON object with the settings of the cache they came from: the key
``sklformat`` of Parquet's schema, the array ``sklformat`` of an npz, a file ``<name>.sklformat.json`` beside a JSONL.
Other programs may ignore it.  JSONL and Parquet are read and written sequence by sequence; an npz is read whole.

This module reads; ``columns_writer`` writes.  Neither judges values: ``plain`` does.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sklformat import layout
from sklformat.errors import CorruptError

SUFFIXES = {".npz": "npz", ".parquet": "parquet", ".jsonl": "jsonl"}
NOTE = "sklformat"
TYPES = {
    "input_ids": np.int32,
    "token_ids": np.int32,
    "counts": np.uint8,
    "logprobs": np.float64,
    **dict.fromkeys(layout.COLUMNS, np.float32),
}
_READ_ROWS = 16  # sequences decoded at once from Parquet


@dataclass(frozen=True, slots=True)
class Row:
    """
    One sequence in plain columns.

    Attributes:
        input_ids: [L] integers.
        token_ids: [nnz] integers.
        values: [nnz] counts (integers) or natural log-probs (floats).
        offsets: [T + 1] int64, records of each position; from 0 to nnz.
        columns: Optional columns by name, each [T] floats, in nats.
    """

    input_ids: NDArray[Any]
    token_ids: NDArray[Any]
    values: NDArray[Any]
    offsets: NDArray[np.int64]
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Contents:
    """What a file says of itself: names of its columns, and the note of the cache it came from, or None."""

    names: frozenset[str]
    note: dict[str, Any] | None


def note_path(path: Path) -> Path:
    """Where the note of a JSONL file lies."""
    return path.with_name(f"{path.name}.{NOTE}.json")


def read_contents(path: Path, kind: str) -> Contents:
    """
    The columns and the note of a file of kind "npz", "parquet" or "jsonl".

    Raises:
        CorruptError: It is no such file, or its note is no JSON object.
        ModuleNotFoundError: Parquet without pyarrow.
        OSError: The system's own.
    """
    text: str | bytes | None
    match kind:
        case "npz":
            with _opened_npz(path) as arrays:
                names = set(arrays.files)
                text = str(arrays[NOTE]) if NOTE in names else None
        case "parquet":
            with _opened_parquet(path) as file:
                names = set(file.schema_arrow.names)
                text = (file.schema_arrow.metadata or {}).get(NOTE.encode())
        case _:
            names = set(next(_lines(path)))
            text = note_path(path).read_bytes() if note_path(path).exists() else None
    return Contents(frozenset(names), None if text is None else _json_object(text, path, "note"))


def read_rows(path: Path, kind: str, values: str, columns: tuple[str, ...] = ()) -> Iterator[Row]:
    """
    Every sequence of a file, in order.

    Args:
        path: The file.
        kind: "npz", "parquet" or "jsonl".
        values: The column that goes with ``token_ids``: "counts" or "logprobs".
        columns: Optional columns to read.

    Raises:
        CorruptError: The file is damaged, a column is missing, has holes, or is no list of numbers.
        ModuleNotFoundError: Parquet without pyarrow.
    """
    reader = {"npz": _read_npz, "parquet": _read_parquet, "jsonl": _read_jsonl}[kind]
    return reader(path, values, columns)


def _read_jsonl(path: Path, values: str, columns: tuple[str, ...]) -> Iterator[Row]:
    for number, line in enumerate(_lines(path)):
        with in_row(path, number):
            row = _parsed(line, values, columns)
        yield row


@contextlib.contextmanager
def in_row(path: Path, number: int) -> Iterator[None]:
    """Say of a ValueError in which row of which file it is."""
    try:
        yield
    except ValueError as error:
        raise CorruptError(str(error), path=path, section="row", sequence=number) from None


def _parsed(line: dict[str, Any], values: str, columns: tuple[str, ...]) -> Row:
    missing = [name for name in ("input_ids", "token_ids", values, *columns) if name not in line]
    if missing:
        raise ValueError(f"no key {missing[0]!r}, only {', '.join(sorted(line))}")
    token_ids, offsets = _flat(line["token_ids"], "token_ids")
    flat_values, value_offsets = _flat(line[values], values)
    _check_parallel(offsets, value_offsets, values)
    extra = {name: _numbers(line[name], name) for name in columns}
    return Row(_numbers(line["input_ids"], "input_ids"), token_ids, flat_values, offsets, extra)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON object of each line that is not empty."""
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                empty = False
                yield _json_object(line, path, f"line {number}")
    if empty:
        raise CorruptError("holds no sequence", path=path)


def _json_object(text: bytes | str, path: Path, section: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number")

    try:
        value = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"not JSON: {error}", path=path, section=section) from None
    if not isinstance(value, dict):
        raise CorruptError("not a JSON object", path=path, section=section)
    return value


def _flat(lists: Any, name: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """A list of lists as one array and offsets."""
    if not isinstance(lists, list) or not all(isinstance(one, list) for one in lists):
        raise ValueError(f"{name} is not a list of lists")
    return _numbers(list(itertools.chain.from_iterable(lists)), name), offsets_of([len(one) for one in lists])


def _numbers(values: Any, name: str) -> NDArray[Any]:
    """A list of numbers as an array; integers where the column has integers."""
    try:
        array = np.asarray(values)
    except (ValueError, OverflowError):
        raise ValueError(f"{name} is not a list of numbers") from None
    return _typed(array, name)


def _typed(array: NDArray[Any], name: str) -> NDArray[Any]:
    integers = np.issubdtype(TYPES[name], np.integer)
    if array.ndim != 1 or (array.size and array.dtype.kind not in ("iu" if integers else "iuf")):
        raise ValueError(f"{name} holds something other than {'integers' if integers else 'numbers'}")
    return array if array.size else array.astype(TYPES[name])


def offsets_of(lengths: Any) -> NDArray[np.int64]:
    """Prefix sums from 0: [n] lengths become [n + 1] offsets."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _check_parallel(offsets: NDArray[np.int64], others: NDArray[np.int64], name: str) -> None:
    if offsets.size != others.size:
        raise ValueError(f"token_ids has {offsets.size - 1} rows, {name} has {others.size - 1}")
    if (offsets != others).any():
        place = int(np.argmax(offsets != others)) - 1
        ids, values = (int(each[place + 1] - each[place]) for each in (offsets, others))
        raise ValueError(f"position {place}: {ids} token_ids, but {values} {name}")


@contextlib.contextmanager
def _opened_npz(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise CorruptError("not an npz file", path=path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise CorruptError(f"npz: {error}", path=path) from None


def _read_npz(path: Path, values: str, columns: tuple[str, ...]) -> Iterator[Row]:
    with _opened_npz(path) as file:
        names = ("input_ids", "token_ids", values, *columns)
        missing = [name for name in (*names, "sequence_offsets", "position_offsets") if name not in file.files]
        if missing:
            raise ValueError(f"no array {missing[0]!r}, only {', '.join(file.files)}")
        arrays = {name: _typed(file[name], name) for name in names}
        tokens = _checked_offsets(file["sequence_offsets"], arrays["input_ids"].size, "sequence_offsets")
        records = _checked_offsets(file["position_offsets"], arrays["token_ids"].size, "position_offsets")
        positions, count = records.size - 1, tokens.size - 1
        if arrays[values].size != arrays["token_ids"].size:
            raise ValueError(f"{arrays['token_ids'].size} token_ids, but {arrays[values].size} {values}")
        if count < 1:
            raise ValueError("holds no sequence")
        rows_less = 0 if positions == arrays["input_ids"].size else 1  # L rows a sequence are for the caller to judge
        starts = tokens - rows_less * np.arange(count + 1)
        if positions != starts[-1] or (np.diff(starts) < 0).any():
            raise ValueError(f"{positions} positions do not fit {count} sequences of {arrays['input_ids'].size} tokens")
        if wrong := [name for name in columns if arrays[name].size != positions]:
            raise ValueError(f"{wrong[0]} has {arrays[wrong[0]].size} values for {positions} positions")
    for s in range(count):
        first, last = int(starts[s]), int(starts[s + 1])
        begin, end = int(records[first]), int(records[last])
        yield Row(
            arrays["input_ids"][tokens[s] : tokens[s + 1]],
            arrays["token_ids"][begin:end],
            arrays[values][begin:end],
            records[first : last + 1] - begin,
            {name: arrays[name][first:last] for name in columns},
        )


def _checked_offsets(offsets: NDArray[Any], end: int, name: str) -> NDArray[np.int64]:
    if offsets.ndim != 1 or offsets.size < 1 or offsets.dtype.kind not in "iu":
        raise ValueError(f"{name} is not a list of integers")
    offsets = offsets.astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != end or (np.diff(offsets) < 0).any():
        raise ValueError(f"{name} does not rise from 0 to {end}")
    return offsets


@contextlib.contextmanager
def _opened_parquet(path: Path) -> Iterator[Any]:
    import pyarrow as pa  # noqa: PLC0415  an extra, and slow to load
    import pyarrow.parquet as pq  # noqa: PLC0415

    with path.open("rb") as stream:
        try:
            with pq.ParquetFile(stream) as file:
                yield file
        except (pa.ArrowException, ValueError) as error:
            raise CorruptError(f"parquet: {error}", path=path) from None
        except OSError as error:
            if error.errno is not None:  # the system's own; pyarrow's, of a damaged file, has no number
                raise
            raise CorruptError(f"parquet: {error}", path=path) from None


def _read_parquet(path: Path, values: str, columns: tuple[str, ...]) -> Iterator[Row]:
    names = ["input_ids", "token_ids", values, *columns]
    number = 0
    with _opened_parquet(path) as file:
        missing = [name for name in names if name not in file.schema_arrow.names]
        if missing:
            raise ValueError(f"no column {missing[0]!r}, only {', '.join(file.schema_arrow.names)}")
        for batch in file.iter_batches(batch_size=_READ_ROWS, columns=names):
            lists = {name: _split(batch.column(name), name) for name in names}
            for i in range(batch.num_rows):
                with in_row(path, number):
                    token_ids, offsets = _nested(*lists["token_ids"], i, "token_ids")
                    flat_values, value_offsets = _nested(*lists[values], i, values)
                    _check_parallel(offsets, value_offsets, values)
                    extra = {name: _plain(*lists[name], i, name) for name in columns}
                    row = Row(_plain(*lists["input_ids"], i, "input_ids"), token_ids, flat_values, offsets, extra)
                yield row
                number += 1
    if number == 0:
        raise CorruptError("holds no sequence", path=path)


def _split(column: Any, name: str) -> tuple[Any, NDArray[np.int64]]:
    """An Arrow array of lists: what the lists hold, one after the other, and their offsets."""
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.compute as pc  # noqa: PLC0415

    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(is_kind(column.type) for is_kind in kinds):
        raise ValueError(f"column {name} is {column.type}, must be a list")
    if column.null_count:
        raise ValueError(f"column {name} has empty cells (null)")
    return column.flatten(), offsets_of(pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64))


def _plain(values: Any, offsets: NDArray[np.int64], i: int, name: str) -> NDArray[Any]:
    part = values.slice(int(offsets[i]), int(offsets[i + 1] - offsets[i]))
    if part.null_count:
        raise ValueError(f"{name} has empty cells (null)")
    return _typed(np.asarray(part.to_numpy(zero_copy_only=False)), name)


def _nested(values: Any, offsets: NDArray[np.int64], i: int, name: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    inner, inner_offsets = _split(values.slice(int(offsets[i]), int(offsets[i + 1] - offsets[i])), name)
    return _plain(inner, np.array([0, len(inner)]), 0, name), inner_offsets
