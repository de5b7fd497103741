"""Rows of Parquet and Arrow files, some at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from sklformat.distill.text.sources.streams import beyond_limit, unpack_limit
from sklformat.files import arrow

_BATCH_ROWS = 64

Rows = Iterator[tuple[int, str, dict[str, Any]]]


def read_parquet(path: Path, wanted: Collection[str] | None, *, max_unpack_ratio: int) -> Rows:
    """
    Rows of a Parquet file.

    Args:
        path: The file.
        wanted: Columns to read, those of them that are there; None: all.
        max_unpack_ratio: Bound of unpacked by packed bytes, as the file says them.

    Yields:
        Number from 0, place, and values of each row.

    Raises:
        ValueError: It has none of the wanted columns, or is beyond the bound.
        CorruptError: It is no such file, or damaged.
        ModuleNotFoundError: pyarrow is not installed.
        OSError: The system's own.
    """
    with arrow.opened_parquet(path) as file:
        names = _chosen(file.schema_arrow.names, wanted)
        groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
        limit = unpack_limit(path, max_unpack_ratio)
        if sum(group.total_byte_size for group in groups) > limit:
            raise beyond_limit(limit, max_unpack_ratio)
        yield from _rows(file.iter_batches(batch_size=_BATCH_ROWS, columns=names, use_threads=False))


def read_arrow(path: Path, wanted: Collection[str] | None) -> Rows:
    """
    Rows of an Arrow file, or of a stream in a file, as ``datasets`` writes them; as ``read_parquet``.

    The memory is that of the largest record batch where these are compressed.
    """
    with arrow.opened_batches(path, _BATCH_ROWS) as (there, batches):
        names = _chosen(there, wanted)
        yield from _rows(batch.select(names) for batch in batches)


def _chosen(there: list[str], wanted: Collection[str] | None) -> list[str]:
    if twice := {name for name in there if there.count(name) > 1}:
        raise ValueError(f"has several columns {min(twice)!r}")
    names = [name for name in there if wanted is None or name in wanted]
    if not names:
        asked = " or ".join(map(repr, sorted(wanted or ())))
        raise ValueError(f"has no column {asked}; it has {', '.join(map(repr, there)) or 'none'}")
    return names


def _rows(batches: Iterable[Any]) -> Rows:
    number = 0
    for batch in batches:
        try:
            columns = [column.to_pylist() for column in batch.columns]
        except UnicodeDecodeError as error:  # which no writer should write, and no reader of Arrow looks at
            raise ValueError(
                f"rows {number} to {number + batch.num_rows - 1} hold text that is no UTF-8: {error}"
            ) from None
        for values in zip(*columns, strict=True):
            yield number, f"row {number}", dict(zip(batch.schema.names, values, strict=True))
            number += 1
