"""Tables in Parquet and Arrow files, some rows at a time; tables written as Parquet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sklformat.errors import CorruptError
from sklformat.files import arrow
from sklformat.interop.columns import NOTE, in_row, offsets_of
from sklformat.interop.tables.cells import Cell, Columns, check_there

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
    """Writes rows in row groups; as ``files.Sink``."""

    def __init__(self, file: BinaryIO, columns: Columns, note: str | None) -> None:
        self._columns, self._rows, self._records = columns, list[Mapping[str, Cell]](), 0
        self._writer = arrow.ListsWriter(file, columns, {} if note is None else {NOTE: note})

    def append(self, cells: Mapping[str, Cell]) -> None:
        self._rows.append(cells)
        self._records += max(cell.values.size + sum(level.size for level in cell.levels) for cell in cells.values())
        if self._records >= _GROUP_RECORDS:
            self._write_group()

    def _write_group(self) -> None:
        rows, self._rows, self._records = self._rows, [], 0
        arrays = []
        for name, (dtype, depth) in self._columns.items():
            cells = [row[name] for row in rows]
            made = np.concatenate([cell.values for cell in cells]).astype(dtype)
            for level in reversed(range(depth - 1)):
                lengths = np.concatenate([np.diff(cell.levels[level]) for cell in cells])
                made = arrow.list_array(made, offsets_of(lengths))
            outer = [cell.levels[0].size - 1 if cell.levels else cell.values.size for cell in cells]
            arrays.append(arrow.list_array(made, offsets_of(outer)))
        self._writer.write_group(arrays)

    def finish(self) -> None:
        if self._rows:
            self._write_group()
        self._writer.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # only where writing failed already; the file is thrown away
            self._writer.close()
