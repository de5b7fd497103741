"""Tables in npz files, nothing pickled: read whole; plain columns written, flat, through temporary files."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from sklformat.errors import CorruptError
from sklformat.format.columns import STARTS
from sklformat.interop.columns import NOTE, check_size, no_sequence
from sklformat.interop.tables.cells import Cell, Columns, array_cell, check_there


def read_head(path: Path) -> tuple[set[str], str | None]:
    """Names of the arrays, and the note."""
    with opened(path) as arrays:
        names = set(arrays.files)
        return names, str(arrays[NOTE]) if NOTE in names else None


def read_cells(path: Path, names: Sequence[str], start: int = 0) -> Iterator[dict[str, Any]]:
    """As ``files.Table.rows``: of flat arrays with offsets, as written here, or of arrays that are stacked rows."""
    with opened(path) as file:
        check_there(names, file.files)
        if "sequence_offsets" in file.files and "position_offsets" in file.files:
            yield from _flat_rows(path, file, names, start)
        else:
            arrays = {name: file[name] for name in names}
            yield from stacked_rows(path, arrays, start)


def stacked_rows(path: Path, arrays: Mapping[str, Any], start: int = 0) -> Iterator[dict[str, Any]]:
    """
    Rows of arrays [S, …], or what gives them when it is indexed, one row each, as ``files.Table.rows``.

    Raises:
        ValueError: They have not the same number of rows.
        CorruptError: They have none.
    """
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"arrays have {', '.join(f'{count} rows ({name})' for name, count in counts.items())}")
    if not any(counts.values()):
        raise no_sequence(path)
    for i in range(start, min(counts.values())):
        yield {
            name: array_cell(array[i], getattr(array, "bits", None)) if array.ndim > 1 else array[i].item()
            for name, array in arrays.items()
        }


def _flat_rows(path: Path, file: Any, names: Sequence[str], start: int) -> Iterator[dict[str, Any]]:
    arrays = {name: file[name] for name in names}
    for name, array in arrays.items():
        if array.ndim != 1:
            raise ValueError(f"{name} has {array.ndim} axes beside position_offsets, which go with flat arrays")
    num_tokens, num_records = (file[name].size for name in ("input_ids", "token_ids"))
    tokens = checked_offsets(file["sequence_offsets"], num_tokens, "sequence_offsets")
    records = checked_offsets(file["position_offsets"], num_records, "position_offsets")
    positions, count = records.size - 1, tokens.size - 1
    if count < 1:
        raise no_sequence(path)
    # L rows per sequence are taken as they are; the caller decides whether they are right.
    rows_less = 0 if positions == num_tokens else 1
    starts = tokens - rows_less * np.arange(count + 1)
    if positions != starts[-1] or (np.diff(starts) < 0).any():
        raise ValueError(f"{positions} positions do not fit {count} sequences of {num_tokens} tokens")
    per_token, per_position = {"input_ids", STARTS}, {"label_logprob", "entropy"} & set(names)
    for name, array in arrays.items():
        size, what = (num_records, "token_ids")
        if name in per_token:
            size, what = num_tokens, "tokens"
        elif name in per_position:
            size, what = positions, "positions"
        check_size(name, array, size, what)
    for s in range(start, count):
        first, last = int(starts[s]), int(starts[s + 1])
        begin, end = int(records[first]), int(records[last])
        row = dict[str, Any]()
        for name, array in arrays.items():
            if name in per_token:
                row[name] = Cell(array[tokens[s] : tokens[s + 1]])
            elif name in per_position:
                row[name] = Cell(array[first:last])
            else:
                row[name] = Cell(array[begin:end], (records[first : last + 1] - begin,))
        yield row


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """
    The arrays of an npz file, as numpy gives them; each is read whole when it is asked for.

    Raises:
        CorruptError: It is no such file, what is read of it inside the context is damaged or pickled, or a ValueError.
        OSError: The system's own.
    """
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise CorruptError("not an npz file", path=path)
    try:
        _check_sizes(path)
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except (ValueError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise CorruptError(f"npz: {error}", path=path) from None


def _check_sizes(path: Path) -> None:
    """No array is larger than its member, whatever its header says: memory is taken before it is read."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as member:
                if member.read(6) != b"\x93NUMPY":
                    continue
                version = member.read(2)
                read = (
                    np.lib.format.read_array_header_1_0 if version[:1] == b"\1" else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read(member)
            if not dtype.hasobject and math.prod(shape) * dtype.itemsize > info.file_size:
                raise ValueError(f"{info.filename} has {info.file_size} bytes, its header says shape {list(shape)}")


def checked_offsets(offsets: NDArray[Any], end: int, name: str) -> NDArray[np.int64]:
    """
    Offsets of lists, from 0 to ``end`` and never falling.

    Raises:
        ValueError: They are not.
    """
    if offsets.ndim != 1 or offsets.size < 1 or offsets.dtype.kind not in "iu":
        raise ValueError(f"{name} is not a list of integers")
    offsets = offsets.astype(np.int64)
    if offsets[0] != 0 or offsets[-1] != end or (np.diff(offsets) < 0).any():
        raise ValueError(f"{name} does not rise from 0 to {end}")
    return offsets


class Sink:
    """As ``files.Sink``. Columns grow in temporary files, since a zip file takes one member after the other."""

    def __init__(self, file: BinaryIO, columns: Columns, note: str) -> None:
        self._file, self._note = file, note
        self._types: dict[str, np.dtype[Any]] = {name: np.dtype(dtype) for name, (dtype, _) in columns.items()}
        self._types |= dict.fromkeys(("sequence_offsets", "position_offsets"), np.dtype(np.int64))
        beside = Path(file.name).parent  # where there is room for the file there is room for its columns
        self._spools: dict[str, Any] = {}
        for name in self._types:
            self._spools[name] = tempfile.TemporaryFile(dir=beside)  # noqa: SIM115  close() does
        self._sizes = dict.fromkeys(self._types, 0)
        self._add("sequence_offsets", np.zeros(1))
        self._add("position_offsets", np.zeros(1))

    def append(self, cells: Mapping[str, Cell]) -> None:
        self._add("position_offsets", cells["token_ids"].levels[0][1:] + self._sizes["token_ids"])
        for name, cell in cells.items():
            self._add(name, cell.values)
        self._add("sequence_offsets", np.array([self._sizes["input_ids"]]))

    def _add(self, name: str, values: NDArray[Any]) -> None:
        self._spools[name].write(values.astype(self._types[name]).tobytes())
        self._sizes[name] += values.size

    def finish(self) -> None:
        with zipfile.ZipFile(self._file, "w") as archive:
            for name, dtype in self._types.items():
                head = {"descr": dtype.str, "fortran_order": False, "shape": (self._sizes[name],)}
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                    np.lib.format.write_array_header_1_0(member, head)
                    self._spools[name].seek(0)
                    shutil.copyfileobj(self._spools[name], member)
            with archive.open(zipfile.ZipInfo(f"{NOTE}.npy"), "w") as member:
                np.lib.format.write_array(member, np.array(self._note), allow_pickle=False)

    def close(self) -> None:
        for spool in self._spools.values():
            spool.close()
