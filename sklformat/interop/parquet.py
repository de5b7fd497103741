"""Plain columns as Parquet, through pyarrow; some sequences at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sklformat.errors import CorruptError
from sklformat.files import arrow
from sklformat.format.columns import RECORD_LOGPROB
from sklformat.interop.columns import NOTE, TYPES, Row, check_parallel, in_row, no_sequence, offsets_of, typed

_READ_ROWS = 16  # sequences decoded at once
_GROUP_RECORDS = 1 << 20  # records of one row group, about


def read_head(path: Path) -> tuple[set[str], bytes | None]:
    """Names of the columns, and the note."""
    with arrow.opened_parquet(path) as file:
        return set(file.schema_arrow.names), (file.schema_arrow.metadata or {}).get(NOTE.encode())


def read_rows(path: Path, values: str, columns: tuple[str, ...]) -> Iterator[Row]:
    """As ``files.read_rows``, some sequences at a time."""
    names = ["input_ids", "token_ids", values, *columns]
    number = 0
    with arrow.opened_parquet(path) as file, _corrupt(path):
        missing = [name for name in names if name not in file.schema_arrow.names]
        if missing:
            raise ValueError(f"no column {missing[0]!r}, only {', '.join(file.schema_arrow.names)}")
        for batch in file.iter_batches(batch_size=_READ_ROWS, columns=names):
            lists = {name: _split(batch.column(name), name) for name in names}
            for i in range(batch.num_rows):
                with in_row(path, number):
                    token_ids, offsets = _nested(*lists["token_ids"], i, "token_ids")
                    flat_values, value_offsets = _nested(*lists[values], i, values)
                    check_parallel(offsets, value_offsets, values)
                    extra = {name: _plain(*lists[name], i, name) for name in columns if name != RECORD_LOGPROB}
                    if RECORD_LOGPROB in columns:
                        extra[RECORD_LOGPROB], its_offsets = _nested(*lists[RECORD_LOGPROB], i, RECORD_LOGPROB)
                        check_parallel(offsets, its_offsets, RECORD_LOGPROB)
                    row = Row(_plain(*lists["input_ids"], i, "input_ids"), token_ids, flat_values, offsets, extra)
                yield row
                number += 1
    if number == 0:
        raise no_sequence(path)


@contextlib.contextmanager
def _corrupt(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise CorruptError(f"parquet: {error}", path=path) from None


def _split(column: Any, name: str) -> tuple[Any, NDArray[np.int64]]:
    """An Arrow array of lists: what the lists hold, one after the other, and their offsets."""
    if column.null_count:  # looked for first, since they have no length
        raise ValueError(f"column {name} has empty cells (null)")
    lengths = arrow.list_lengths(column)
    if lengths is None:
        raise ValueError(f"column {name} is {column.type}, must be a list")
    return column.flatten(), offsets_of(lengths)


def _plain(values: Any, offsets: NDArray[np.int64], i: int, name: str) -> NDArray[Any]:
    part = values.slice(int(offsets[i]), int(offsets[i + 1] - offsets[i]))
    if part.null_count:
        raise ValueError(f"{name} has empty cells (null)")
    return typed(np.asarray(part.to_numpy(zero_copy_only=False)), name)


def _nested(values: Any, offsets: NDArray[np.int64], i: int, name: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    inner, inner_offsets = _split(values.slice(int(offsets[i]), int(offsets[i + 1] - offsets[i])), name)
    return _plain(inner, np.array([0, len(inner)]), 0, name), inner_offsets


class Sink:
    """Writes row groups; as ``files.Sink``."""

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
