"""The only door to pyarrow: tables in Parquet and Arrow files, some rows at a time, and lists of numbers as columns."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import DTypeLike, NDArray

from sklformat.errors import CorruptError

_BUFFER_BYTES = 1 << 20  # of a column that is read; without a buffer all of a row group's column is in memory
_ARROW_MAGIC = b"ARROW1"  # of a file with an index at its end; else it is a stream of batches
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"  # which a writer puts when it closes a stream


@contextlib.contextmanager
def opened_parquet(path: Path) -> Iterator[Any]:
    """
    A ``pyarrow.parquet.ParquetFile``.

    Raises:
        CorruptError: It is no such file, or what is read of it inside the context is damaged.
        OSError: The system's own.
    """
    with (
        path.open("rb") as stream,
        _named(path, "parquet"),
        pq.ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file,
    ):
        yield file


@contextlib.contextmanager
def opened_batches(path: Path, max_rows: int) -> Iterator[tuple[list[str], Iterator[Any]]]:
    """
    The columns of an Arrow file, or stream in a file, and its record batches in slices of at most ``max_rows``.

    A slice is valid until the next one is asked for: the file is mapped, and what was read leaves the memory again.

    Raises:
        CorruptError, OSError: As ``opened_parquet``.
    """
    with path.open("rb") as stream:
        indexed = stream.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC
        if stream.seek(0, os.SEEK_END) == 0:
            raise CorruptError("arrow: the file is empty", path=path)
        mapped = mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ)

    def slices(batches: Iterable[Any]) -> Iterator[Any]:
        for batch in batches:
            for start in range(0, batch.num_rows, max_rows):
                part = batch.slice(start, max_rows)
                part.validate(full=True)  # its offsets come from the file, and Arrow believes them
                yield part
                mapped.madvise(mmap.MADV_DONTNEED)

    source = pa.BufferReader(pa.py_buffer(mapped))
    with _named(path, "arrow"):
        if indexed:
            with pa.ipc.open_file(source) as file:
                yield file.schema.names, slices(file.get_batch(i) for i in range(file.num_record_batches))
        else:
            with pa.ipc.open_stream(source) as batches:
                yield batches.schema.names, slices(_whole(batches, mapped[-len(_STREAM_END) :], path))


def _whole(batches: Iterable[Any], end: bytes, path: Path) -> Iterator[Any]:
    """The batches of a stream, which was cut between two of them if its file does not end as a stream does."""
    yield from batches
    if end != _STREAM_END:
        raise CorruptError("arrow: the stream has no end, so batches may be missing; copy the file again", path=path)


@contextlib.contextmanager
def _named(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError) as error:  # the latter of names of columns
        raise CorruptError(f"{kind}: {error}", path=path) from None
    except OSError as error:
        if error.errno is not None:  # the system's own; pyarrow's, of a damaged file, has no number
            raise
        raise CorruptError(f"{kind}: {error}", path=path) from None


def holds_numbers(column: Any) -> bool:
    """Whether an array holds integers, floats or booleans."""
    kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    return any(is_kind(column.type) for is_kind in kinds)


def list_lengths(column: Any) -> NDArray[np.int64] | None:
    """Length of each list of an array of lists, 0 of a null; None: it is no array of lists."""
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(is_kind(column.type) for is_kind in kinds):
        return None
    lengths: NDArray[np.int64] = pc.list_value_length(column).fill_null(0).to_numpy().astype(np.int64)
    return lengths


def list_array(values: Any, offsets: NDArray[Any]) -> Any:
    """An array of lists: list i is ``values[offsets[i] : offsets[i + 1]]``; values are numbers, or lists again."""
    flat = pa.array(values) if isinstance(values, np.ndarray) else values
    return pa.ListArray.from_arrays(offsets.astype(np.int32), flat)


class ListsWriter:
    """
    Write columns of lists of numbers into a Parquet file.

    Args:
        file: Where to.
        columns: Type of the numbers, and how many lists are around them, of each column.
        metadata: Texts to carry along.
    """

    def __init__(
        self, file: BinaryIO, columns: Mapping[str, tuple[DTypeLike, int]], metadata: Mapping[str, str]
    ) -> None:
        fields = []
        for name, (dtype, depth) in columns.items():
            kind = pa.from_numpy_dtype(dtype)
            for _ in range(depth):
                kind = pa.list_(kind)
            fields.append((name, kind))
        self._writer = pq.ParquetWriter(file, pa.schema(fields, metadata=dict(metadata)))

    def write_group(self, arrays: Iterable[Any]) -> None:
        """One row group; the columns in their order."""
        self._writer.write_table(pa.Table.from_arrays(list(arrays), schema=self._writer.schema))

    def close(self) -> None:
        """Complete the file."""
        self._writer.close()
