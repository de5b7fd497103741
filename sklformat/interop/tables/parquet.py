"""Tables in Parquet and Arrow files, some rows at a time; plain columns written as Parquet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sklformat.errors import CorruptError
from sklformat.files import arrow
from sklformat.format.columns import RECORD_LOGPROB
from sklformat.interop.columns import NOTE, TYPES, Row, in_row, offsets_of
from sklformat.interop.tables.cells import Cell, check_there

_READ_ROWS = 16  # sequences decoded at once
_GROUP_RECORDS = 1 << 20  # records of one row group, about


def read_head(path: Path) -> tuple[set[str], bytes | None]:
    """Names of the columns, and the note."""
    with arrow.opened_parquet(path) as file:
        return set(file.schema_arrow.names), (file.schema_arrow.metadata or {}).get(NOTE.encode())


def count_rows(path: Path) -> int:
    """Rows of a Parquet file, by its own account."""
    with arrow.opened_parquet(path) as file:
        return int(file.metadata.num_rows)


def read_cells(path: Path, names: Sequence[str], start: int = 0) -> Iterator[dict[str, Any]]:
    """As ``files.Table.rows`` of one Parquet file; groups of rows before ``start`` are not read."""
    with arrow.opened_parquet(path) as file, _corrupt(path, "parquet"):
        check_there(names, file.schema_arrow.names)
        first, groups = 0, list(range(file.metadata.num_row_groups))
        while groups and first + file.metadata.row_group(groups[0]).num_rows <= start:
            first += file.metadata.row_group(groups.pop(0)).num_rows
        batches = file.iter_batches(batch_size=_READ_ROWS, row_groups=groups, columns=list(names), use_threads=False)
        yield from _rows_from(batches, names, path, first, start)


def read_arrow_cells(path: Path, names: Sequence[str], start: int = 0) -> Iterator[dict[str, Any]]:
    """As ``read_cells``, of an Arrow file, or a stream in a file as ``datasets`` saves it."""
    with arrow.opened_batches(path, _READ_ROWS) as (there, batches), _corrupt(path, "arrow"):
        check_there(names, there)
        yield from _rows_from((batch.select(list(names)) for batch in batches), names, path, 0, start)


def read_arrow_head(path: Path) -> tuple[set[str], bytes | None]:
    """Names of the columns, and the note, of an Arrow file."""
    with arrow.opened_batches(path, _READ_ROWS) as (there, _):
        return set(there), None


def _rows_from(
    batches: Iterable[Any], names: Sequence[str], path: Path, number: int, start: int
) -> Iterator[dict[str, Any]]:
    for batch in batches:
        if number + batch.num_rows > start:
            with in_row(path, number):
                columns = {name: _values(batch.column(name), name) for name in names}
            for i in range(max(start - number, 0), batch.num_rows):
                yield {name: values[i] for name, values in columns.items()}
        number += batch.num_rows


@contextlib.contextmanager
def _corrupt(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise CorruptError(f"{kind} table: {error}", path=path) from None


def _values(column: Any, name: str) -> list[Any]:
    """Of an Arrow array the value of each row: a Cell of lists of numbers, else what Python has for it."""
    levels, inner = list[NDArray[np.int64]](), column
    while (lengths := arrow.list_lengths(inner)) is not None:
        if inner.null_count and not levels:
            break  # a row that is no list
        levels.append(offsets_of(lengths))
        inner = inner.flatten()
    if not levels or not arrow.holds_numbers(inner):
        if column.null_count:
            raise ValueError(f"column {name} has empty cells (null)")
        return list(column.to_pylist())
    if inner.null_count:
        raise ValueError(f"{name} has empty cells (null)")
    flat = np.asarray(inner.to_numpy(zero_copy_only=False))
    cells = []
    for i in range(len(column)):
        begin, end, inside = int(levels[0][i]), int(levels[0][i + 1]), list[NDArray[np.int64]]()
        for level in levels[1:]:
            inside.append(level[begin : end + 1] - level[begin])
            begin, end = int(level[begin]), int(level[end])
        cells.append(Cell(flat[begin:end], tuple(inside)))
    return cells


class Sink:
    """Writes plain columns in row groups; as ``files.Sink``."""

    def __init__(self, file: BinaryIO, names: tuple[str, ...], note: str) -> None:
        self._names, self._rows, self._records = names, list[Row](), 0
        self._nested = {*names[1:3], RECORD_LOGPROB}
        columns = {name: (TYPES[name], 2 if name in self._nested else 1) for name in names}
        self._writer = arrow.ListsWriter(file, columns, {NOTE: note})

    def append(self, row: Row) -> None:
        self._rows.append(row)
        self._records += row.token_ids.size + row.offsets.size
        if self._records >= _GROUP_RECORDS:
            self._write_group()

    def _write_group(self) -> None:
        rows, self._rows, self._records = self._rows, [], 0

        def lists(name: str, parts: list[NDArray[Any]]) -> Any:
            return arrow.list_array(
                np.concatenate(parts).astype(TYPES[name]), offsets_of([part.size for part in parts])
            )

        def nested(name: str, parts: list[NDArray[Any]]) -> Any:
            inner = offsets_of(np.concatenate([np.diff(row.offsets) for row in rows]))
            flat: NDArray[Any] = np.concatenate(parts).astype(TYPES[name])
            outer = offsets_of([row.offsets.size - 1 for row in rows])
            return arrow.list_array(arrow.list_array(flat, inner), outer)

        arrays = [
            lists("input_ids", [row.input_ids for row in rows]),
            nested("token_ids", [row.token_ids for row in rows]),
            nested(self._names[2], [row.values for row in rows]),
        ]
        for name in self._names[3:]:
            made = nested if name in self._nested else lists
            arrays.append(made(name, [row.columns[name] for row in rows]))
        self._writer.write_group(arrays)

    def finish(self) -> None:
        if self._rows:
            self._write_group()
        self._writer.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # only where writing failed already; the file is thrown away
            self._writer.close()
